"""`config.json` of Hugging Face to `TransformerConfig` and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

from models import config_checks, input_files
from models.errors import InputError, shown
from models.transformer_config import (
  RopeScaling,
  TransformerConfig,
  gemma3_sliding,
)

_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "gemma3")
_GEMMA3 = "gemma3_text"
_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  _GEMMA3: "Gemma3ForCausalLM",
}
# Keys whose other values this decoder does not compute, and what it does.
_FIXED = {
  "hidden_act": "silu",
  "mlp_bias": False,
  "use_sliding_window": False,
}
_GEMMA3_FIXED = {
  "hidden_activation": "gelu_pytorch_tanh",
  "attention_bias": False,
  "attn_logit_softcapping": None,
  "final_logit_softcapping": None,
  "use_bidirectional_attention": False,
}
# What transformers takes where a config of Gemma 3 is silent, as those of the
# published models with a vision tower are.
_GEMMA3_DEFAULTS = {
  "vocab_size": 262208,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "max_position_embeddings": 131072,
  "rms_norm_eps": 1e-6,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
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
  if family == "gemma3":
    hf, family = hf.get("text_config"), _GEMMA3
    if not isinstance(hf, dict):
      raise InputError(f"{path}: text_config is missing: get the file again")
  if family == _GEMMA3:
    said = {key: value for key, value in hf.items() if value is not None}
    hf, fixed = _GEMMA3_DEFAULTS | said, _GEMMA3_FIXED
  else:
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
    if family == _GEMMA3:
      return _gemma3(hf, need, path)
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


def _gemma3(
  hf: dict[str, Any], need: Callable[[str], Any], path: str
) -> TransformerConfig:
  size = lambda key: config_checks.size(key, need(key))
  number = lambda key, value: float(config_checks.positive(key, value))
  layers = config_checks.size(
    "num_hidden_layers", need("num_hidden_layers"), 1, config_checks.MOST_LAYERS
  )
  ropes = hf.get("rope_parameters") or {}
  # Transformers 5 has an entry for each kind of layer, version 4 keeps both
  # bases at the top and a scaling of the layers that see all.
  whole = ropes.get(_FULL) or {
    "rope_theta": hf.get("rope_theta") or 1e6,
    **(hf.get("rope_scaling") or {}),
  }
  near = ropes.get(_SLIDING) or {
    "rope_theta": hf.get("rope_local_base_freq") or 1e4
  }
  if near.get("rope_type", "default") != "default":
    raise InputError(
      f"{path}: RoPE scaling {shown(near['rope_type'])} of sliding layers is "
      "not supported: use another checkpoint"
    )
  sliding = _sliding(hf, layers)
  return TransformerConfig(
    vocab_size=need("vocab_size"),
    num_layers=layers,
    d_model=need("hidden_size"),
    d_ff=size("intermediate_size"),
    num_heads=size("num_attention_heads"),
    num_kv_heads=size("num_key_value_heads"),
    head_dim=need("head_dim"),
    rope_theta=number("rope_theta", whole.get("rope_theta", 1e6)),
    **_rope_scaling(whole, hf, path),
    norm_eps=need("rms_norm_eps"),
    tie_embeddings=hf.get("tie_word_embeddings", True),
    qk_norm=True,
    max_position=need("max_position_embeddings"),
    float32_stream=hf.get("residual_in_fp32", False),
    sliding=sliding,
    behind=size("sliding_window") - 1 if sliding else 0,
    sliding_rope_theta=number("rope_theta", near.get("rope_theta", 1e4)),
    query_scalar=number("query_pre_attn_scalar", need("query_pre_attn_scalar")),
    activation="gelu",
    post_norms=True,
    scaled_embeddings=True,
  )


def _sliding(hf: dict[str, Any], layers: int) -> tuple[bool, ...]:
  """Which layers slide; empty for none."""
  kinds = hf.get("layer_types")
  if kinds is None:
    period = hf.get("sliding_window_pattern") or 6
    config_checks.size("sliding_window_pattern", period)
    sliding = gemma3_sliding(layers, period)
  else:
    listed = isinstance(kinds, list) and len(kinds) == layers
    if not listed or not all(kind in (_SLIDING, _FULL) for kind in kinds):
      raise InputError(
        f"layer_types={shown(kinds)} does not say of each of {layers} layers "
        f"{_SLIDING} or {_FULL}"
      )
    sliding = tuple(kind == _SLIDING for kind in kinds)
  return sliding if any(sliding) else ()


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
    InputError: no Hugging Face family has both QKV biases and QK norms, or some
      of what is Gemma's alone.
  """
  if config.post_norms:
    return _gemma3_to_hf(config, dtype)
  if config.sliding or config.scaled_embeddings or config.activation != "silu":
    raise InputError(
      "config: sliding layers, scaled embeddings and GELU are of Gemma 3, "
      "which has post_norms: turn all on or all off before the export"
    )
  if config.query_scalar not in (None, config.head_dim):
    raise InputError(
      f"config: query_scalar={config.query_scalar} is of Gemma 3, which has "
      "post_norms: leave it out before the export"
    )
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
  hf = _shape(config, family, dtype)
  hf |= {"rope_theta": config.rope_theta, "hidden_act": "silu"}
  return hf | _scaling(config)


def _shape(
  config: TransformerConfig, family: str, dtype: str
) -> dict[str, Any]:
  """What all families have."""
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
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_position,
    "torch_dtype": dtype,
  }
  if config.float32_stream:
    hf["residual_in_fp32"] = True
  return hf


def _scaling(config: TransformerConfig) -> dict[str, Any]:
  if config.rope_scaling is not None:
    values = dataclasses.asdict(config.rope_scaling)
    scaling = {k: values[own] for own, k in _SCALING_KEYS.items()}
    return {"rope_scaling": {"rope_type": "llama3"} | scaling}
  if config.rope_factor != 1.0:
    linear = {"rope_type": "linear", "factor": config.rope_factor}
    return {"rope_scaling": linear}
  return {}


def _gemma3_to_hf(config: TransformerConfig, dtype: str) -> dict[str, Any]:
  c = config
  parts = c.qk_norm, c.scaled_embeddings, c.activation == "gelu", not c.qkv_bias
  if not all(parts):
    raise InputError(
      "config: post_norms are of Gemma 3, which has q/k norms, scaled "
      "embeddings, GELU and no biases: turn all on or all off before the export"
    )
  sliding = c.sliding or (False,) * c.num_layers
  scalar = c.head_dim if c.query_scalar is None else c.query_scalar
  whole = {"rope_type": "default"}
  whole |= _scaling(c).get("rope_scaling", {})
  hf = _shape(c, _GEMMA3, dtype)
  # Both forms of the rotations are written: transformers 4 reads the keys of
  # the top, version 5 the entries by kind of layer.
  return hf | {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
    "sliding_window": c.behind + 1,
    "layer_types": [_SLIDING if slides else _FULL for slides in sliding],
    "rope_theta": c.rope_theta,
    "rope_local_base_freq": c.sliding_rope_theta,
    **_scaling(c),
    "rope_parameters": {
      _FULL: whole | {"rope_theta": c.rope_theta},
      _SLIDING: {"rope_type": "default", "rope_theta": c.sliding_rope_theta},
    },
  }
