"""Methods of search: each proposes points and is told their values.

A method is a frozen dataclass whose `proposals` is a generator: it yields lists
of genomes, and gets their values (N, M) back. `running.run` drives it, counts
evaluations and ends it; a method needs to know neither budget nor files.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from models.errors import InputError
from research.search.preference import Preference
from research.search.space import Genome, Product, Space

Proposals = Generator[list[Genome], np.ndarray, None]


@dataclasses.dataclass(frozen=True)
class Judge:
  """Scores by a preference, at the ends of what a search has seen.

  Attributes:
    preference: of the user.
    ends: gives (low, high), each (M,).
  """

  preference: Preference
  ends: Callable[[], tuple[np.ndarray, np.ndarray]]

  def __call__(self, values: Any, by: Preference | None = None) -> np.ndarray:
    """Scores (N,) of values (N, M), by the preference or another."""
    return (by or self.preference).scores(np.asarray(values), *self.ends())


@dataclasses.dataclass(frozen=True)
class Exhaustive:
  """All points, in the order of the space, so many at a time."""

  batch: int = 4096

  def proposals(
    self, space: Space, rng: np.random.Generator, judge: Judge
  ) -> Proposals:
    """Yields all points."""
    del rng, judge
    points = iter(space)
    while chunk := list(itertools.islice(points, self.batch)):
      yield chunk


@dataclasses.dataclass(frozen=True)
class Random:
  """Points at random, so many at a time."""

  batch: int = 16

  def proposals(
    self, space: Space, rng: np.random.Generator, judge: Judge
  ) -> Proposals:
    """Yields points without end."""
    del judge
    while True:
      yield [space.draw(rng) for _ in range(self.batch)]


@dataclasses.dataclass(frozen=True)
class Genetic:
  """The best half lives on; its mutations and crossings join it.

  As Quamba2 finds its mixed precision (arXiv:2503.22879).

  Attributes:
    population: points of the first round.
    rounds: after it; None for as many as the budget allows.
    mutations: that join in a round.
    crossings: that join in a round.
  """

  population: int = 40
  rounds: int | None = None
  mutations: int = 10
  crossings: int = 10

  @property
  def evaluations(self) -> int | None:
    """At most, where the rounds are given."""
    if self.rounds is None:
      return None
    return self.population + self.rounds * (self.mutations + self.crossings)

  def proposals(
    self, space: Space, rng: np.random.Generator, judge: Judge
  ) -> Proposals:
    """Yields the first population, and then the children of every round."""
    people = [space.draw(rng) for _ in range(self.population)]
    values = np.asarray((yield people))
    endless = self.rounds is None
    for _ in itertools.count() if endless else range(self.rounds):
      order = np.argsort(judge(values), kind="stable")
      # A population of one is its own best half.
      order = order[: max(self.population // 2, 1)]
      parents, values = [people[at] for at in order], values[order]
      picked = rng.integers(
        len(parents), size=self.mutations + 2 * self.crossings
      )
      picked = [parents[at] for at in picked]
      children = [space.mutated(one, rng) for one in picked[: self.mutations]]
      rest = picked[self.mutations :]
      pairs = zip(rest[::2], rest[1::2])
      children += [space.crossed(*pair, rng) for pair in pairs]
      people = [*parents, *children]
      values = np.concatenate([values, (yield children)])


@dataclasses.dataclass(frozen=True)
class Regularised:
  """Evolution in which the oldest die (Real et al. 2019, arXiv:1802.01548).

  The best of a few members has a mutated child, or one crossed with the second
  best; the child joins and the oldest member leaves. Of several objectives
  every such choice has one aim of the preference's fan, at random.

  Attributes:
    population: members.
    sample: members that compete to be a parent.
    crossing: probability of a second parent.
    batch: children at a time, for evaluations that run side by side.
  """

  population: int = 24
  sample: int = 12
  crossing: float = 0.25
  batch: int = 1

  def proposals(
    self, space: Space, rng: np.random.Generator, judge: Judge
  ) -> Proposals:
    """Yields the first population, and then children without end."""
    people = [space.draw(rng) for _ in range(self.population)]
    values = yield people
    alive = collections.deque(zip(people, values), maxlen=self.population)
    while True:
      children = [self._child(space, rng, judge, alive)
                  for _ in range(self.batch)]  # fmt: skip
      values = yield children
      alive.extend(zip(children, values))

  def _child(self, space, rng, judge, alive) -> Genome:
    size = min(self.sample, len(alive))
    picked = rng.choice(len(alive), size, replace=False)
    values = np.asarray([alive[at][1] for at in picked])
    aims = judge.preference.fan(values.shape[1])
    aim = aims[int(rng.integers(len(aims)))]
    order = np.argsort(judge(values, by=aim), kind="stable")
    first, *rest = [alive[picked[at]][0] for at in order]
    if rest and rng.random() < self.crossing:
      # A child of equal parents is equal to them, and is mutated instead.
      child = space.crossed(first, rest[0], rng)
      return child if child != first else space.mutated(first, rng)
    return space.mutated(first, rng)


@dataclasses.dataclass(frozen=True)
class Reinforce:
  """A policy of independent decisions by REINFORCE, one for each aim.

  Logits of each decision's values are moved along the gradient of the log
  probability, times how much a point is better than the mean of before; Adam
  takes the steps. Of several objectives each aim of the preference's fan has a
  policy, and they take turns.

  Attributes:
    batch: points that a policy draws a step.
    learning_rate: of Adam.
    momentum: of the mean that a point is compared with.
    entropy: weight of the policy's entropy, against settling too soon.
  """

  batch: int = 4
  learning_rate: float = 0.3
  momentum: float = 0.9
  entropy: float = 0.02

  def proposals(
    self, space: Space, rng: np.random.Generator, judge: Judge
  ) -> Proposals:
    """Yields points without end.

    Raises:
      InputError: the space is none of decisions.
    """
    if not isinstance(space, Product):
      raise InputError("reinforce: needs a space of decisions: take another")
    values = yield [space.draw(rng) for _ in range(self.batch)]
    aims = judge.preference.fan(np.shape(values)[1])
    policies = [_Policy(self, space) for _ in aims]
    for aim, policy in itertools.cycle(zip(aims, policies)):
      points = policy.draw(rng)
      values = yield points
      policy.learn(points, judge(values, by=aim))


class _Policy:
  """Logits (D, K) of D decisions among at most K values, and Adam's means."""

  def __init__(self, how: Reinforce, space: Product):
    self._how, self._space = how, space
    sizes = np.asarray(space.sizes)[:, None]
    self._there = np.arange(max(space.sizes)) < sizes
    self._logits = np.zeros(self._there.shape)
    self._first, self._second = (np.zeros(self._there.shape) for _ in "12")
    self._steps, self._mean = 0, None

  def _probabilities(self) -> np.ndarray:
    top = self._logits.max(1, keepdims=True)
    raised = np.where(self._there, np.exp(self._logits - top), 0)
    return raised / raised.sum(1, keepdims=True)

  def draw(self, rng: np.random.Generator) -> list[Genome]:
    """Points; one that is not feasible is drawn again, at last anywhere."""
    sums = self._probabilities().cumsum(1)

    def once() -> Genome:
      u = rng.random(len(sums))
      places = (sums < u[:, None] * sums[:, -1:]).sum(1)
      return tuple(map(int, places))

    anywhere = lambda: self._space.draw(rng)
    return [
      self._space.first_feasible(once, otherwise=anywhere, tries=100)
      for _ in range(self._how.batch)
    ]

  def learn(self, points: list[Genome], scores: np.ndarray) -> None:
    how, chance = self._how, self._probabilities()
    scores = np.where(np.isfinite(scores), scores, 2.0)
    before = self._mean if self._mean is not None else scores.mean()
    self._mean = how.momentum * before + (1 - how.momentum) * scores.mean()
    taken = np.zeros((len(points), *chance.shape))
    at = np.asarray(points)
    rows = np.arange(len(points))[:, None]
    taken[rows, np.arange(at.shape[1]), at] = 1
    gains = (before - scores)[:, None, None]
    gradient = (gains * (taken - chance)).mean(0)
    logs = np.log(np.maximum(chance, 1e-12))
    spread = -(chance * logs).sum(1, keepdims=True)
    gradient -= how.entropy * chance * (logs + spread)
    self._steps += 1
    self._first = 0.9 * self._first + 0.1 * gradient
    self._second = 0.99 * self._second + 0.01 * gradient**2
    first = self._first / (1 - 0.9**self._steps)
    second = self._second / (1 - 0.99**self._steps)
    self._logits += how.learning_rate * first / (np.sqrt(second) + 1e-8)


Method = Exhaustive | Random | Genetic | Regularised | Reinforce
METHODS: dict[str, type] = {
  "exhaustive": Exhaustive,
  "random": Random,
  "genetic": Genetic,
  "regularised": Regularised,
  "reinforce": Reinforce,
}


def named(name: str, **options: Any) -> Method:
  """A method by its name.

  Raises:
    InputError: there is none of this name, or it has no such option.
  """
  if name not in METHODS:
    raise InputError(
      f"method {name!r} is unknown: take one of {', '.join(METHODS)}"
    )
  known = {field.name for field in dataclasses.fields(METHODS[name])}
  for option in options.keys() - known:
    raise InputError(f"{option}: {name} has no such option")
  return METHODS[name](**options)
