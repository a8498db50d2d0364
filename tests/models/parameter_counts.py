"""Parameters that the papers' equations call for, a tied table counted once."""

from models.attamba_config import AttambaConfig
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig


def expected(
  config: TransformerConfig | MambaConfig | AttambaConfig,
) -> int:
  """Counts the numbers of a model by its sizes alone."""
  c = config
  kinds = {MambaConfig: _mamba, AttambaConfig: _attamba}
  layers = kinds.get(type(c), _transformer)(c)
  tables = 1 if c.tie_embeddings else 2
  return layers + tables * c.padded_vocab_size * c.d_model + c.d_model


def _transformer(c):
  heads = c.num_heads + 2 * c.num_kv_heads
  attention = c.d_model * c.head_dim * (heads + c.num_heads)
  attention += c.qkv_bias * heads * c.head_dim
  attention += 2 * c.qk_norm * c.head_dim
  norms = (2 + 2 * c.post_norms) * c.d_model
  return c.num_layers * (attention + 3 * c.d_model * c.d_ff + norms)


def _mamba(c):
  d, inner = c.d_model, c.d_inner
  if c.kind == "mamba1":
    mixer = 2 * d * inner + inner * (c.rank + 2 * c.d_state)
    mixer += (c.rank + 1) * inner + inner * c.d_state + inner
  else:
    mixer = d * (inner + c.conv_channels + c.num_heads)
    mixer += 3 * c.num_heads + inner
  mixer += c.conv_channels * (c.d_conv + 1) + inner * d + d
  count = len(c.attention_indices)
  total = mixer * (c.num_layers - count)
  if c.attention:
    a = c.attention
    block = 2 * d * a.head_dim * (a.num_heads + a.num_kv_heads) + d
    block += 3 * d * a.d_ff + d * (a.d_ff > 0)
    total += count * block
  return total


def _attamba(c):
  """Of state spaces without W_K and W_V, or of a window alone with them."""
  d, inner = c.d_model, c.ssm_channels
  heads, channels = inner // c.ssm_head_dim, inner + 2 * c.d_state
  space = d * (inner + channels + heads) + 3 * heads + inner
  space += channels * (c.d_conv + 1) + inner * d
  keys = {"ssm": 2 * space, "none": 2 * d * c.kv_width}[c.compressor]
  attention = 2 * d * c.num_heads * c.head_dim + keys
  return c.num_layers * (attention + 3 * d * c.d_ff + 2 * d)
