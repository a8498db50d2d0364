"""`config.json` of Mamba checkpoints to `MambaConfig` and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

from models import input_files
from models.errors import InputError, shown
from models.mamba_config import AttentionLayers, MambaConfig

# Keys whose other values this model does not compute, and what it does.
_FIXED = {
  "hidden_act": "silu",
  "use_bias": False,
  "use_conv_bias": True,
}
_FIXED_SSM = {
  "rms_norm": True,
  "residual_in_fp32": True,
  "d_intermediate": 0,
  "attn_layer_idx": [],
}
_FIXED_SSM_CFG = {
  "bias": False,
  "conv_bias": True,
  "D_has_hdim": False,
  "rmsnorm": True,
  "norm_before_gate": False,
}
# They concern initialisation and speed alone.
_IGNORED_SSM_CFG = {
  "A_init_range",
  "chunk_size",
  "conv_init",
  "dt_init",
  "dt_init_floor",
  "dt_max",
  "dt_min",
  "dt_scale",
  "use_fast_path",
  "use_mem_eff_path",
}
_SSM_CFG = {
  "d_state": "d_state",
  "d_conv": "d_conv",
  "expand": "expand",
  "dt_rank": "dt_rank",
  "headdim": "head_dim",
  "ngroups": "num_groups",
}
_KINDS = {"mamba": "mamba1", "mamba2": "mamba2"}
_HYBRID = "_hybrid"
_D_STATE = {"mamba1": 16, "mamba2": 128}


def from_json(json: dict[str, Any], path: str) -> MambaConfig:
  """Reads a config of mamba_ssm or of transformers.

  Args:
    json: the parsed `config.json`.
    path: of that file, for messages.

  Raises:
    InputError: an unsupported option, a missing key, or sizes that do not fit.
  """
  read = _from_hf if "model_type" in json else _from_mamba_ssm
  with input_files.errors_of_config(path):
    config = _of_keys(read, json, path)
    tie_key = (
      "tie_word_embeddings" if "model_type" in json else "tie_embeddings"
    )
    # Where the config is silent, a head in the file says that it is untied.
    tied = True if json.get(tie_key) is None else json[tie_key]
    return dataclasses.replace(config, tie_embeddings=tied)


def _of_keys(
  read: Callable[[dict[str, Any], str], MambaConfig],
  json: dict[str, Any],
  path: str,
) -> MambaConfig:
  try:
    return read(json, path)
  except KeyError as error:
    key = shown(error.args[0])[1:-1]
    raise InputError(f"{path}: {key} is missing: get the file again") from error


def describes(json: dict[str, Any]) -> bool:
  """Whether a `config.json` is of a Mamba model."""
  if "d_model" in json and "n_layer" in json:
    return True
  kind = json.get("model_type")
  return isinstance(kind, str) and kind.removesuffix(_HYBRID) in _KINDS


def _refuse_others(
  values: dict[str, Any], fixed: dict[str, Any], path: str
) -> None:
  for key, value in fixed.items():
    if values.get(key, value) != value:
      raise InputError(
        f"{path}: {key}={shown(values[key])} is not supported, only {value!r}: "
        "use another checkpoint"
      )


def _from_hf(hf: dict[str, Any], path: str) -> MambaConfig:
  kind = _KINDS[hf["model_type"].removesuffix(_HYBRID)]
  _refuse_others(hf, _FIXED, path)
  low, high = hf.get("time_step_limit", (0.0, None))
  # Infinity is written in several ways, none of them a small number.
  if low != 0 or (isinstance(high, int | float) and high < 1e6):
    raise InputError(
      f"{path}: time_step_limit={shown(hf['time_step_limit'])} is not "
      "supported: use another checkpoint"
    )
  sizes = {}
  if kind == "mamba2":
    sizes = {"head_dim": hf["head_dim"], "num_groups": hf["n_groups"]}
  config = MambaConfig(
    kind=kind,
    vocab_size=hf.get("unpadded_vocab_size", hf["vocab_size"]),
    vocab_multiple=hf.get("pad_vocab_size_multiple", 1),
    num_layers=hf["num_hidden_layers"],
    d_model=hf["hidden_size"],
    d_state=hf["state_size"],
    expand=hf.get("expand", 2),
    d_conv=hf.get("conv_kernel", 4),
    norm_eps=hf.get("layer_norm_epsilon", 1e-5),
    attention=_attention(hf.get("attention_layers")),
    splits=tuple(hf.get("stack_splits", ())),
    **sizes,
  )
  config = _with_rank(config, hf.get("time_step_rank"))
  if kind == "mamba2" and config.num_heads != hf["num_heads"]:
    raise InputError(
      f"{path}: num_heads={shown(hf['num_heads'])} where expand, hidden_size "
      f"and head_dim give {config.num_heads}: correct the config"
    )
  return config


def _attention(values: dict[str, Any] | None) -> AttentionLayers | None:
  if values is None:
    return None
  if isinstance(values["indices"], list):
    values = values | {"indices": tuple(values["indices"])}
  return AttentionLayers(**values)


def _from_mamba_ssm(json: dict[str, Any], path: str) -> MambaConfig:
  _refuse_others(json, _FIXED_SSM, path)
  ssm = dict(json.get("ssm_cfg") or {})
  layer = ssm.pop("layer", "Mamba1")
  if layer not in ("Mamba1", "Mamba2"):
    raise InputError(
      f"{path}: ssm_cfg.layer={shown(layer)} is not supported, only 'Mamba1' "
      "and 'Mamba2': use another checkpoint"
    )
  kind = layer.lower()
  _refuse_others(ssm, _FIXED_SSM_CFG, path)
  known = _SSM_CFG.keys() | _FIXED_SSM_CFG.keys() | _IGNORED_SSM_CFG
  for key in sorted(ssm.keys() - known):
    raise InputError(
      f"{path}: ssm_cfg.{shown(key)[1:-1]} is not supported: use another "
      "checkpoint"
    )
  sizes = {own: ssm[key] for key, own in _SSM_CFG.items() if key in ssm}
  rank = sizes.pop("dt_rank", None)
  config = MambaConfig(
    kind=kind,
    vocab_size=json["vocab_size"],
    vocab_multiple=json.get("pad_vocab_size_multiple", 8),
    num_layers=json["n_layer"],
    d_model=json["d_model"],
    **({"d_state": _D_STATE[kind]} | sizes),
  )
  return _with_rank(config, rank)


def _with_rank(config: MambaConfig, rank: int | str | None) -> MambaConfig:
  """The config with Mamba-1's rank, where it is not the usual one."""
  if config.kind == "mamba2" or rank in (None, "auto", config.rank):
    return config
  return dataclasses.replace(config, dt_rank=rank)


