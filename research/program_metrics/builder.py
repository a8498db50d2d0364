"""A program under construction: its statements, values and inputs."""

import dataclasses
import math
import random
import re
from collections.abc import Callable, Sequence

from research.predictors.program_text import SHORT

FLOATS = ("float32", "bfloat16", "float16")
# Bytes of all inputs of a program together at most.
_MOST_BYTES = 1 << 23


class NoFit(Exception):
  """An operator finds no value that it could take, or would cost too much."""


@dataclasses.dataclass(frozen=True)
class Value:
  """A name in the source and the array that it stands for."""

  name: str
  shape: tuple[int, ...]
  dtype: str

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.shape)

  @property
  def ndim(self) -> int:
    """Axes."""
    return len(self.shape)

  @property
  def is_float(self) -> bool:
    """Whether the dtype is one of floats."""
    return self.dtype in FLOATS


class Draws:
  """Random choices that are the same on every machine and Python version.

  Of Python's generator only `random()` keeps its sequence for ever, so that
  everything is made of it.
  """

  def __init__(self, name: str):
    self._random = random.Random(name).random

  def uniform(self, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + (high - low) * self._random()

  def integer(self, low: int, high: int) -> int:
    """A whole number in [low, high]."""
    return low + int(self._random() * (high - low + 1))

  def log_uniform(self, low: float, high: float) -> float:
    """A number in [low, high) whose logarithm is uniform."""
    return math.exp(self.uniform(math.log(low), math.log(high)))

  def chance(self, share: float) -> bool:
    """True in this share of the calls."""
    return self._random() < share

  def choice[T](self, items: Sequence[T]) -> T:
    """One of some."""
    return items[int(self._random() * len(items))]

  def weighted[T](self, items: Sequence[T], weights: Sequence[float]) -> T:
    """One of some, as often as its weight says."""
    place = self._random() * sum(weights)
    for item, weight in zip(items, weights):
      place -= weight
      if place < 0:
        return item
    return items[-1]


class Builder:
  """Statements, inputs and values of a program.

  Args:
    draws: decides everything.
    dtype: of its floats.
    scale: elements of the larger arrays.
    budget: nanoseconds that it may last on one core, roughly estimated.
  """

  def __init__(self, draws: Draws, dtype: str, scale: float, budget: float):
    self.draws = draws
    self.dtype = dtype
    self.scale = scale
    self.lines: list[str] = []
    # Input -> upper bound of its integers, None for floats.
    self.inputs: dict[Value, int | None] = {}
    self.values: list[Value] = []
    self.used: set[str] = set()
    self._arrays: dict[str, Value] = {}
    self._left = budget
    self._count = 0

  def snapshot(self) -> tuple:
    """What `restore` takes back."""
    return (
      list(self.lines),
      dict(self.inputs),
      list(self.values),
      set(self.used),
      self._left,
      self._count,
    )

  def restore(self, state: tuple) -> None:
    """Undoes what was written after a snapshot."""
    (
      self.lines,
      self.inputs,
      self.values,
      self.used,
      self._left,
      self._count,
    ) = state

  def dim(self, most: float = 1024, least: int = 2) -> int:
    """The size of an axis: a power of two, a multiple of four, or any."""
    if most < least:
      raise NoFit
    size = self.draws.log_uniform(least, most + 1)
    kind = self.draws.uniform(0, 1)
    if kind < 0.55:
      size = 2 ** round(math.log2(size))
    elif kind < 0.8 and size > 4:
      size = 4 * round(size / 4)
    return min(max(int(size), least), int(most))

  def shape(self, ndim: int) -> tuple[int, ...]:
    """A shape of about `scale` elements."""
    total = self.scale / self.draws.log_uniform(1, 4)
    parts = [self.draws.uniform(0.4, 1) for _ in range(ndim)]
    dims = []
    for part in parts:
      size = total ** (part / sum(parts))
      dims.append(self.dim(max(1.15 * size, 2), max(int(0.85 * size), 2)))
    return tuple(dims)

  def input(
    self,
    shape: Sequence[int],
    dtype: str | None = None,
    bound: int | None = None,
  ) -> Value:
    """A new argument; `bound` is that of integers.

    Raises:
      NoFit: the arguments would be too large.
    """
    name = f"a{len(self.inputs) + 1}"
    value = Value(name, tuple(shape), dtype or self.dtype)
    width = lambda v: 2 if v.dtype in ("bfloat16", "float16") else 4
    total = sum(v.size * width(v) for v in [*self.inputs, value])
    if total > _MOST_BYTES:
      raise NoFit
    self.inputs[value] = bound
    self._arrays[name] = value
    return value

  def find(self, fits: Callable[[Value], bool]) -> Value | None:
    """A value that fits, rather a late one or one that nothing took yet."""
    found = [value for value in self.values if fits(value)]
    if not found:
      return None
    weights = [
      (1 + place) * (1 if value.name in self.used else 3)
      for place, value in enumerate(found)
    ]
    value = self.draws.weighted(found, weights)
    self.used.add(value.name)
    return value

  def take(
    self,
    *ndims: int,
    most: float = math.inf,
    fits: Callable[[Value], bool] = lambda value: True,
  ) -> Value:
    """A float value with one of these numbers of axes, any if none is given.

    Where there is none it is sometimes a new input.

    Raises:
      NoFit: there is none.
    """
    suits = lambda v: (
      v.is_float
      and v.ndim >= 1
      and (not ndims or v.ndim in ndims)
      and v.size <= most
      and fits(v)
    )
    found = self.find(suits)
    if found is not None:
      return found
    if self.values and not self.draws.chance(0.35):
      raise NoFit
    made = Value(
      "", self.shape(self.draws.choice(ndims or (1, 2, 3))), self.dtype
    )
    if not suits(made):
      raise NoFit
    return self.input(made.shape)

  def mate(self, value: Value, shape: Sequence[int] | None = None) -> Value:
    """Another value of the shape (and dtype), an input if there is none."""
    shape = value.shape if shape is None else tuple(shape)
    found = self.find(
      lambda v: (
        v.shape == shape and v.dtype == value.dtype and v.name != value.name
      )
    )
    return found or self.input(shape, value.dtype)

  def spend(self, nanoseconds: float) -> None:
    """Takes from the budget.

    Raises:
      NoFit: so much is not left.
    """
    self._left -= nanoseconds
    if self._left < 0:
      raise NoFit

  def line(self, text: str) -> None:
    """A line of the function's body, or some."""
    self.lines.append(text)

  def name(
    self, shape: Sequence[int] | None = None, dtype: str | None = None
  ) -> str:
    """A new name; the shape is told where `keep` will not tell it."""
    self._count += 1
    name = f"x{self._count}"
    self._arrays.pop(name, None)  # Of a statement that was undone.
    if shape is not None:
      self._arrays[name] = Value(name, tuple(shape), dtype or self.dtype)
    return name

  def typed_lines(self) -> list[str]:
    """The lines with a comment that has shape and dtype of each name."""
    return [
      "\n".join(self._typed(part) for part in line.split("\n"))
      for line in self.lines
    ]

  def _typed(self, line: str) -> str:
    names = dict.fromkeys(re.findall(r"\b[ax]\d+\b", line))
    notes = [
      f"{v.name} {SHORT[v.dtype]}[{','.join(map(str, v.shape))}]"
      for v in map(self._arrays.get, names)
      if v is not None
    ]
    return f"{line}  # {', '.join(notes)}" if notes else line

  def keep(
    self, name: str, shape: Sequence[int], dtype: str | None = None
  ) -> Value:
    """Says what array a written name stands for.

    Raises:
      NoFit: it is larger than the program's arrays should be.
    """
    value = Value(name, tuple(shape), dtype or self.dtype)
    if value.size > max(2 * self.scale, 64) or not value.size:
      raise NoFit
    self.values.append(value)
    self._arrays[name] = value
    return value

  def let(
    self,
    expression: str,
    shape: Sequence[int],
    dtype: str | None = None,
    cost: float = 0,
  ) -> Value:
    """A statement that gives an expression a name.

    Args:
      expression: Python.
      shape: of its array.
      dtype: likewise; None for the program's.
      cost: nanoseconds, roughly.

    Raises:
      NoFit: it costs or holds too much.
    """
    self.spend(cost)
    name = self.name()
    self.line(f"{name} = {expression}")
    return self.keep(name, shape, dtype)
