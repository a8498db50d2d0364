"""Floating-point operations in matrix products, for the share of the peak.

Counted is what every way of computing the model has to spend: products with
weights, attention with the keys that a causal query sees, and the recurrence of
Mamba-2 (state update and read-out), whose chunked form does more. The scan of
Mamba-1, convolutions, norms and what rematerialisation repeats count nothing.
"""

from models.attamba_config import SHARED, AttambaConfig
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig

type Config = TransformerConfig | MambaConfig | AttambaConfig


def forward(config: Config, length: int) -> dict[str, float]:
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


def training(config: Config, length: int) -> float:
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
  keys = (c.num_layers - c.num_sliding) * (length + 1) / 2
  if c.num_sliding:
    near = min(c.behind, length - 1)
    keys += c.num_sliding * (near + 1 - near * (near + 1) / (2 * length))
  return c.num_layers * layer, 4.0 * c.num_heads * c.head_dim * keys


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


def _attamba(config: AttambaConfig, length: int) -> tuple[float, float]:
  """Counted are the keys that a query sees, of the window and of even chunks.

  Where the best chunks are chosen, all in sight are scored.

  State spaces count as those of Mamba-2, twice where they are carried.
  """
  c, copies = config, 1 + config.carry
  spaces = 1 if c.share_kv else 2
  layer = 4.0 * c.d_model * c.num_heads * c.head_dim + 6.0 * c.d_model * c.d_ff
  mixing = 0.0
  if c.compressor == "ssm":
    m = c.mixer
    inputs = m.d_inner + m.conv_channels + m.num_heads
    own = 2.0 * c.d_model * (inputs + m.d_inner)
    layer += spaces * copies * own
    mixing += spaces * copies * 4.0 * m.d_inner * m.d_state
  if c.compressor != "ssm" or c.keep_projections:
    layer += 2.0 * spaces * c.d_model * c.kv_width
  layer += 2.0 * c.num_gates * c.d_model * c.kv_width
  layers, total = c.num_layers * layer, c.num_layers * mixing
  near = min(c.window, length - 1)
  window = near + 1 - near * (near + 1) / (2 * length)
  for run in c.runs:
    spans = [(0, 0)] * c.sink
    if c.compressor != "none":
      lasts = range(run.size - 1, length, run.size)
      spans += [(last - run.size + 1, last) for last in lasts]
    # Each is seen by all tokens behind the first that sees it.
    firsts = [_first(c, *span) for span in spans]
    seen = mixed = sum(max(length - first, 0) for first in firsts)
    if c.top_chunks:
      # All of them are scored, and values of the best are mixed: a token leaves
      # out as many as have come into sight behind the first `top_chunks`.
      later = sorted(firsts)[c.top_chunks :]
      mixed -= sum(max(length - first, 0) for first in later)
    keys = 2 * window + (seen + mixed) / length
    total += run.num_layers * 2.0 * c.num_heads * c.head_dim * keys
  return layers, total


def _first(config: AttambaConfig, opens: int, end: int) -> int:
  """The first token that sees a chunk, as `models.chunks.seen_from` says."""
  if config.compressor in SHARED:
    return end + config.window + 1
  return max(opens + config.window, end) + 1


_LAYERS = {
  TransformerConfig: _attention,
  MambaConfig: _mamba,
  AttambaConfig: _attamba,
}
