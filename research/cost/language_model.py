"""Floating-point operations in matrix products, for the share of the peak.

Counted is what every way of computing the model has to spend: products with
weights, attention with the keys that a causal query sees, and the recurrence of
Mamba-2 (state update and read-out), whose chunked form does more. The scan of
Mamba-1, convolutions, norms and what rematerialisation repeats count nothing.
"""

from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig


def forward(
  config: TransformerConfig | MambaConfig, length: int
) -> dict[str, float]:
  """Operations a token of a forward pass, mean over a window.

  Args:
    config: of the model.
    length: tokens of a window.

  Returns:
    "layers": products with the layers' weights; "mixing": attention between
    tokens, or the recurrence of Mamba-2; "head": scores of the tokens.
  """
  layers, mixing = _LAYERS[type(config)](config, length)
  return {
    "layers": layers,
    "mixing": mixing,
    "head": 2.0 * config.padded_vocab_size * config.d_model,
  }


def training(config: TransformerConfig | MambaConfig, length: int) -> float:
  """Operations a token of an update: the backward pass has twice the forward's.

  Args:
    config: of the model.
    length: tokens of a window.
  """
  return 3.0 * sum(forward(config, length).values())


def _attention(config: TransformerConfig, length: int) -> tuple[float, float]:
  c = config
  heads = 2 * c.num_heads + 2 * c.num_kv_heads
  layer = 2.0 * c.d_model * c.head_dim * heads + 6.0 * c.d_model * c.d_ff
  keys = (length + 1) / 2
  mixing = 4.0 * c.num_heads * c.head_dim * keys
  return c.num_layers * layer, c.num_layers * mixing


def _mamba(config: MambaConfig, length: int) -> tuple[float, float]:
  c = config
  if c.kind == "mamba1":
    inputs = 2 * c.d_inner
    layer = 2.0 * c.d_inner * (2 * c.rank + 2 * c.d_state)
    mixing = 0.0
  else:
    inputs = c.d_inner + c.conv_channels + c.num_heads
    layer = 0.0
    mixing = 4.0 * c.d_inner * c.d_state
  layer += 2.0 * c.d_model * (inputs + c.d_inner)
  count = c.num_layers - len(c.attention_indices)
  layers, mixing = count * layer, count * mixing
  if c.attention:
    more = _attention(c.attention_block, length)
    layers, mixing = layers + more[0], mixing + more[1]
  return layers, mixing


_LAYERS = {TransformerConfig: _attention, MambaConfig: _mamba}
