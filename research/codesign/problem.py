"""What is searched: networks and engines, what they cost, and what fits."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.cost.accelerators import butterfly
from research.search import Genome, Product

Columns = Mapping[str, np.ndarray]

# The decisions of a network; the others are of the engine.
NETWORK = ("d_model", "ratio", "fourier_layers", "attention_layers")
HEADS = 2

# The study of co-design in the released scripts, on LRA's Text: 45 networks and
# four engines of 512 butterfly units. Its sequences have 4,000 bytes.
_PUBLISHED = {
  "d_model": (64, 128, 256, 512, 1024),
  "ratio": (1, 2, 3),
  "fourier_layers": (1, 2),
  "attention_layers": (0, 1),
  "p_be": (128, 64, 32, 16),
  "p_bu": (4, 8, 16, 32),
}
_LARGE = {
  "d_model": (32, 64, 128, 256, 512, 1024),
  "ratio": (1, 2, 3, 4),
  "fourier_layers": (0, 1, 2, 3, 4, 6),
  "attention_layers": (0, 1, 2),
  "p_be": (4, 8, 16, 20, 32, 40, 64, 96, 120, 128),
  "p_bu": (1, 2, 4, 8, 16, 32),
  "p_head": (0, 1, 2),
  "p_qk": (0, 16, 64, 256),
}
_CHOICES = {"published": _PUBLISHED, "large": _LARGE}
SPACES = tuple(_CHOICES)

# Objectives: less is better. Costs are compared by their logarithms, because
# they span orders of magnitude.
_LOGARITHMIC = ("latency_ms", "cycles", "dsp", "bram36", "parameters")
OBJECTIVES = ("error", *_LOGARITHMIC)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A space of networks and engines, and how they are costed.

  Attributes:
    name: one of `SPACES`.
    device: FPGA, one of `butterfly.DEVICES`.
    memory: one of `butterfly.MEMORIES`.
    length: tokens of a sequence.
    rules: one of `butterfly.RULES`.
    only: (decision, values) of the network or the engine, in the place of the
      space's; then the published space takes any number of units.
  """

  name: str = "published"
  device: str = "vcu128"
  memory: str = "even"
  length: int = 4000
  rules: str = "corrected"
  only: tuple[tuple[str, tuple[int, ...]], ...] = ()

  def space(self) -> Product:
    """The points, of which those that do not fit the device are left out.

    Raises:
      InputError: a name is unknown, or no engine fits.
    """
    check(self)
    choices = dict(_CHOICES[self.name])
    choices |= dict(self.only)
    space = Product(choices, self._feasible)
    if next(iter(space), None) is None:
      # The smallest engine is checked, because where it does not fit the error
      # says what the device lacks.
      pairs = itertools.product(choices["p_be"], choices["p_bu"])
      pairs = [pair for pair in pairs if self._has(*pair)]
      least = min(pairs, key=math.prod)
      engine = butterfly.Engine(*least, butterfly.MEMORIES[self.memory])
      network = butterfly.Network(2, 2, self.length)
      butterfly.check_fits(engine, network, butterfly.DEVICES[self.device])
      raise InputError(
        f"no network and engine of {self.name!r} fit {self.device}, of length "
        f"{self.length} and {dict(self.only)}"
      )
    return space

  def networks(self) -> list[dict[str, int]]:
    """Every network of the space, once."""
    space = self.space()
    found = dict.fromkeys(genome[: len(NETWORK)] for genome in space)
    return [
      {name: space.choices[name][at] for name, at in zip(NETWORK, genome)}
      for genome in found
    ]

  def costs(self, columns: Columns) -> dict[str, np.ndarray]:
    """Every cost of N points, a (N,) array each; without their error."""
    engine, network = self._parts(columns)
    count = butterfly.cycles(engine, network, butterfly.RULES[self.rules])
    found = butterfly.resources(engine, network)
    return {
      "latency_ms": butterfly.milliseconds(engine, count),
      "cycles": count,
      "dsp": found.dsp,
      "bram36": found.bram36,
      "parameters": parameters(columns),
    }

  def _parts(self, columns):
    attends = columns["attention_layers"] > 0
    if self.name == "published":
      # Beside the 2,048 multipliers of butterflies attention takes 256.
      costed = attends & butterfly.RULES[self.rules].attention
      p_head, p_qk = np.where(costed, HEADS, 0), np.full(attends.shape, 64)
    else:
      p_head, p_qk = columns["p_head"], columns["p_qk"]
    engine = butterfly.Engine(
      columns["p_be"],
      columns["p_bu"],
      butterfly.MEMORIES[self.memory],
      p_head=p_head,
      p_qk=p_qk,
      p_sv=p_qk,
      # As many scores as come of q k' in a cycle.
      p_softmax=np.maximum(p_qk * HEADS // columns["d_model"], 1),
    )
    network = butterfly.Network(
      hidden=columns["d_model"],
      ffn=columns["d_model"] * columns["ratio"],
      length=self.length,
      layers=columns["fourier_layers"],
      attention_layers=columns["attention_layers"],
      heads=HEADS,
    )
    return engine, network

  def _feasible(self, columns: Columns) -> np.ndarray:
    fourier, attends = columns["fourier_layers"], columns["attention_layers"]
    passed = fourier + attends > 0
    passed &= self._has(columns["p_be"], columns["p_bu"])
    if self.name == "published":
      passed &= fourier + attends <= 2
    else:
      # Attention has its engine, and where there is none it has no size.
      has = columns["p_head"] > 0
      passed &= has == (attends > 0)
      passed &= has == (columns["p_qk"] > 0)
    engine, network = self._parts(columns)
    device = butterfly.DEVICES[self.device]
    return passed & butterfly.fits(engine, network, device)

  def _has(self, p_be, p_bu):
    """Whether the space has an engine of these numbers."""
    free = {"p_be", "p_bu"}.isdisjoint(dict(self.only))
    if self.name == "published" and free:
      return p_be * p_bu == 512
    return np.full(np.shape(p_be), True)


def check(problem: Problem) -> None:
  """Raises InputError where a name is unknown, or the length cannot be used."""
  for what, name, known in (
    ("space", problem.name, SPACES),
    ("device", problem.device, butterfly.DEVICES),
    ("memory", problem.memory, butterfly.MEMORIES),
    ("rules", problem.rules, butterfly.RULES),
  ):
    if name not in known:
      raise InputError(
        f"{what} {name!r} is unknown: take one of {', '.join(known)}"
      )
  given, names = dict(problem.only), _CHOICES[problem.name]
  for name, values in given.items():
    if name not in names:
      raise InputError(
        f"{name}: {problem.name!r} has no such decision; it has "
        f"{', '.join(names)}"
      )
    for value in values:
      if not 0 <= value <= 1 << 16:
        raise InputError(f"{name}={value}: give integers from 0 to 65536")
  of = lambda name, least: np.asarray(given.get(name, least))
  widths = of("d_model", HEADS)
  butterfly.check(
    butterfly.Engine(of("p_be", 1), of("p_bu", 1)),
    butterfly.Network(
      hidden=widths,
      ffn=widths[..., None] * of("ratio", 1),
      length=problem.length,
      heads=HEADS,
    ),
  )


def only(words: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """(decision, values) from words such as "p_be=120" or "d_model=64:128".

  Raises:
    InputError: a word is none.
  """
  found = [re.fullmatch(r"(\w+)=(\d{1,9}(?::\d{1,9})*)", one) for one in words]
  if None in found:
    raise InputError(
      f"only {','.join(words)!r}: give decisions and integers, such as "
      "p_be=120,d_model=64:128"
    )
  return tuple((one[1], tuple(map(int, one[2].split(":")))) for one in found)


def objectives(names: Sequence[str]) -> tuple[str, ...]:
  """The names, each known and there once.

  Raises:
    InputError: one is unknown or twice there, or there are not 1 to 4.
  """
  for name in names:
    if name not in OBJECTIVES:
      raise InputError(
        f"objective {name!r} is unknown: take some of {', '.join(OBJECTIVES)}"
      )
  if not 1 <= len(set(names)) == len(names) <= 4:
    raise InputError(
      f"objectives {','.join(names)!r}: give one to four, each once"
    )
  return tuple(names)


def parameters(columns: Columns) -> np.ndarray:
  """Parameters (N,) of the blocks, embeddings and the head left out.

  A butterfly matrix has 2 n log2(n) for each stack of n outputs, n being its
  inputs padded to a power of two, and a bias; a block has two norms.
  """

  def matrix(inputs, outputs):
    bits = np.maximum(np.ceil(np.log2(inputs) - 1e-12), 1).astype(np.int64)
    n = np.int64(1) << bits
    return -(-outputs // n) * 2 * n * bits + outputs

  d, attends = columns["d_model"], columns["attention_layers"]
  ffn = matrix(d, d * columns["ratio"]) + matrix(d * columns["ratio"], d)
  blocks = columns["fourier_layers"] + attends
  return blocks * (ffn + 4 * d) + attends * 4 * matrix(d, d)


def evaluation(
  problem: Problem,
  names: Sequence[str],
  accuracies: Mapping[tuple[int, ...], float] | None,
) -> Callable[[list[Genome]], np.ndarray]:
  """What `research.search.run` takes: genomes -> values (N, M).

  Args:
    problem: to cost.
    names: M objectives; costs come out as logarithms to the base of 10.
    accuracies: by the values of `NETWORK`; a network without one has an
      infinite error. None where no error is asked for.

  Raises:
    InputError: an error is asked for, and there are no accuracies.
  """
  names, space = objectives(names), problem.space()
  if "error" in names and not accuracies:
    raise InputError(
      "the objective error needs accuracies: give --accuracies, or other "
      f"--objectives, some of {', '.join(_LOGARITHMIC)}"
    )

  def evaluate(genomes: list[Genome]) -> np.ndarray:
    columns = space.columns(genomes)
    found = problem.costs(columns)
    values = {name: np.log10(found[name]) for name in _LOGARITHMIC}
    if "error" in names:
      keys = zip(*(columns[name].tolist() for name in NETWORK))
      known = [accuracies.get(key, -np.inf) for key in keys]
      values["error"] = 1 - np.asarray(known)
    return np.stack([np.asarray(values[name]) for name in names], 1)

  return evaluate


def shown(name: str, value: Any) -> Any:
  """An objective's value as a user reads it; see `evaluation`."""
  if name not in _LOGARITHMIC:
    return float(value)
  raw = float(10**value)
  return raw if name == "latency_ms" else round(raw)
