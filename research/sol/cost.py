"""What an action costs: net keep, FLOPs and bytes.

Net keep is the published proxy. FLOPs and bytes are those of a decoder that
really skips the work (`research/cost/decode_step.py`). Bits save neither: they
round the MLP's *output*, which is neither a weight, nor the input of a matrix
product, nor cached, so a bfloat16 decoder reads and multiplies as much as
before. The refresh, a dense replay of every T tokens, saves nothing: it is what
a decoder pays for skipping work at all.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from research.cost import decode_step
from research.sol.actions import FULL_BITS, ActionTable
from research.sol.rollout import Setup


def net_keep(table: ActionTable) -> np.ndarray:
  """Returns (kappa + rho + bits / 16) / 3 of each action, (A,)."""
  bits = np.asarray(table.bits) / FULL_BITS
  return (np.asarray(table.kappa) + np.asarray(table.rho) + bits) / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCosts:
  """FLOPs and bytes a token, as shares of a dense decode step: (..., 2).

  Attributes:
    setup: the model, its pages and how rho prunes.
    context: Tokens that a step sees, the current one included; the mean over
      what is scored.
    page_union: Pages that the query heads of a group read together over those
      of one head, by kappa; see `page_union.measure`.
  """

  setup: Setup
  context: float
  page_union: Mapping[float, float]

  def actions(self, table: ActionTable) -> np.ndarray:
    """Of the A actions of a table, without policy and refresh: (A, 2)."""
    union = [self.page_union[kappa] for kappa in table.kappa]
    return self._step(table.kappa, table.rho, union) / self._dense

  def policy(self, params: int) -> np.ndarray:
    """Of a policy, each of whose parameters is multiplied and read once."""
    with_policy = self._step(1.0, 1.0, 1.0, policy_params=params)
    return with_policy / self._dense - 1.0

  def refresh(self, *, head: bool) -> np.ndarray:
    """Of the dense replay that ends every episode.

    Args:
      head: with logits, for a controller that looks at those of the prefix.
    """
    horizon = self.setup.horizon
    start = self.context - (horizon + 1) / 2
    found = decode_step.refresh_cost(
      self.setup.config, start, horizon, head=head
    )
    return np.array([found.flops, found.bytes]) / horizon / self._dense

  @property
  def _dense(self) -> np.ndarray:
    return self._step(1.0, 1.0, 1.0)

  def _step(self, kappa, rho, union, **options) -> np.ndarray:
    options |= {"page_size": self.setup.page_size, "prune": self.setup.prune}
    arguments = self.setup.config, kappa, rho, self.context
    flops = decode_step.flops_per_token(*arguments, **options)
    moved = decode_step.bytes_per_token(*arguments, page_union=union, **options)
    return np.stack([flops, moved], axis=-1)
