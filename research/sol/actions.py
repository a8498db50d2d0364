"""Action tables: what the policy can choose at each decode step.

An action is a triple of a share of tokens to attend to (kappa), a share of MLP
channels to keep (rho), and the bits of the MLP's output, the same for all
layers and heads of the step. Source: SOL (arXiv 2605.10875).
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from models.errors import InputError

AXES = ("kappa", "rho", "bits")
FULL_BITS = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionTable:
  """The A actions of a policy, and the set-up they were published with.

  Attributes:
    name: for reports.
    kappa: (A,) shares of tokens kept, in (0, 1].
    rho: (A,) shares of MLP channels kept, in (0, 1].
    bits: (A,) bits of the MLP output, at least 2; 16 is exact.
    page_size: tokens a page of the key cache.
    context: tokens of the dense prefix.
    horizon: T, steps of an episode, after which the cache is refreshed.
    group_size: K, rollouts of one sequence.
    batch_size: B, sequences of a batch.
    accumulation: batches of one optimizer step.
  """

  name: str
  kappa: tuple[float, ...]
  rho: tuple[float, ...]
  bits: tuple[float, ...]
  page_size: int = 8
  context: int = 1024
  horizon: int = 16
  group_size: int = 16
  batch_size: int = 8
  accumulation: int = 1

  def __post_init__(self):
    """Checks the ranges that the ops ask for."""
    if not len(self.kappa) == len(self.rho) == len(self.bits) > 0:
      raise InputError(f"action table {self.name}: axes differ in length")
    for axis, low, high in (("kappa", 0, 1), ("rho", 0, 1), ("bits", 1, 16)):
      for level in self.levels(axis):
        if not low < level <= high:
          raise InputError(
            f"action table {self.name}: {axis}={level:g} is not in "
            f"({low}, {high}]"
          )
    if any(bits != int(bits) for bits in self.bits):
      raise InputError(f"action table {self.name}: bits must be whole numbers")

  @classmethod
  def product(
    cls,
    name: str,
    kappa: Sequence[float],
    rho: Sequence[float],
    bits: Sequence[float],
    **setup: int,
  ) -> "ActionTable":
    """Builds all combinations of levels, bits varying fastest."""
    columns = zip(*itertools.product(kappa, rho, bits))
    axes = [tuple(float(x) for x in column) for column in columns]
    return cls(name=name, **dict(zip(AXES, axes)), **setup)

  @property
  def size(self) -> int:
    """A."""
    return len(self.kappa)

  @property
  def full_index(self) -> int:
    """The dense action: kappa = 1, rho = 1 and 16 bits.

    Raises:
      InputError: The table has none.
    """
    actions = list(zip(self.kappa, self.rho, self.bits))
    if (1.0, 1.0, FULL_BITS) not in actions:
      raise InputError(f"action table {self.name} has no dense action")
    return actions.index((1.0, 1.0, FULL_BITS))

  @property
  def target_low(self) -> tuple[float, float, float]:
    """Lowest mean budgets that can be asked: (kappa, rho, bits / 16)."""
    return min(self.kappa), min(self.rho), min(self.bits) / FULL_BITS

  def levels(self, axis: str) -> tuple[float, ...]:
    """Returns the distinct levels of "kappa", "rho" or "bits", ascending."""
    if axis not in AXES:
      raise InputError(f"axis {axis!r} is none of {', '.join(AXES)}")
    return tuple(sorted(set(getattr(self, axis))))

  def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns kappa, rho and bits as float32 arrays (A,)."""
    kappa, rho, bits = (
      jnp.asarray(getattr(self, axis), jnp.float32) for axis in AXES
    )
    return kappa, rho, bits


def preset(name: str) -> ActionTable:
  """Returns a named table.

  Published: the joint tables J-2L, J-3L and J-FL of Llama-3.2-1B, FL-R4, FL-R16
  and FL-R64 with other horizons, 3B, 8B and `reasoning`, and the single-axis
  tables: K10 for kappa of .1 or 1, S30 for rho of .3 or 1, Q5Q16 for 5 or 16
  bits, and their like. Options beyond them: S-FL, all published levels of rho
  alone, KR-FL, those of kappa and rho, which save work where bits do not, and
  J-INT, with bits from {4, 8, 16}, the formats that hardware
  multiplies.

  Raises:
    InputError: No table has that name; the line lists those that exist.
  """
  tables = _levels()
  if name not in tables:
    raise InputError(
      f"there is no action table {name!r}; valid: {', '.join(tables)}"
    )
  kappa, rho, bits, setup = tables[name]
  return ActionTable.product(name, kappa, rho, bits, **setup)


def _levels():
  """Returns name -> (kappa, rho, bits, set-up)."""
  one, sixteen = (1.0,), (16,)
  tenths = tuple(i / 10 for i in range(1, 11))
  twentieths = tuple(i / 20 for i in range(8, 21))
  every_bit = tuple(range(5, 17))
  pages_of_4 = {"page_size": 4}
  large_group = {"group_size": 32}
  all_levels = (tenths, twentieths, every_bit)
  few_levels = ((0.1, 0.4, 0.7, 1.0), (0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
  tables = {
    "J-2L": ((0.1, 1.0), (0.6, 1.0), (5, 16), pages_of_4),
    "J-3L": ((0.1, 0.6, 1.0), (0.4, 0.8, 1.0), (5, 7, 16), pages_of_4),
    "J-FL": (*all_levels, large_group),
  }
  for horizon in (4, 16, 64):
    setup = large_group | {"horizon": horizon}
    tables[f"FL-R{horizon}"] = (*few_levels, every_bit, setup)
  for size, batch, accumulation in (("3B", 4, 16), ("8B", 2, 32)):
    setup = {"batch_size": batch, "accumulation": accumulation, "context": 512}
    tables[size] = (*all_levels, setup)
  setup = {"page_size": 16, "horizon": 64, "batch_size": 2}
  tables["reasoning"] = ((0.05, *tenths), one, sixteen, setup)
  for percent in (10, 20, 40):
    kappa = (percent / 100, 1.0)
    tables[f"K{percent}"] = (kappa, one, sixteen, pages_of_4)
  for percent in (30, 40, 50):
    rho = (percent / 100, 1.0)
    tables[f"S{percent}"] = (one, rho, sixteen, pages_of_4)
  for low, high in ((5, 10), (5, 16), (6, 16)):
    tables[f"Q{low}Q{high}"] = (one, one, (low, high), pages_of_4)
  tables["KR-FL"] = (tenths, twentieths, sixteen, large_group)
  tables["S-FL"] = (one, twentieths, sixteen, pages_of_4)
  kappa, rho, _, _ = tables["J-3L"]
  tables["J-INT"] = (kappa, rho, (4, 8, 16), {})
  return tables
