"""GGUF files of llama.cpp, through the `gguf` package's reader.

Quantized tensors are dequantized to float32 one at a time from a memory map.
"""

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf
import numpy as np

from models import config_checks, input_files
from models.convert import gguf_blocks
from models.convert.names import TensorSource, half_split_rows
from models.errors import InputError, shown
from models.layers import rope_frequencies
from models.transformer_config import (
  RopeScaling,
  TransformerConfig,
  gemma3_sliding,
)

_GEMMA3 = "gemma3"
_ARCHITECTURES = ("llama", "qwen2", "qwen3", _GEMMA3)
_GLOBAL_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_GEMMA3_NAMES = _LAYER_NAMES | {
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
_AGAIN = "get it again"
_ROPE_FACTORS = "rope_freqs.weight"
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")


class _CheckedReader(gguf.GGUFReader):
  """A faster reader, which names the first tensor that a cut file lacks."""

  @property
  def data(self) -> np.ndarray:
    """The mapped bytes."""
    return self._bytes

  @data.setter
  def data(self, mapped: np.memmap):
    # Slicing a memmap costs three times what slicing a plain view does, and
    # a vocabulary takes hundreds of thousands of slices.
    self._bytes = mapped.view(np.ndarray)

  def _get(self, offset, dtype, count=1, override_order=None):
    # Behind the end the library takes what there is, which may be nothing, and
    # so a count that lies keeps it busy without end.
    end = int(offset) + np.dtype(dtype).itemsize * int(count)
    if end > len(self.data):
      raise IndexError("beyond the end")
    return super()._get(offset, dtype, count, override_order)

  def _get_field_parts(self, orig_offs, raw_type):
    if gguf.GGUFValueType(raw_type) != gguf.GGUFValueType.ARRAY:
      return super()._get_field_parts(orig_offs, raw_type)
    kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
    if kind == gguf.GGUFValueType.ARRAY:
      raise ValueError("arrays of arrays are not read here")
    number = self.gguf_scalar_to_np.get(kind)
    if number is None:
      return super()._get_field_parts(orig_offs, raw_type)
    # The library makes an array of every number, a hundred times its bytes.
    head = [
      self._get(orig_offs, np.uint32),
      self._get(orig_offs + 4, np.uint64),
    ]
    values = self._get(orig_offs + 12, number, head[1][0])
    types = [gguf.GGUFValueType.ARRAY, kind]
    return 12 + values.nbytes, [*head, values], [2], types

  def _build_tensors(self, start_offs, fields):
    total = 0
    for field in fields:
      dims, kind, offset = field.parts[3], field.parts[4], field.parts[5]
      quant = gguf.GGMLQuantizationType(int(kind[0]))
      block, size = gguf.GGML_QUANT_SIZES[quant]
      held = math.prod(dims.tolist()) * size // block
      end, total = start_offs + int(offset[0]) + held, total + held
      if max(end, total) > len(self.data):
        raise InputError(
          f"tensor {field.name!r} lies beyond the end of the file, which was "
          "cut short, or on another: get it again"
        )
    super()._build_tensors(start_offs, fields)


class GgufFile:
  """A GGUF file in one or several parts, as memory maps.

  Attributes:
    parts: the readers, the one with the metadata first.
  """

  def __init__(self, parts: Sequence[gguf.GGUFReader]):
    """Takes open parts."""
    self.parts = tuple(parts)

  @property
  def tensors(self) -> list[gguf.ReaderTensor]:
    """The tensors of all parts."""
    return [tensor for part in self.parts for tensor in part.tensors]

  def get_field(self, key: str) -> gguf.ReaderField | None:
    """The metadata `key`, or None."""
    return self.parts[0].get_field(key)


def open_gguf(path: pathlib.Path) -> GgufFile:
  """Opens a GGUF file, with its other parts where it is one of several.

  Raises:
    InputError: it is no GGUF file, was cut short, or lacks a part.
  """
  first = GgufFile([_open(path)])
  with input_files.errors_of_config(path):
    count = metadata(first, "split.count", 1)
    config_checks.size("split.count", count, least=0)
  if count <= 1:
    return first
  match = _PART.fullmatch(path.name)
  if match is None or int(match[2]) != count:
    raise InputError(
      f"{path}: is one of {count} parts, whose names end in "
      f"-00001-of-{count:05}.gguf: give it back its name"
    )
  paths = [
    path.with_name(f"{match[1]}-{part:05}-of-{count:05}.gguf")
    for part in range(1, count + 1)
  ]
  for part in paths:
    if not part.exists():
      raise InputError(f"{part}: is missing, a part of {path.name}: get it too")
  return GgufFile([_open(part) for part in paths])


def _open(path: pathlib.Path) -> gguf.GGUFReader:
  input_files.regular(path, _AGAIN)
  wrong = "is no readable GGUF file, or was cut short"
  with input_files.errors_at(path, _AGAIN, wrong):
    try:
      return _CheckedReader(path)
    except InputError as error:
      raise InputError(f"{path}: {error}") from error


def metadata(reader: GgufFile, key: str, default: Any = None) -> Any:
  """The value of metadata `key`, or `default`."""
  field = reader.get_field(key)
  return default if field is None else field.contents()


def read_config(reader: GgufFile, path: str) -> TransformerConfig:
  """Reads the decoder's config from metadata and tensor names.

  Raises:
    InputError: another architecture, or a missing key.
  """
  arch = metadata(reader, "general.architecture")
  if arch not in _ARCHITECTURES:
    raise InputError(
      f"{path}: architecture {shown(arch)} is not supported; "
      f"use one of {', '.join(_ARCHITECTURES)}"
    )
  with input_files.errors_of_config(path):
    return _config(reader, arch, path)


def _config(reader: GgufFile, arch: str, path: str) -> TransformerConfig:
  def need(key: str) -> Any:
    value = metadata(reader, f"{arch}.{key}")
    if value is None:
      raise InputError(
        f"{path}: metadata {arch}.{key} is missing: convert the model again"
      )
    return value

  size = lambda key: config_checks.size(f"{arch}.{key}", need(key))
  d_model, num_heads = size("embedding_length"), size("attention.head_count")
  head_dim = metadata(
    reader, f"{arch}.attention.key_length", d_model // num_heads
  )
  rotated = metadata(reader, f"{arch}.rope.dimension_count", head_dim)
  if rotated != head_dim:
    raise InputError(
      f"{path}: rotates {shown(rotated)} of {shown(head_dim)} lanes of a head, "
      "which is not supported: use another model"
    )
  theta = float(
    config_checks.positive(
      "rope.freq_base", metadata(reader, f"{arch}.rope.freq_base", 10000.0)
    )
  )
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  if "token_embd.weight" not in tensors:
    raise InputError(
      f"{path}: tensor 'token_embd.weight' is missing: get the file again"
    )
  return TransformerConfig(
    vocab_size=int(tensors["token_embd.weight"].shape[-1]),
    num_layers=size("block_count"),
    d_model=d_model,
    d_ff=size("feed_forward_length"),
    num_heads=num_heads,
    num_kv_heads=metadata(reader, f"{arch}.attention.head_count_kv", num_heads),
    head_dim=head_dim,
    rope_theta=theta,
    rope_scaling=_rope_scaling(tensors, head_dim, theta, path),
    rope_factor=_rope_factor(reader, arch, path),
    norm_eps=_short_float(need("attention.layer_norm_rms_epsilon")),
    tie_embeddings="output.weight" not in tensors,
    qkv_bias="blk.0.attn_q.bias" in tensors,
    qk_norm="blk.0.attn_q_norm.weight" in tensors,
    max_position=need("context_length"),
    **(_gemma3(reader, need, head_dim, path) if arch == _GEMMA3 else {}),
  )


def _gemma3(
  reader: GgufFile, need: Callable[[str], Any], head_dim: int, path: str
) -> dict[str, Any]:
  """What Gemma 3 has beyond others, as llama.cpp has it (models/gemma3.cpp).

  Most files do not say which layers slide or how those rotate.
  """
  said = lambda key, default=None: metadata(reader, f"{_GEMMA3}.{key}", default)
  if said("final_logit_softcapping", 0.0):
    raise InputError(
      f"{path}: scores have a soft cap, which is not supported: use another "
      "model"
    )
  size = lambda key: config_checks.size(f"{_GEMMA3}.{key}", need(key))
  layers = config_checks.size(
    f"{_GEMMA3}.block_count", need("block_count"), 1, config_checks.MOST_LAYERS
  )
  key = "attention.sliding_window_pattern"
  sliding = gemma3_sliding(layers, config_checks.size(key, said(key, 6)))
  # The 27B alone has another divisor, that of its width over its heads.
  wide = layers == 62
  scalar = size("embedding_length") / size("attention.head_count")
  base = said("rope.freq_base_swa", 10000.0)
  return {
    "sliding": sliding if any(sliding) else (),
    "behind": size("attention.sliding_window") - 1,
    "sliding_rope_theta": float(config_checks.positive("freq_base_swa", base)),
    "query_scalar": scalar if wide else float(head_dim),
    "activation": "gelu",
    "post_norms": True,
    "scaled_embeddings": True,
  }


def _short_float(value: float) -> float:
  """The shortest decimal that is `value` in float32, as configs spell it."""
  return float(str(np.float32(value)))


def _rope_factor(reader: GgufFile, arch: str, path: str) -> float:
  """What positions are divided by, as llama.cpp reads it."""
  kind = metadata(reader, f"{arch}.rope.scaling.type", "linear")
  if kind == "none":
    return 1.0
  if kind != "linear":
    raise InputError(
      f"{path}: RoPE scaling {shown(kind)} is not supported; use a model with "
      "none, linear, or Llama-3 scaling"
    )
  # The second is the key of old files; 0 stands for none in both.
  old = metadata(reader, f"{arch}.rope.scale_linear", 0.0)
  return float(metadata(reader, f"{arch}.rope.scaling.factor", old)) or 1.0


def _rope_scaling(
  tensors: dict[str, gguf.ReaderTensor],
  head_dim: int,
  theta: float,
  path: str,
) -> RopeScaling | None:
  """Recovers Llama-3 scaling, which GGUF stores as one divisor a frequency."""
  if _ROPE_FACTORS not in tensors:
    return None
  divisors = np.asarray(tensors[_ROPE_FACTORS].data, np.float32)
  # Every published Llama-3.x has these three; the factor is the only one that
  # differs, and it is the divisor of the lowest frequencies.
  scaling = RopeScaling(
    factor=float(divisors.max()),
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=8192,
  )
  plain = np.asarray(rope_frequencies(head_dim, theta, None))
  scaled = np.asarray(rope_frequencies(head_dim, theta, scaling))
  if divisors.shape != plain.shape or not np.allclose(
    plain / divisors, scaled, rtol=1e-4
  ):
    raise InputError(
      f"{path}: tensor {_ROPE_FACTORS!r} is not Llama-3 RoPE scaling: use the "
      "model's safetensors directory"
    )
  return scaling


def tensor_source(
  reader: GgufFile, config: TransformerConfig, path: str
) -> TensorSource:
  """Offers the file under Hugging Face names, q and k rows un-permuted."""
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  tensors.pop(_ROPE_FACTORS, None)
  layer_names = _GEMMA3_NAMES if config.post_norms else _LAYER_NAMES
  own_names = {_hf_name(name, layer_names): name for name in tensors}
  undo = _undo_permutation(reader, config)

  def read(name: str) -> np.ndarray:
    tensor = tensors[own_names[name]]
    with input_files.errors_at(label(name), _AGAIN):
      try:
        array = gguf_blocks.dequantize(tensor.data, tensor.tensor_type)
      except NotImplementedError as error:
        raise InputError(
          f"{label(name)} has the unsupported type {tensor.tensor_type.name}: "
          "use another quantization of the model"
        ) from error
      if config.post_norms and name.endswith("norm.weight"):
        return array - np.float32(1)  # The converter added what norms add.
      return undo(name, array)

  def label(name: str) -> str:
    own = own_names.get(name) or _gguf_name(name, layer_names)
    return f"{path}: tensor {own!r}"

  return TensorSource(names=frozenset(own_names), read=read, label=label)


def _undo_permutation(
  reader: GgufFile, config: TransformerConfig
) -> Callable[[str, np.ndarray], np.ndarray]:
  heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
  # llama.cpp rotates neighbours for "llama" alone; its converter permutes the
  # rows of that architecture and leaves the Qwens as they are.
  permuted = metadata(reader, "general.architecture") == "llama"

  def undo(name: str, array: np.ndarray) -> np.ndarray:
    projection = name.split(".")[-2]
    if not permuted or projection not in heads:
      return array
    if array.shape[0] != heads[projection] * config.head_dim:
      return array  # Of a wrong shape, which the caller reports.
    return half_split_rows(array, heads[projection])

  return undo


def _hf_name(name: str, layer_names: Mapping[str, str]) -> str:
  match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
  if match and match[2] in layer_names:
    return f"model.layers.{match[1]}.{layer_names[match[2]]}.{match[3]}"
  return _GLOBAL_NAMES.get(name, name)


def _gguf_name(name: str, layer_names: Mapping[str, str]) -> str:
  for own, other in _GLOBAL_NAMES.items():
    if name == other:
      return own
  match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
  if match is None:
    return name
  own = {other: own for own, other in layer_names.items()}[match[2]]
  return f"blk.{match[1]}.{own}.{match[3]}"
