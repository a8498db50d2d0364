"""GGUF files of small models, and random blocks of their number formats."""

import gguf
import numpy as np

from models.convert import forms
from models.layers import rope_frequencies

# Where blocks have 16-bit floats, in bytes; the others may hold any bits.
_FLOATS = {
  "Q4_0": (0,),
  "Q4_1": (0, 2),
  "Q5_0": (0,),
  "Q5_1": (0, 2),
  "Q8_0": (0,),
  "Q2_K": (80, 82),
  "Q3_K": (108,),
  "Q4_K": (0, 2),
  "Q5_K": (0, 2),
  "Q6_K": (208,),
}
FORMATS = (*_FLOATS, "Q8_K")


def write(
  path, arch, config, params, quant=None, packed=None, split=0, rope=None,
  **changes,
):  # fmt: skip
  """Writes a model as llama.cpp's converter would.

  Args:
    path: of the file.
    arch: of llama.cpp.
    config: of the model.
    params: of the model.
    quant: format of matrices that the package `gguf` packs.
    packed: by tensor name, blocks (rows, bytes) and their format, in place of
      what the model has.
    split: tensors of a file, where there are several; 0 for one file.
    rope: more of how positions turn, by key: text or numbers.
    **changes: replaces tensors by name; None leaves them out.
  """
  writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  for key, value in (rope or {}).items():
    add = writer.add_string if isinstance(value, str) else writer.add_float32
    add(f"{arch}.rope.{key}", value)
  if config.sliding:
    writer.add_sliding_window(config.behind + 1)
  arch_key = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]
  names_of = gguf.get_tensor_name_map(arch_key, config.num_layers)
  tensors = {}
  for name, tensor in forms.disassemble(config, params).items():
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    count = heads.get(name.split(".")[-2])
    if arch == "llama" and count:
      # The rows of a head go from halves to neighbours.
      halves = tensor.reshape(count, 2, -1, *tensor.shape[1:])
      tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    if arch == "gemma3" and name.endswith("norm.weight"):
      tensor = tensor + 1  # As norms of Gemma scale.
    tensors[names_of.get_name(name, (".weight", ".bias"))] = tensor
  if config.rope_scaling:
    plain = rope_frequencies(config.head_dim, config.rope_theta)
    scaled = rope_frequencies(
      config.head_dim, config.rope_theta, config.rope_scaling
    )
    tensors["rope_freqs.weight"] = plain / scaled
  for name, tensor in (tensors | changes).items():
    if tensor is None:
      continue
    if name in (packed or {}):
      blocks, kind = packed[name]
      writer.add_tensor(name, blocks, raw_dtype=kind)
      continue
    tensor = np.ascontiguousarray(tensor, np.float32)
    if quant is not None and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
      writer.add_tensor(name, gguf.quantize(tensor, quant), raw_dtype=quant)
    else:
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
  """Random blocks (rows, bytes) of the format `name`, of finite numbers."""
  kind = gguf.GGMLQuantizationType[name]
  count, size = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(seed)
  shape = rows, columns // count, size
  found = rng.integers(0, 256, shape, np.uint8)
  for at in _FLOATS.get(name, ()):
    scales = rng.uniform(0.002, 0.02, shape[:2]).astype(np.float16)
    found[..., at : at + 2] = scales[..., None].view(np.uint8)
  if name == "Q8_K":
    scales = rng.uniform(0.002, 0.02, shape[:2]).astype(np.float32)
    found[..., :4] = scales[..., None].view(np.uint8)
  return found.reshape(rows, -1)
