"""Discrete spaces, whose points are tuples of integers: genomes.

Methods know a space by `Space` alone: what can be drawn, mutated and crossed.
What a genome means is the affair of the space and of the evaluation.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from models.errors import InputError, shown

Genome = tuple[int, ...]
Columns = Mapping[str, np.ndarray]
# Draws until a point is given up that `feasible` has never let pass.
_TRIES = 10_000
# Points that are checked for being feasible at a time.
_CHUNK = 4096


class Space(Protocol):
  """What a search needs of a space."""

  def __len__(self) -> int:
    """Points, of which some may not be feasible."""

  def __iter__(self) -> Iterator[Genome]:
    """All feasible points, each once, in a fixed order."""

  def draw(self, rng: np.random.Generator) -> Genome:
    """A feasible point, uniformly."""

  def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
    """A feasible neighbour."""

  def crossed(
    self, first: Genome, second: Genome, rng: np.random.Generator
  ) -> Genome:
    """A feasible point between two."""

  def described(self, genome: Genome) -> dict[str, Any]:
    """A point as JSON values by name."""


@dataclasses.dataclass(frozen=True)
class Product:
  """Independent decisions, each among a few values.

  A genome holds the place of each decision's value.

  Attributes:
    choices: decision -> its values: numbers or strings, each once.
    feasible: columns of values of N points -> (N,) booleans; None lets all
      pass.
  """

  choices: Mapping[str, Sequence[Any]]
  feasible: Callable[[Columns], np.ndarray] | None = None
  # What `feasible` said of single points, which searches ask for again.
  _known: dict[Genome, bool] = dataclasses.field(
    default_factory=dict, compare=False, repr=False
  )

  def __post_init__(self):
    """Raises InputError where a decision has no value, or one twice."""
    if not self.choices:
      raise InputError("a space needs at least one decision")
    for name, values in self.choices.items():
      if not values or len(set(values)) != len(values):
        raise InputError(
          f"{name}={shown(list(values))}: give at least one value, and each "
          "once"
        )

  @property
  def sizes(self) -> tuple[int, ...]:
    """Values of each decision."""
    return tuple(len(values) for values in self.choices.values())

  def __len__(self) -> int:
    """Points, of which some may not be feasible."""
    return math.prod(self.sizes)

  def __iter__(self) -> Iterator[Genome]:
    """All feasible points; the last decision changes first."""
    points = itertools.product(*map(range, self.sizes))
    while chunk := list(itertools.islice(points, _CHUNK)):
      passed = self._passed(chunk)
      yield from (genome for genome, ok in zip(chunk, passed) if ok)

  def draw(self, rng: np.random.Generator) -> Genome:
    """A feasible point, uniformly.

    Raises:
      InputError: none was found among many.
    """
    return self.first_feasible(
      lambda: tuple(int(rng.integers(size)) for size in self.sizes)
    )

  def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
    """A feasible point in which one decision differs; else a new one."""
    free = [at for at, size in enumerate(self.sizes) if size > 1]
    if not free:
      return genome

    def once() -> Genome:
      at = free[int(rng.integers(len(free)))]
      step = 1 + int(rng.integers(self.sizes[at] - 1))
      value = (genome[at] + step) % self.sizes[at]
      return (*genome[:at], value, *genome[at + 1 :])

    return self.first_feasible(
      once, otherwise=lambda: self.draw(rng), tries=100
    )

  def crossed(
    self, first: Genome, second: Genome, rng: np.random.Generator
  ) -> Genome:
    """A feasible point with each decision of one parent; else the first."""

    def once() -> Genome:
      taken = rng.integers(2, size=len(first))
      return tuple(b if t else a for a, b, t in zip(first, second, taken))

    return self.first_feasible(once, otherwise=lambda: first, tries=100)

  def described(self, genome: Genome) -> dict[str, Any]:
    """Values by decision."""
    return {
      name: values[at]
      for (name, values), at in zip(self.choices.items(), genome, strict=True)
    }

  def columns(self, genomes: Sequence[Genome]) -> dict[str, np.ndarray]:
    """Values of N points, a (N,) array for each decision."""
    places = np.asarray(genomes, np.int64).reshape(-1, len(self.choices))
    return {
      name: np.asarray(values)[places[:, at]]
      for at, (name, values) in enumerate(self.choices.items())
    }

  def genome(self, values: Mapping[str, Any]) -> Genome:
    """The point of these values.

    Raises:
      InputError: a decision is missing, or has no such value.
    """
    found = []
    for name, choices in self.choices.items():
      if values.get(name) not in choices:
        raise InputError(
          f"{name}={shown(values.get(name))}: the space has "
          f"{shown(list(choices))}"
        )
      found.append(list(choices).index(values[name]))
    return tuple(found)

  def _passed(self, genomes: Sequence[Genome]) -> np.ndarray:
    if self.feasible is None:
      return np.ones(len(genomes), bool)
    return np.asarray(self.feasible(self.columns(genomes)), bool)

  def first_feasible(
    self,
    once: Callable[[], Genome],
    otherwise: Callable[[], Genome] | None = None,
    tries: int = _TRIES,
  ) -> Genome:
    """The first feasible point that `once` gives, or what `otherwise` does.

    Raises:
      InputError: there is none, and nothing otherwise.
    """
    for _ in range(tries):
      found = once()
      if found not in self._known:
        self._known[found] = bool(self._passed([found])[0])
      if self._known[found]:
        return found
    if otherwise is not None:
      return otherwise()
    raise InputError(
      f"none of {tries} points of the space is feasible: widen its choices or "
      "its limits"
    )


@dataclasses.dataclass(frozen=True)
class Subsets:
  """Sets of `count` members of `range(among)`.

  A genome holds the members, rising.
  """

  among: int
  count: int

  def __post_init__(self):
    """Raises InputError where there is no such set."""
    if not 1 <= self.count <= self.among:
      raise InputError(f"there is no set of {self.count} among {self.among}")

  def __len__(self) -> int:
    """Sets."""
    return math.comb(self.among, self.count)

  def __iter__(self) -> Iterator[Genome]:
    """All sets, in lexicographic order."""
    return itertools.combinations(range(self.among), self.count)

  def draw(self, rng: np.random.Generator) -> Genome:
    """A set, uniformly."""
    return self._filled(range(self.among), (), rng)

  def mutated(self, genome: Genome, rng: np.random.Generator) -> Genome:
    """A set in which one member is another, where there is another."""
    if self.count == self.among:
      return genome
    lost = int(rng.choice(genome))
    others = [one for one in range(self.among) if one != lost]
    kept = tuple(one for one in genome if one != lost)
    return self._filled(others, kept, rng)

  def crossed(
    self, first: Genome, second: Genome, rng: np.random.Generator
  ) -> Genome:
    """A set of what both parents have and some of what one has."""
    both = tuple(sorted(set(first) & set(second)))
    return self._filled(sorted(set(first) | set(second)), both, rng)

  def described(self, genome: Genome) -> dict[str, Any]:
    """Its members."""
    return {"members": list(genome)}

  def _filled(self, among, kept, rng) -> Genome:
    free = [one for one in among if one not in kept]
    more = rng.choice(free, self.count - len(kept), replace=False)
    return tuple(sorted([*kept, *map(int, more)]))
