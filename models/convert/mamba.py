"""Mamba checkpoints: their configs, their tensor names, and the way back.

Three forms are read: that of `state-spaces/*` (mamba_ssm), that of
transformers (`*-hf`), and Megatron's (`nvidia/mamba2-8b-3t-4k`), whose tensors
differ in name alone. The names of transformers serve inside; exports have its
form too. Hybrids have a form of their own: the same, and the attention layers
under `attention_layers` and with the names of Llama.
"""

import re
from collections.abc import Iterator
from typing import Any

from models import mamba
from models.convert.mamba_config import describes, from_json, to_hf
from models.convert.names import (
  Leaf,
  TensorSource,
  leaves_of_runs,
  taps_leaf,
  with_own_head,
)
from models.errors import InputError
from models.mamba_config import MambaConfig

__all__ = [
  "describes",
  "from_json",
  "is_megatron",
  "leaves",
  "open_source",
  "to_hf",
]

_TABLE = "backbone.embeddings.weight"
# All published Megatron checkpoints of Mamba-2 have these values.
_MEGATRON_D_STATE, _MEGATRON_VOCAB_MULTIPLE = 128, 128
# As transformers, mamba_ssm and Megatron name the token table.
TABLES = (
  _TABLE,
  "backbone.embedding.weight",
  "embedding.word_embeddings.weight",
)
_HEAD = "lm_head.weight"
_LAYER = "backbone.layers.{}."
_TEMPLATES = {
  "embed.table": _TABLE,
  "final_norm.scale": "backbone.norm_f.weight",
  "lm_head.kernel": _HEAD,
}
_LAYER_TEMPLATES = {
  "norm.scale": "norm.weight",
  "mixer.in_proj.kernel": "mixer.in_proj.weight",
  "mixer.conv.weight": "mixer.conv1d.weight",
  "mixer.conv.bias": "mixer.conv1d.bias",
  "mixer.x_proj.kernel": "mixer.x_proj.weight",
  "mixer.dt_proj.kernel": "mixer.dt_proj.weight",
  "mixer.A_log": "mixer.A_log",
  "mixer.D": "mixer.D",
  "mixer.norm.scale": "mixer.norm.weight",
  "mixer.out_proj.kernel": "mixer.out_proj.weight",
  "attn_norm.scale": "input_layernorm.weight",
  "attn.q_proj.kernel": "self_attn.q_proj.weight",
  "attn.k_proj.kernel": "self_attn.k_proj.weight",
  "attn.v_proj.kernel": "self_attn.v_proj.weight",
  "attn.o_proj.kernel": "self_attn.o_proj.weight",
  "mlp_norm.scale": "post_attention_layernorm.weight",
  "mlp.gate_proj.kernel": "mlp.gate_proj.weight",
  "mlp.up_proj.kernel": "mlp.up_proj.weight",
  "mlp.down_proj.kernel": "mlp.down_proj.weight",
}
_DT_BIAS = {"mamba1": "mixer.dt_proj.bias", "mamba2": "mixer.dt_bias"}
# Few numbers that the recurrence exponentiates: rounding them changes how long
# a state lasts.
_KEEPS_DTYPE = ("A_log", "D", "dt_bias")

_MEGATRON = "decoder.layers."
_MEGATRON_EXTRA = "_extra_state"
_RENAMES = (
  (r"backbone\.embedding\.weight", _TABLE),
  (r"embedding\.word_embeddings\.weight", _TABLE),
  (r"output_layer\.weight", _HEAD),
  (r"decoder\.final_norm\.weight", "backbone.norm_f.weight"),
  # These names are those of files whose norm is fused into the projection.
  (
    r"decoder\.layers\.(\d+)\.mixer\.in_proj\.layer_norm_weight",
    r"backbone.layers.\1.norm.weight",
  ),
  (r"decoder\.layers\.(.*)", r"backbone.layers.\1"),
)


def leaves(config: MambaConfig) -> Iterator[Leaf]:
  """Yields every parameter array that `config` calls for, and `Taps`."""
  for index, run in enumerate(config.runs):
    part = "mixer" if run.kind == "mamba" else "attn"
    template = f"{_LAYER}{part}.taps"
    yield taps_leaf(("layers", index, part), template, run.stop, run.start)

  def layer_name(name: str) -> str:
    if name == "mixer.dt_bias":
      return _LAYER + _DT_BIAS[config.kind]
    return _LAYER + _LAYER_TEMPLATES[name]

  yield from leaves_of_runs(
    mamba.abstract_params(config),
    config.runs,
    _TEMPLATES,
    layer_name,
    _KEEPS_DTYPE,
  )


def is_megatron(source: TensorSource) -> bool:
  """Whether the tensors have Megatron's names; such need no `config.json`."""
  return any(name.startswith(_MEGATRON) for name in source.names)


def open_source(
  json: dict[str, Any] | None, path: str, source: TensorSource
) -> tuple[MambaConfig, TensorSource]:
  """Reads the config, and offers the tensors by the names of transformers.

  Args:
    json: the parsed `config.json`, or None for a Megatron checkpoint without.
    path: of that file, for messages.
    source: the tensors under their own names.

  Raises:
    InputError: the config is not of a model that `models.mamba` computes.
  """
  extra = [n for n in source.names if n.endswith(_MEGATRON_EXTRA)]
  source = source.without(extra).renamed(_rename)
  if json is None:
    config = _from_shapes(source, path)
  else:
    config = from_json(json, path)
  return with_own_head(config, source, _HEAD, _TABLE)


def _rename(name: str) -> str:
  for pattern, template in _RENAMES:
    if match := re.fullmatch(pattern, name):
      return match.expand(template)
  return name


def _from_shapes(source: TensorSource, path: str) -> MambaConfig:
  """The config of a Megatron checkpoint, which has no `config.json`.

  State size and padding of the vocabulary are Megatron's defaults, 128.

  Args:
    source: its tensors by the names of transformers.
    path: where a `config.json` would be, for messages.

  Raises:
    InputError: the tensors are not those of a Mamba-2 model.
  """
  mixer = "backbone.layers.0.mixer."
  try:
    vocab_size, d_model = source.shape("backbone.embeddings.weight")
    (num_heads,) = source.shape(mixer + "A_log")
    channels, _, d_conv = source.shape(mixer + "conv1d.weight")
    _, d_inner = source.shape(mixer + "out_proj.weight")
    states, rest = divmod(channels - d_inner, 2 * _MEGATRON_D_STATE)
    layers = {n.split(".")[2] for n in source.names if ".layers." in n}
    if rest:
      raise ValueError("the state size is not 128")
    return MambaConfig(
      kind="mamba2",
      vocab_size=vocab_size,
      vocab_multiple=(
        1 if vocab_size % _MEGATRON_VOCAB_MULTIPLE else _MEGATRON_VOCAB_MULTIPLE
      ),
      num_layers=len(layers),
      d_model=d_model,
      d_state=_MEGATRON_D_STATE,
      expand=d_inner // d_model,
      d_conv=d_conv,
      head_dim=d_inner // num_heads,
      num_groups=states,
      tie_embeddings="lm_head.weight" not in source.names,
    )
  except (KeyError, ValueError, ZeroDivisionError) as error:
    raise InputError(
      f"{path}: is missing, and the tensors are not those of Megatron's "
      "Mamba-2: write a config.json in the form of state-spaces/mamba2-2.7b"
    ) from error
