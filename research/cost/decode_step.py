"""What a decode step costs that skips work: FLOPs and bytes.

Counted is what a decoder that really skips the work does and reads, for one
token of one sequence: all matrix products (2 per multiply-add), the weights and
the cache that they read, and the page bounds that a selection of pages reads.
Not counted: norms, rotary angles, softmax, the choice of the largest entries
(comparisons, below 1% of a step).
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from models.transformer_config import TransformerConfig

# Share of the gate, up and down products that rho scales.
#   input: the MLP's input channels (published).
#   intermediate: the largest |silu(gate) * up|, known only after gate and up.
#   oracle_intermediate: the same channels known beforehand at no cost.
_PRUNED = {
  "input": (True, True, False),
  "intermediate": (False, False, True),
  "oracle_intermediate": (True, True, True),
}


def flops_per_token(
  config: TransformerConfig,
  kappa: ArrayLike,
  rho: ArrayLike,
  context: ArrayLike,
  *,
  page_size: int,
  prune: str = "input",
  policy_params: int = 0,
) -> np.ndarray:
  """Counts the floating-point operations of one decode step.

  Args:
    config: of the language model.
    kappa: Shares of tokens kept; this and the next two broadcast.
    rho: Shares of MLP channels kept.
    context: Visible tokens, the current one included.
    page_size: Tokens a page.
    prune: Which channels rho drops: "input", "intermediate" or
      "oracle_intermediate".
    policy_params: Parameters of the policy, each multiplied once a step.

  Returns:
    FLOPs, float64, in the common shape.
  """
  c = config
  kappa, rho, context = _arrays(kappa, rho, context)
  width = c.num_heads * c.head_dim
  multiplied = c.num_layers * (
    _attention_params(c) + _mlp_params(c, rho, prune)
  )
  for count, seen in _seen(c, context):
    tokens, scored = _kept_and_scored(kappa, seen, page_size)
    # Scored are relu(q) with the maxima and relu(-q) with the minima.
    multiplied = multiplied + count * 2 * width * (tokens + scored)
  return 2.0 * (multiplied + c.padded_vocab_size * c.d_model + policy_params)


def bytes_per_token(
  config: TransformerConfig,
  kappa: ArrayLike,
  rho: ArrayLike,
  context: ArrayLike,
  *,
  page_size: int,
  prune: str = "input",
  policy_params: int = 0,
  weight_bytes: float = 2,
  kv_bytes: float = 2,
  page_union: ArrayLike = 1.0,
) -> np.ndarray:
  """Counts the bytes that one decode step of one sequence reads.

  Args:
    config: of the language model.
    kappa: Shares of tokens kept; this and the next two broadcast.
    rho: Shares of MLP channels kept.
    context: Visible tokens, the current one included.
    page_size: Tokens a page.
    prune: As in `flops_per_token`.
    policy_params: Parameters of the policy, each read once a step.
    weight_bytes: Bytes a weight.
    kv_bytes: Bytes a number of the key/value cache and of the page bounds.
    page_union: Pages that any query head of a group chose over those that one
      of them chose, as the cache is read once for all: 1 where they choose the
      same pages (the lower bound), the size of the group where no page is
      chosen twice. Broadcasts too.

  Returns:
    Bytes, float64, in the common shape.
  """
  c = config
  kappa, rho, context, page_union = _arrays(kappa, rho, context, page_union)
  cached = 0.0
  for count, seen in _seen(c, context):
    tokens, scored = _kept_and_scored(kappa, seen, page_size)
    union = np.minimum(tokens * page_union, seen)
    # A page's two bounds are as large as one token's key and value.
    cached = cached + 2 * count * c.num_kv_heads * c.head_dim * (union + scored)
  weights = c.num_layers * (_attention_params(c) + _mlp_params(c, rho, prune))
  weights = weights + c.padded_vocab_size * c.d_model + policy_params
  return weights * weight_bytes + cached * kv_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshCost:
  """The dense replay that ends an episode of a decoder that skips work.

  Attributes:
    flops: of one episode.
    bytes: of one episode.
  """

  flops: float
  bytes: float


def refresh_cost(
  config: TransformerConfig,
  context: int,
  horizon: int,
  *,
  weight_bytes: float = 2,
  kv_bytes: float = 2,
  head: bool = False,
) -> RefreshCost:
  """Counts one refresh: T tokens are replayed densely in one pass.

  Args:
    config: of the language model.
    context: Tokens before the episode.
    horizon: T.
    head: The dense logits are computed too, for a controller that looks at
      them; else the replay renews keys and values only.
    weight_bytes: Bytes a weight; weights are read once for the T tokens.
    kv_bytes: Bytes a number of the cache, which is also read once.

  Returns:
    The cost of an episode; divide by T for that of a token.
  """
  c = config
  params = c.num_layers * (_attention_params(c) + 3 * c.d_model * c.d_ff)
  params += c.vocab_size * c.d_model * head
  products = cached = 0.0
  for count, most in _kinds(c):
    if most is None:
      visible = horizon * context + horizon * (horizon + 1) / 2
      read = context + horizon
    else:
      visible = np.minimum(context + np.arange(1, horizon + 1), most).sum()
      # The last token's window, and those that the ones before it see.
      read = min(context + horizon, most + horizon - 1)
    products += 2 * count * c.num_heads * c.head_dim * visible
    cached += 2 * count * c.num_kv_heads * c.head_dim * read
  return RefreshCost(
    flops=2.0 * (params * horizon + products),
    bytes=params * weight_bytes + cached * kv_bytes,
  )


def _kinds(c: TransformerConfig) -> list[tuple[int, int | None]]:
  """Layers of each kind, and the tokens that one sees at most."""
  found = [(c.num_layers - c.num_sliding, None), (c.num_sliding, c.behind + 1)]
  return [(count, most) for count, most in found if count]


def _seen(c: TransformerConfig, context: np.ndarray):
  """Layers of each kind, and the tokens that they see."""
  return [
    (count, context if most is None else np.minimum(context, most))
    for count, most in _kinds(c)
  ]


def _arrays(*values):
  return np.broadcast_arrays(*(np.asarray(x, np.float64) for x in values))


def _kept_and_scored(kappa, context, page_size):
  """Returns tokens attended to and pages scored, as `sparse_attention` does."""
  budget = np.maximum(np.ceil(kappa * context - 1e-3), 1)
  pages = np.ceil(budget / page_size)
  tokens = np.minimum(pages * page_size, context)
  scored = np.where(kappa < 1, np.ceil(context / page_size), 0)
  return tokens, scored


def _attention_params(c):
  return 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)


def _mlp_params(c, rho, prune):
  if prune not in _PRUNED:
    raise ValueError(f"prune={prune!r} is none of {', '.join(_PRUNED)}")
  full = c.d_model * c.d_ff
  channels = c.d_model if prune == "input" else c.d_ff
  share = np.maximum(np.ceil(rho * channels - 1e-3), 1) / channels
  return sum(full * (share if pruned else 1.0) for pruned in _PRUNED[prune])
