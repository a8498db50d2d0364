"""`config.json` of Hugging Face to `TransformerConfig` and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

from models import config_checks, input_files
from models.errors import InputError, shown
from models.transformer_config import RopeScaling, TransformerConfig

_FAMILIES = ("llama", "qwen2", "qwen3")
_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
# Keys whose other values this decoder does not compute, and what it does.
_FIXED = {
  "hidden_act": "silu",
  "mlp_bias": False,
  "use_sliding_window": False,
}
_SCALING_KEYS = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_position": "original_max_position_embeddings",
}


def from_hf(hf: dict[str, Any], path: str) -> TransformerConfig:
  """Reads a Hugging Face config.

  Args:
    hf: the parsed `config.json`.
    path: of that file, for messages.

  Raises:
    InputError: another family, an unsupported option or a missing key.
  """
  family = hf.get("model_type")
  if family not in _FAMILIES:
    raise InputError(
      f"{path}: model_type {shown(family)} is not supported; "
      f"use one of {', '.join(_FAMILIES)}"
    )
  fixed = _FIXED if family == "qwen2" else _FIXED | {"attention_bias": False}
  for key, value in fixed.items():
    if hf.get(key, value) != value:
      raise InputError(
        f"{path}: {key}={shown(hf[key])} is not supported, only {value!r}: use "
        "another checkpoint"
      )

  def need(key: str) -> Any:
    if hf.get(key) is None:
      raise InputError(f"{path}: {key} is missing: get the file again")
    return hf[key]

  with input_files.errors_of_config(path):
    return _config(hf, need, family, path)


def _config(
  hf: dict[str, Any], need: Callable[[str], Any], family: str, path: str
) -> TransformerConfig:
  size = lambda key: config_checks.size(key, need(key))
  given = lambda key, default: default if hf.get(key) is None else hf[key]
  num_heads = size("num_attention_heads")
  # Transformers 5 gathers both in one entry, older versions keep them apart.
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  theta = rope.get("rope_theta") or given("rope_theta", 10000.0)
  return TransformerConfig(
    vocab_size=need("vocab_size"),
    num_layers=size("num_hidden_layers"),
    d_model=need("hidden_size"),
    d_ff=size("intermediate_size"),
    num_heads=num_heads,
    num_kv_heads=hf.get("num_key_value_heads") or num_heads,
    head_dim=hf.get("head_dim") or size("hidden_size") // num_heads,
    rope_theta=float(config_checks.positive("rope_theta", theta)),
    **_rope_scaling(rope, hf, path),
    norm_eps=need("rms_norm_eps"),
    # Where the config is silent, a head in the file says that it is untied.
    tie_embeddings=given("tie_word_embeddings", True),
    qkv_bias=family == "qwen2",
    qk_norm=family == "qwen3",
    max_position=need("max_position_embeddings"),
    # The key is that of Mamba's configs; transformers keeps it unasked.
    float32_stream=given("residual_in_fp32", False),
  )


def _rope_scaling(
  rope: dict[str, Any], hf: dict[str, Any], path: str
) -> dict[str, Any]:
  """Fields of `TransformerConfig`."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return {}
  if kind == "linear" and "factor" in rope:
    factor = config_checks.positive("factor", rope["factor"])
    return {"rope_factor": float(factor)}
  # Transformers takes the original length from the top level too.
  original = _SCALING_KEYS["original_max_position"]
  rope = {original: hf.get(original)} | rope
  values = {own: rope.get(key) for own, key in _SCALING_KEYS.items()}
  if kind != "llama3" or None in values.values():
    raise InputError(
      f"{path}: RoPE scaling {shown(kind)} is not supported, only 'linear' and "
      "a whole 'llama3': use another checkpoint"
    )
  return {"rope_scaling": RopeScaling(**values)}


def to_hf(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  """The `config.json` of `config`, as transformers 4 and 5 read it.

  Args:
    config: of the model.
    dtype: of the weights, "float32" or "bfloat16".

  Raises:
    InputError: no Hugging Face family has both QKV biases and QK norms.
  """
  if config.qkv_bias and config.qk_norm:
    raise InputError(
      "config: qkv_bias and qk_norm together belong to no family of Hugging "
      "Face: turn one off before the export"
    )
  family = "llama"
  if config.qkv_bias:
    family = "qwen2"
  elif config.qk_norm:
    family = "qwen3"
  hf = {
    "architectures": [_ARCHITECTURES[family]],
    "model_type": family,
    "vocab_size": config.vocab_size,
    "num_hidden_layers": config.num_layers,
    "hidden_size": config.d_model,
    "intermediate_size": config.d_ff,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rope_theta": config.rope_theta,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_position,
    "hidden_act": "silu",
    "torch_dtype": dtype,
  }
  if config.float32_stream:
    hf["residual_in_fp32"] = True
  if config.rope_scaling is not None:
    values = dataclasses.asdict(config.rope_scaling)
    scaling = {k: values[own] for own, k in _SCALING_KEYS.items()}
    hf["rope_scaling"] = {"rope_type": "llama3"} | scaling
  elif config.rope_factor != 1.0:
    hf["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_factor}
  return hf
