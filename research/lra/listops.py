"""ListOps: nested operations on digits, drawn as the benchmark draws them.

An expression is a digit, or in one of four cases an operation (minimum,
maximum, median, sum modulo 10) on 2 to 10 expressions; at depth 10 it is a
digit (Nangia and Bowman 2018; github.com/google-research/long-range-arena,
data/listops.py). Those of 501 to 1,999 tokens are kept. Here all expressions of
a batch are drawn level by level, by NumPy.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from models.errors import InputError, shown

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = "]"
# Id 0 is padding.
VOCABULARY = (*map(str, range(10)), *OPERATORS, CLOSE)
_IDS = {word: number for number, word in enumerate(VOCABULARY, 1)}
# Files that the benchmark's script writes have X in place of ].
_IDS["X"] = _IDS[CLOSE]
_FIRST_OPERATOR = 10
_OPERATION_SHARE = 0.25
_MOST_VALUE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """What expressions are kept.

  Attributes:
    shorter_than: tokens.
    longer_than: tokens.
    max_depth: levels, the root's included.
    max_args: most arguments of an operation.
  """

  shorter_than: int = 2000
  longer_than: int = 500
  max_depth: int = 10
  max_args: int = 10


def generate(
  count: int, seed: int, shape: Shape = Shape(), batch: int = 20_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws different expressions.

  Args:
    count: N.
    seed: of the draw.
    shape: of the expressions.
    batch: drawn at a time, kept or not.

  Returns:
    Tokens (N, L) uint8 padded by 0 to the most tokens, lengths (N,) int32, and
    values (N,) uint8.

  Raises:
    InputError: there are hardly any such expressions.
  """
  generator = np.random.default_rng(seed)
  seen: set[bytes] = set()
  found, left, fruitless = [], count, 0
  while left:
    trees = _without(_draw(generator, batch, shape), shape)
    tokens, lengths, values = _written(trees, shape.shorter_than - 1)
    new = []
    for place, row in enumerate(tokens):
      text = row[: lengths[place]].tobytes()
      if text not in seen:
        seen.add(text)
        new.append(place)
    new = new[:left]
    left -= len(new)
    fruitless = 0 if new else fruitless + 1
    if fruitless == 20:
      raise InputError(
        f"found {count - left} of {count} different expressions of "
        f"{shape.longer_than + 1} to {shape.shorter_than - 1} tokens: ask for "
        "fewer, or for longer ones"
      )
    found.append((tokens[new], lengths[new], values[new]))
  return tuple(np.concatenate(parts) for parts in zip(*found))


@dataclasses.dataclass(frozen=True)
class _Level:
  """Expressions of one depth, those of one parent beside each other.

  Attributes:
    tree: which one each belongs to, rising.
    value: of digits.
    operator: of operations, else -1.
    arguments: of operations, else 0.
  """

  tree: np.ndarray
  value: np.ndarray
  operator: np.ndarray
  arguments: np.ndarray

  def of(self, trees: np.ndarray) -> "_Level":
    """Those of the trees of a mask, numbered anew."""
    kept = trees[self.tree]
    number = np.cumsum(trees) - 1
    return _Level(
      number[self.tree[kept]],
      self.value[kept],
      self.operator[kept],
      self.arguments[kept],
    )


def _draw(generator, batch: int, shape: Shape) -> list[_Level]:
  levels, tree = [], np.arange(batch)
  for depth in range(1, shape.max_depth + 1):
    size = len(tree)
    share = _OPERATION_SHARE if depth < shape.max_depth else 0.0
    operates = generator.random(size) < share
    operator = generator.integers(len(OPERATORS), size=size)
    arguments = generator.integers(2, shape.max_args + 1, size=size)
    arguments = np.where(operates, arguments, 0)
    levels.append(
      _Level(
        tree,
        generator.integers(_MOST_VALUE, size=size),
        np.where(operates, operator, -1),
        arguments,
      )
    )
    tree = np.repeat(tree, arguments)
  return levels


