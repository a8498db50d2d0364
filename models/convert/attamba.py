"""Attamba checkpoints: their configs, tensor names, and the way back.

The form is our own, since no library computes the model: names are those of
Llama, and below `self_attn` those of Mamba.
"""

from collections.abc import Iterator

from models import attamba
from models.attamba_config import AttambaConfig
from models.convert.attamba_config import describes, from_json, to_hf
from models.convert.names import Leaf, leaves_of_runs

__all__ = ["describes", "from_json", "leaves", "to_hf"]

_TEMPLATES = {
  "embed.table": "model.embed_tokens.weight",
  "final_norm.scale": "model.norm.weight",
  "lm_head.kernel": "lm_head.weight",
  "chunk_costs": "model.chunk_costs",
}
_LAYER = "model.layers.{}."
_LAYER_TEMPLATES = {
  "attn_norm.scale": "input_layernorm.weight",
  "mlp_norm.scale": "post_attention_layernorm.weight",
  "attn.gate_bias": "self_attn.gate_bias",
  **{
    f"attn.{name}_proj.kernel": f"self_attn.{name}_proj.weight"
    for name in ("q", "k", "v", "o", "gate")
  },
  **{
    f"mlp.{name}_proj.kernel": f"mlp.{name}_proj.weight"
    for name in ("gate", "up", "down")
  },
  **{
    f"attn.{space}.{ours}": f"self_attn.{space}.{theirs}"
    for space in ("k_ssm", "v_ssm")
    for ours, theirs in (
      ("in_proj.kernel", "in_proj.weight"),
      ("conv.weight", "conv1d.weight"),
      ("conv.bias", "conv1d.bias"),
      ("dt_bias", "dt_bias"),
      ("A_log", "A_log"),
      ("D", "D"),
      ("norm.scale", "norm.weight"),
      ("out_proj.kernel", "out_proj.weight"),
    )
  },
}
# These keep a file's wider dtype, because the recurrence exponentiates the
# first three, which are few, and costs are summed.
_KEEPS_DTYPE = ("A_log", "D", "dt_bias", "chunk_costs")


def leaves(config: AttambaConfig) -> Iterator[Leaf]:
  """Yields every parameter array that `config` calls for."""
  yield from leaves_of_runs(
    attamba.abstract_params(config),
    config.runs,
    _TEMPLATES,
    lambda name: _LAYER + _LAYER_TEMPLATES[name],
    _KEEPS_DTYPE,
  )