def to_hf(config: MambaConfig, dtype: str) -> dict[str, Any]:
  """The `config.json` of `config`, as transformers 4 and 5 read it.

  A hybrid's has a key that transformers has not: its attention.

  Args:
    config: of the model.
    dtype: of the weights, "float32" or "bfloat16".
  """
  c = config
  hf = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "vocab_size": c.vocab_size,
    "num_hidden_layers": c.num_layers,
    "hidden_size": c.d_model,
    "state_size": c.d_state,
    "expand": c.expand,
    "conv_kernel": c.d_conv,
    "layer_norm_epsilon": c.norm_eps,
    "tie_word_embeddings": c.tie_embeddings,
    "residual_in_fp32": True,
    "torch_dtype": dtype,
    **_FIXED,
  }
  if c.kind == "mamba1":
    hf |= {"intermediate_size": c.d_inner, "time_step_rank": c.rank}
  else:
    hf |= {
      "architectures": ["Mamba2ForCausalLM"],
      "model_type": "mamba2",
      "num_heads": c.num_heads,
      "head_dim": c.head_dim,
      "n_groups": c.num_groups,
    }
  if c.splits:
    hf["stack_splits"] = list(c.splits)
  if c.attention:
    # The architecture is left without a class name, because no class of
    # transformers computes this model.
    del hf["architectures"]
    hf["model_type"] += _HYBRID
    hf["attention_layers"] = dataclasses.asdict(c.attention)
  return hf
