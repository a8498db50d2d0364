"""Drives a method through a space until its budget is spent."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.errors import InputError, shown
from research.search import pareto
from research.search.methods import Judge, Method
from research.search.preference import Preference, Spread
from research.search.space import Genome, Space

Evaluate = Callable[[list[Genome]], np.ndarray]
# Proposals without a point that is new, after which a search has come to rest.
_PATIENCE = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
  """What a search has evaluated.

  Attributes:
    space: that was searched.
    objectives: M names.
    genomes: N points, each once, in the order of their evaluation.
    values: (N, M) float64, of which less is better.
    complete: the method ended by itself, or the budget was spent; False where
      it stopped to find new points.
  """

  space: Space
  objectives: tuple[str, ...]
  genomes: list[Genome]
  values: np.ndarray
  complete: bool = True

  def front(self) -> list[int]:
    """Places of the points that none dominates, by the first objective."""
    return pareto.front(self.values).tolist()

  def best(self, preference: Preference) -> int:
    """Place of the first point of the least score.

    Raises:
      InputError: all points have an infinite value.
    """
    ends = _Ends(len(self.objectives))
    ends.see(self.values)
    scores = preference.scores(self.values, ends.low, ends.high)
    if not np.isfinite(scores).any():
      raise InputError("no point that was evaluated is feasible")
    return int(np.argmin(scores))

  def rows(self, places: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Points and values by name, of all or of some."""
    places = range(len(self.genomes)) if places is None else places
    return [
      self.space.described(self.genomes[at])
      | dict(zip(self.objectives, self.values[at].tolist()))
      for at in places
    ]


def run(
  space: Space,
  evaluate: Evaluate,
  method: Method,
  *,
  budget: int | None = None,
  seed: int = 0,
  preference: Preference = Spread(),  # noqa: B008 (frozen)
  objectives: Sequence[str] = ("value",),
  advance: Callable[[int], None] | None = None,
) -> Found:
  """Searches a space.

  Args:
    space: of the points.
    evaluate: (N genomes that were not evaluated before) -> (N, M) values, of
      which less is better; infinity for what cannot be.
    method: that proposes points.
    budget: points to evaluate; one that is proposed again costs nothing. None
      goes on until the method ends.
    seed: of the method. The same seed and values give the same search.
    preference: of several values.
    objectives: M names.
    advance: told of evaluations as they are done.

  Raises:
    InputError: the budget, a value or the number of values does not do.
  """
  if budget is not None and budget < 1:
    raise InputError(f"budget={budget}: give at least 1")
  objectives = tuple(objectives)
  known: dict[Genome, np.ndarray] = {}
  ends = _Ends(len(objectives))
  judge = Judge(preference, lambda: (ends.low, ends.high))
  proposals = method.proposals(space, np.random.default_rng(seed), judge)
  answer, idle = None, 0
  while budget is None or len(known) < budget:
    try:
      asked = proposals.send(answer)
    except StopIteration:
      break
    new = list(dict.fromkeys(one for one in asked if one not in known))
    if budget is not None:
      new = new[: budget - len(known)]
    if new:
      values = _values(space, evaluate, new, len(objectives))
      known |= zip(new, values)
      ends.see(values)
      if advance is not None:
        advance(len(new))
    idle = 0 if new else idle + 1
    if len(known) == len(space) or idle > _PATIENCE:
      break
    if not all(one in known for one in asked):
      break
    answer = np.asarray([known[one] for one in asked])
  proposals.close()
  values = np.asarray(list(known.values())).reshape(-1, len(objectives))
  return Found(space, objectives, list(known), values, idle <= _PATIENCE)


class _Ends:
  """The least and the greatest finite value of each objective so far."""

  def __init__(self, count: int):
    self._low, self._high = np.full(count, np.inf), np.full(count, -np.inf)

  def see(self, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).min(0)
    high = np.where(finite, values, -np.inf).max(0)
    self._low = np.minimum(self._low, low)
    self._high = np.maximum(self._high, high)

  @property
  def low(self) -> np.ndarray:
    """(M,); 0 where there was none."""
    return np.where(np.isfinite(self._low), self._low, 0.0)

  @property
  def high(self) -> np.ndarray:
    """(M,); 1 where there was none."""
    return np.where(np.isfinite(self._high), self._high, 1.0)


def _values(space, evaluate, genomes, count) -> np.ndarray:
  values = np.asarray(evaluate(genomes), np.float64)
  if values.ndim == 1:
    values = values[:, None]
  if values.shape != (len(genomes), count):
    raise InputError(
      f"the evaluation of {len(genomes)} points for {count} objectives gave an "
      f"array {values.shape}"
    )
  if np.isnan(values).any():
    wrong = genomes[int(np.isnan(values).any(1).argmax())]
    raise InputError(
      f"the value of {shown(space.described(wrong), 200)} is NaN: give "
      "infinity for a point that cannot be"
    )
  return values
