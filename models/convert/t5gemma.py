"""The encoders inside T5Gemma and T5Gemma-2 checkpoints.

Decoder, vision tower and head are left where they are. Both forms of names are
read, with and without `model.` in front, and those of an encoder alone.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from models import config_checks, input_files, locate, t5gemma
from models.convert import directory, hub, shards
from models.convert.names import TensorSource, build, leaves_of
from models.errors import InputError, shown
from models.t5gemma_config import T5GemmaConfig

_FIRST, _SECOND = "t5gemma", "t5gemma2"
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Keys whose other values are not computed here, and what is.
_FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_PREFIXES = (
  "model.encoder.",
  "model.encoder.text_model.",
  "encoder.",
  "encoder.text_model.",
)
_TABLE = "embed_tokens.weight"
# One vector that stands for the end of a picture.
_END, _END_ID = "embed_tokens.eoi_embedding", 256_000
_NOT_OF_TEXT = ("vision_tower.", "multi_modal_projector.", "text_model.", _END)
_ATTENTION, _MLP = "layers.{}.self_attn.", "layers.{}.mlp."
_TEMPLATES = {
  "embed.table": _TABLE,
  "layers.pre_attn_norm.weight": "layers.{}.pre_self_attn_layernorm.weight",
  "layers.post_attn_norm.weight": "layers.{}.post_self_attn_layernorm.weight",
  "layers.attn.q_proj.kernel": _ATTENTION + "q_proj.weight",
  "layers.attn.k_proj.kernel": _ATTENTION + "k_proj.weight",
  "layers.attn.v_proj.kernel": _ATTENTION + "v_proj.weight",
  "layers.attn.o_proj.kernel": _ATTENTION + "o_proj.weight",
  "layers.attn.q_norm.weight": _ATTENTION + "q_norm.weight",
  "layers.attn.k_norm.weight": _ATTENTION + "k_norm.weight",
  "layers.pre_mlp_norm.weight": "layers.{}.pre_feedforward_layernorm.weight",
  "layers.post_mlp_norm.weight": "layers.{}.post_feedforward_layernorm.weight",
  "layers.mlp.gate_proj.kernel": _MLP + "gate_proj.weight",
  "layers.mlp.up_proj.kernel": _MLP + "up_proj.weight",
  "layers.mlp.down_proj.kernel": _MLP + "down_proj.weight",
  "norm.weight": "norm.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderCheckpoint:
  """An encoder that was found; its weights are read by `params`.

  Attributes:
    folder: with its files, such as the tokenizer.
    config: its shape.
    source: its tensors, by their names without prefix.
  """

  folder: pathlib.Path
  config: T5GemmaConfig
  source: TensorSource

  def params(self, dtype: str = "float32") -> t5gemma.Params:
    """The parameters of `models.t5gemma.Encoder`.

    Raises:
      InputError: a tensor is missing, unknown or of a wrong shape.
    """
    tree = t5gemma.abstract_params(self.config)
    leaves = leaves_of(tree, _TEMPLATES, self.config.num_layers)
    return build(leaves, self.source, dtype, "T5Gemma")


def open_encoder(source: str | os.PathLike[str]) -> EncoderCheckpoint:
  """Opens a checkpoint; reads no tensor yet.

  Args:
    source: a folder with config.json and safetensors, or a hub id.

  Raises:
    InputError: a file is missing or damaged, or not of T5Gemma or T5Gemma-2.
  """
  folder = pathlib.Path(source).expanduser()
  if not folder.is_dir() and locate.HUB_ID.fullmatch(os.fspath(source)):
    folder = hub.download(os.fspath(source))
  if not folder.is_dir():
    raise InputError(f"{folder}: is no folder: give that of a T5Gemma model")
  path = folder / "config.json"
  hf = shards.read_json(path)
  config = from_hf(hf, str(path))
  source = _of_encoder(hf, config, directory.tensors(folder))
  return EncoderCheckpoint(folder=folder, config=config, source=source)


def from_hf(hf: Mapping[str, Any], path: str) -> T5GemmaConfig:
  """Reads the `config.json` of T5Gemma or T5Gemma-2.

  Args:
    hf: the parsed file.
    path: of that file, for messages.

  Raises:
    InputError: another family, an unsupported option or a missing key.
  """
  kind = hf.get("model_type")
  if kind not in (_FIRST, _SECOND):
    raise InputError(
      f"{path}: model_type {shown(kind)} is not supported, only {_FIRST!r} and "
      f"{_SECOND!r}: use another checkpoint"
    )
  parts = ("encoder",) if kind == _FIRST else ("encoder", "text_config")
  text: Any = hf
  for part in parts:
    text = text.get(part)
    if not isinstance(text, Mapping):
      raise InputError(f"{path}: {part} is missing: get the file again")

  def need(key: str) -> Any:
    if text.get(key) is None:
      raise InputError(f"{path}: {key} is missing: get the file again")
    return text[key]

  fixed = (
    _FIXED if kind == _FIRST else _FIXED | {"attn_logit_softcapping": None}
  )
  for key, value in fixed.items():
    if text.get(key, value) != value:
      raise InputError(
        f"{path}: {key}={shown(text[key])} is not supported, only {value!r}: "
        "use another checkpoint"
      )
  with input_files.errors_of_config(path):
    return _config(text, need, kind, path)


def _config(
  text: Mapping[str, Any], need: Callable[[str], Any], kind: str, path: str
) -> T5GemmaConfig:
  window = config_checks.size("sliding_window", need("sliding_window"))
  behind, ahead = window - 1, window - 1
  if kind == _SECOND:
    behind, ahead = (window + 1) // 2 - 1, window // 2
  return T5GemmaConfig(
    vocab_size=need("vocab_size"),
    d_model=need("hidden_size"),
    d_ff=need("intermediate_size"),
    num_heads=need("num_attention_heads"),
    num_kv_heads=need("num_key_value_heads"),
    head_dim=need("head_dim"),
    sliding=_sliding(text, kind, need("num_hidden_layers"), path),
    behind=behind,
    ahead=ahead,
    query_scalar=need("query_pre_attn_scalar"),
    softcap=text.get("attn_logit_softcapping"),
    qk_norm=kind == _SECOND,
    norm_eps=need("rms_norm_eps"),
    **_rope(text, kind, path),
  )


def _sliding(
  text: Mapping[str, Any], kind: str, count: Any, path: str
) -> tuple[bool, ...]:
  """Which layers see their neighbours alone."""
  config_checks.size("num_hidden_layers", count, most=config_checks.MOST_LAYERS)
  kinds = text.get("layer_types")
  if kinds is None:
    # Older files name no pattern: every second layer (T5Gemma) or every sixth
    # (T5Gemma-2) sees all tokens.
    every = text.get("sliding_window_pattern", 2 if kind == _FIRST else 6)
    config_checks.size("sliding_window_pattern", every)
    return tuple((i + 1) % every != 0 for i in range(count))
  if not isinstance(kinds, list) or len(kinds) != count:
    raise InputError(f"{path}: layer_types does not name {count} layers")
  for name in kinds:
    if name not in (_SLIDING, _FULL):
      raise InputError(
        f"{path}: layer_types has {shown(name)}, only {_SLIDING!r} and "
        f"{_FULL!r} are supported: use another checkpoint"
      )
  return tuple(name == _SLIDING for name in kinds)


def _rope(text: Mapping[str, Any], kind: str, path: str) -> dict[str, float]:
  """Bases and factor, from the keys of transformers 4 or 5."""
  found = text.get("rope_parameters") or {}
  if kind == _FIRST:
    full = {"rope_theta": text.get("rope_theta", 10000.0)} | found
    near = full
  else:
    full = {"rope_theta": text.get("rope_theta", 1e6)}
    full |= text.get("rope_scaling") or {}
    full |= found.get(_FULL) or {}
    near = {"rope_theta": text.get("rope_local_base_freq", 10000.0)}
    near |= found.get(_SLIDING) or {}
  for rope, names in ((near, ("default",)), (full, ("default", "linear"))):
    name = rope.get("rope_type", rope.get("type", "default"))
    if name not in names:
      raise InputError(
        f"{path}: RoPE scaling {shown(name)} is not supported, only "
        f"{' and '.join(names)}: use another checkpoint"
      )
  return {
    "rope_theta": full["rope_theta"],
    "rope_factor": full.get("factor", 1.0),
    "sliding_rope_theta": near["rope_theta"],
  }


def _of_encoder(
  hf: Mapping[str, Any], config: T5GemmaConfig, source: TensorSource
) -> TensorSource:
  """The tensors of the text's encoder alone, by their names in it."""
  prefix = next(
    (p for p in _PREFIXES if p + _TABLE in source.names), _PREFIXES[0]
  )
  inner = {
    name.removeprefix(prefix)
    for name in source.names
    if name.startswith(prefix)
  }

  def read(name):
    array = source.read(prefix + name)
    if name != _TABLE or _END not in inner or not config.qk_norm:
      return array
    # This vector is not multiplied by sqrt(D), as those of tokens are.
    end = hf.get("eoi_token_index") or hf["encoder"].get("eoi_token_index")
    end = _END_ID if end is None else end
    if not isinstance(end, int) or not 0 <= end < len(array):
      return array
    array = array.copy()
    array[end] = source.read(prefix + _END) / math.sqrt(config.d_model)
    return array

  return TensorSource(
    names=frozenset(n for n in inner if not n.startswith(_NOT_OF_TEXT)),
    read=read,
    label=lambda name: source.label(prefix + name),
    shape=source.shape and (lambda name: source.shape(prefix + name)),
  )