def _without(levels: list[_Level], shape: Shape) -> list[_Level]:
  """Leaves out trees that are too short or too long."""
  tokens = np.zeros(len(levels[0].tree), int)
  for level in levels:
    tokens += np.bincount(
      level.tree, 1.0 + (level.arguments > 0), len(tokens)
    ).astype(int)
  kept = (tokens > shape.longer_than) & (tokens < shape.shorter_than)
  return [level.of(kept) for level in levels]


def _written(levels: list[_Level], length: int):
  """Tokens, lengths and values of the trees."""
  sizes, values = _evaluated(levels)
  count = len(levels[0].tree)
  tokens = np.zeros((count, length), np.uint8)
  start = np.zeros(count, int)
  for depth, level in enumerate(levels):
    size, inner = sizes[depth], level.arguments > 0
    word = np.where(inner, _FIRST_OPERATOR + level.operator, level.value) + 1
    tokens[level.tree, start] = word
    end = start + size - 1
    tokens[level.tree[inner], end[inner]] = _IDS[CLOSE]
    if not inner.any():
      break
    child = sizes[depth + 1]
    before = np.cumsum(child) - child
    first = np.cumsum(level.arguments) - level.arguments
    # A child begins behind its siblings: `before` sums sizes in front of it,
    # `own` those in front of its first sibling.
    base = np.where(inner, before[np.minimum(first, len(child) - 1)], 0)
    own = np.repeat(base, level.arguments)
    start = np.repeat(start + 1, level.arguments) + before - own
  return tokens, sizes[0].astype(np.int32), values[0].astype(np.uint8)


def _evaluated(levels: list[_Level]):
  """Tokens and value of every expression, level by level."""
  sizes, values = [], []
  size = value = np.zeros(0, int)
  for level in reversed(levels):
    inner = level.arguments > 0
    new_size, new_value = np.ones(len(inner), int), level.value.copy()
    if inner.any():
      count = level.arguments[inner]
      first = np.cumsum(count) - count
      new_size[inner] = 2 + np.add.reduceat(size, first)
      new_value[inner] = _apply(level.operator[inner], value, first, count)
    size, value = new_size, new_value
    sizes.append(size)
    values.append(value)
  return sizes[::-1], values[::-1]


def _apply(operator, value, first, count):
  """Values of operations on `count` values from `first` on."""
  width = int(count.max())
  place = np.arange(width)[None]
  there = place < count[:, None]
  own = value[np.minimum(first[:, None] + place, len(value) - 1)]
  ranked = np.sort(np.where(there, own, _MOST_VALUE), axis=1)
  row = np.arange(len(count))
  low, high = (count - 1) // 2, count // 2
  each = [
    ranked[:, 0],
    ranked[row, count - 1],
    # The benchmark cuts the mean of the middle two off.
    (ranked[row, low] + ranked[row, high]) // 2,
    np.where(there, own, 0).sum(1) % 10,
  ]
  return np.choose(operator, each)


def encode(text: str, where: str = "") -> np.ndarray:
  """The tokens of an expression, whose round parentheses are left out.

  Raises:
    InputError: a word is none of ListOps.
  """
  words = text.replace("(", " ").replace(")", " ").split()
  try:
    found = np.array([_IDS[word] for word in words], np.uint8)
  except KeyError as error:
    raise InputError(
      f"{where}: {shown(error.args[0])} is no word of ListOps: give a file of "
      "the task listops"
    ) from error
  if np.isin(found, [_IDS[word] for word in OPERATORS]).sum() != np.sum(
    found == _IDS[CLOSE]
  ):
    raise InputError(
      f"{where}: an expression has brackets that open and do not close: early "
      "files of the benchmark had lost them; make them anew"
    )
  return found


def decode(tokens: Sequence[int]) -> str:
  """The text of tokens before the padding."""
  return " ".join(VOCABULARY[token - 1] for token in tokens if token)
