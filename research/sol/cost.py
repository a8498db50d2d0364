"""What an action costs: net keep, FLOPs, bytes, and measured time.

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
from research.cost.controller import ControllerCost
from research.sol.actions import FULL_BITS, ActionTable
from research.sol.profile import Profile
from research.sol.rollout import Setup

# What budgets may be of. All but the first are shares of a dense decode step.
UNITS = ("net_keep", "flops", "bytes", "ms")


def net_keep(table: ActionTable) -> np.ndarray:
  """Returns (kappa + rho + bits / 16) / 3 of each action, (A,)."""
  bits = np.asarray(table.bits) / FULL_BITS
  return (np.asarray(table.kappa) + np.asarray(table.rho) + bits) / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCosts:
  """FLOPs, bytes and ms a token, as shares of a dense decode step: (..., C).

  C is 2, or 3 where there is a profile.

  Attributes:
    setup: the model, its pages and how rho prunes.
    context: Tokens that a step sees, the current one included; the mean over
      what is scored.
    page_union: Pages that the query heads of a group read together over those
      of one head, by kappa; see `page_union.measure`.
    profile: measured times of actions on one device, or None.
  """

  setup: Setup
  context: float
  page_union: Mapping[float, float]
  profile: Profile | None = None

  @property
  def units(self) -> tuple[str, ...]:
    """Names of the C costs."""
    return UNITS[1:] if self.profile else UNITS[1:3]

  def actions(self, table: ActionTable) -> np.ndarray:
    """Of the A actions of a table, without policy and refresh: (A, C)."""
    union = [self.page_union[kappa] for kappa in table.kappa]
    found = self._step(table.kappa, table.rho, union) / self._dense
    if self.profile is None:
      return found
    return np.column_stack([found, self.profile.shares(table)])

  def controller(self, found: ControllerCost) -> np.ndarray:
    """Of a controller: (C,); its time is that of its kernels and bytes."""
    shares = np.array([found.flops, found.bytes]) / self._dense
    if self.profile is None:
      return shares
    return np.append(
      shares, self.profile.controller(found.launches) + shares[1]
    )

  def of_unit(self, table: ActionTable, unit: str) -> np.ndarray:
    """Of the A actions, in one of `units`: (A,)."""
    return self.actions(table)[:, self.units.index(unit)]

  def overhead(
    self, unit: str, found: ControllerCost, *, refreshed: bool, head: bool
  ) -> float:
    """What every token pays beside its action: the controller, the refresh.

    Args:
      unit: of `units`.
      found: the controller's own.
      refreshed: every episode ends with a dense replay.
      head: with logits, see `refresh`.
    """
    total = self.controller(found)
    if refreshed:
      total = total + self.refresh(head=head)
    return float(total[self.units.index(unit)])

  def refresh(self, *, head: bool) -> np.ndarray:
    """Of the dense replay that ends every episode: (C,).

    Args:
      head: with logits, for a controller that looks at those of the prefix.
    """
    horizon = self.setup.horizon
    start = self.context - (horizon + 1) / 2
    found = decode_step.refresh_cost(
      self.setup.config, start, horizon, head=head
    )
    shares = np.array([found.flops, found.bytes]) / horizon / self._dense
    if self.profile is None:
      return shares
    return np.append(shares, self.profile.refresh)

  @property
  def _dense(self) -> np.ndarray:
    return self._step(1.0, 1.0, 1.0)

  def _step(self, kappa, rho, union, **options) -> np.ndarray:
    options |= {"page_size": self.setup.page_size, "prune": self.setup.prune}
    arguments = self.setup.config, kappa, rho, self.context
    flops = decode_step.flops_per_token(*arguments, **options)
    moved = decode_step.bytes_per_token(*arguments, page_union=union, **options)
    return np.stack([flops, moved], axis=-1)
