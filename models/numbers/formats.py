"""How one number is written in tokens: P10, IEEE-like, normalised.

The forms are those of the RegressLM release (Akhauri et al. 2025, section 3;
P10 is from Charton 2021, arXiv:2112.01898). Rounding is exact (`rounding`),
where the release truncates a product of floats.
"""

import abc
import dataclasses
import decimal
import functools
import math
from typing import Any

import numpy as np

from models.errors import InputError, shown
from models.numbers import rounding
from models.numbers.grammar import Builder, Grammar

INVALID = "INVALID"
# The names of tokens of special values, and what they mean.
_SPECIAL = {
  INVALID: INVALID,
  "NAN": math.nan,
  "INF": math.inf,
  "NINF": -math.inf,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat(abc.ABC):
  """Numbers as sequences of `length` tokens; ids count from 0.

  Attributes:
    special: also write NaN, both infinities and "INVALID" (a failed
      measurement): their token, repeated `length` times.
  """

  special: bool = False

  def __post_init__(self):
    """Checks the sizes; raises InputError."""
    for field in dataclasses.fields(self):
      low, high = field.metadata.get("range", (0, 1))
      value = getattr(self, field.name)
      if not isinstance(value, int) or not low <= value <= high:
        raise InputError(
          f"{type(self).__name__}: {field.name}={value!r} is not in "
          f"[{low}, {high}]"
        )

  @property
  @abc.abstractmethod
  def length(self) -> int:
    """Tokens of a number."""

  @functools.cached_property
  def tokens(self) -> tuple[str, ...]:
    """Names of the tokens, by id."""
    names = self._names() + (list(_SPECIAL) if self.special else [])
    return tuple(f"<{name}>" for name in names)

  @functools.cached_property
  def grammar(self) -> Grammar:
    """The machine of its valid sequences."""
    builder = Builder(len(self.tokens))
    self._add_grammar(builder)
    if self.special:
      for token in range(len(self._names()), len(self.tokens)):
        builder.chain(0, [[token]] * self.length, 0)
    return builder.build()

  def encode(self, value: Any) -> list[int]:
    """The ids of a number, rounded to the nearest one there is.

    Raises:
      InputError: it is no number, outside of the format's domain, or special
        where the format has no special values.
    """
    name = _special_name(value)
    if name is None:
      return self._encode(rounding.exact(value))
    if not self.special:
      raise InputError(
        f"target {value!r} is not finite: leave it out (None), or take a "
        "number format with special values"
      )
    return [self.tokens.index(f"<{name}>")] * self.length

  def decode(self, ids: np.ndarray) -> float | str:
    """The number of ids (length,); "INVALID" where they say so."""
    first = int(np.asarray(ids)[0])
    if first == self._first_special:
      return INVALID
    return float(self.values(np.asarray(ids)))

  def values(self, ids: np.ndarray) -> np.ndarray:
    """The numbers (...) of valid ids (..., length), float64; INVALID is NaN."""
    ids = np.asarray(ids, np.int64)
    first = self._first_special
    special = ids[..., 0] >= first
    plain = self._values(np.where(special[..., None], self._zero(), ids))
    means = np.array([math.nan, math.nan, math.inf, -math.inf])
    chosen = means[np.clip(ids[..., 0] - first, 0, len(means) - 1)]
    return np.where(special, chosen, plain)

  def widths(self, ids: np.ndarray) -> np.ndarray:
    """Distance (...) between the numbers of ids (..., length) and the next.

    A probability over it is a density. Zero takes the smallest step there is;
    special values have width 1, so that their density is a probability.
    """
    ids = np.asarray(ids, np.int64)
    special = ids[..., 0] >= self._first_special
    plain = self._widths(np.where(special[..., None], self._zero(), ids))
    return np.where(special, 1.0, plain)

  @functools.cached_property
  def zeros(self) -> np.ndarray:
    """All spellings of zero, (K, length); its probability is their sum."""
    return np.array(self._zeros(), np.int32)

  def lost(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of numbers (...) are too large for it, and which become zero."""
    sizes = np.abs(np.asarray(values, np.float64))
    largest, smallest = self._limits()
    finite = np.isfinite(sizes)
    return (
      finite & (sizes > largest),
      finite & (sizes > 0) & (sizes < smallest / 2),
    )

  def to_json(self) -> dict[str, Any]:
    """Kind and sizes, for `from_json`."""
    return {"kind": _KIND_NAMES[type(self)], **dataclasses.asdict(self)}

  @property
  def _first_special(self) -> int:
    return len(self._names())

  @abc.abstractmethod
  def _names(self) -> list[str]: ...

  @abc.abstractmethod
  def _add_grammar(self, builder: Builder) -> None: ...

  @abc.abstractmethod
  def _encode(self, value: decimal.Decimal) -> list[int]: ...

  @abc.abstractmethod
  def _values(self, ids: np.ndarray) -> np.ndarray: ...

  @abc.abstractmethod
  def _widths(self, ids: np.ndarray) -> np.ndarray: ...

  @abc.abstractmethod
  def _zeros(self) -> list[list[int]]: ...

  @abc.abstractmethod
  def _limits(self) -> tuple[float, float]:
    """The largest number, with what is rounded to it, and the smallest."""

  def _zero(self) -> np.ndarray:
    return np.asarray(self._encode(decimal.Decimal(0)))


def _special_name(value: Any) -> str | None:
  if isinstance(value, str):
    if value == INVALID:
      return INVALID
    raise InputError(f"target {value!r} is no number: give a float or None")
  number = rounding.exact(value)
  if number.is_nan():
    return "NAN"
  if number.is_infinite():
    return "INF" if number > 0 else "NINF"
  return None


def _size(default: int, low: int, high: int) -> Any:
  return dataclasses.field(default=default, metadata={"range": (low, high)})


def _number_of(digits: np.ndarray, base: int) -> np.ndarray:
  """Integers (...) of digits (..., n), the highest first."""
  value = np.zeros(digits.shape[:-1], np.int64)
  for place in range(digits.shape[-1]):
    value = value * base + digits[..., place]
  return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class P10(NumberFormat):
  """Sign, `digits` digits, one token for the power of ten.

  12345 with 4 digits is <+><1><2><3><4><E1>. Beyond the largest number the
  largest is taken, below the smallest that or zero, whichever is nearer.

  Attributes:
    digits: of the mantissa, an integer.
    exponent_range: powers are -exponent_range to exponent_range.
  """

  digits: int = _size(4, 1, 15)
  exponent_range: int = _size(10, 0, 300)

  @property
  def length(self) -> int:
    """Tokens of a number."""
    return 2 + self.digits

  def _names(self) -> list[str]:
    powers = range(-self.exponent_range, self.exponent_range + 1)
    return ["+", "-", *map(str, range(10)), *(f"E{power}" for power in powers)]

  def _power(self, exponent: int) -> int:
    return 12 + exponent + self.exponent_range

  def _add_grammar(self, builder: Builder) -> None:
    signed, zero, some = builder.state(), builder.state(), builder.state()
    digits, powers = list(range(2, 12)), range(2 * self.exponent_range + 1)
    builder.allow(0, [0, 1], signed)
    builder.allow(signed, digits[:1], zero)
    builder.allow(signed, digits[1:], some)
    left = self.digits - 1
    builder.chain(zero, [digits[:1]] * left + [[self._power(0)]], 0)
    builder.chain(some, [digits] * left + [[12 + p for p in powers]], 0)

  def _encode(self, value: decimal.Decimal) -> list[int]:
    mantissa, exponent = rounding.scientific(value, 10, self.digits)
    most = self.exponent_range
    if mantissa and exponent > most:
      mantissa, exponent = 10**self.digits - 1, most
    elif mantissa and exponent < -most:
      smallest = decimal.Decimal(1).scaleb(self.digits - 1 - most)
      nearer = abs(value) * 2 > smallest
      mantissa = 10 ** (self.digits - 1) if nearer else 0
      exponent = -most if nearer else 0
    digits = rounding.digits_of(mantissa, 10, self.digits)
    return [int(value < 0), *(2 + d for d in digits), self._power(exponent)]

  def _parts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mantissa = _number_of(ids[..., 1:-1] - 2, 10)
    return mantissa, ids[..., -1] - self._power(0)

  def _values(self, ids: np.ndarray) -> np.ndarray:
    mantissa, exponent = self._parts(ids)
    sign = 1 - 2 * ids[..., 0]
    return rounding.scaled(sign * mantissa, exponent, 10)

  def _widths(self, ids: np.ndarray) -> np.ndarray:
    mantissa, exponent = self._parts(ids)
    exponent = np.where(mantissa == 0, -self.exponent_range, exponent)
    return rounding.scaled(np.ones_like(exponent), exponent, 10)

  def _zeros(self) -> list[list[int]]:
    return [[sign, *[2] * self.digits, self._power(0)] for sign in (0, 1)]

  def _limits(self) -> tuple[float, float]:
    most = self.exponent_range
    halves = np.array([2 * 10**self.digits - 1, 2 * 10 ** (self.digits - 1)])
    largest, smallest = rounding.scaled(halves, np.array([most, -most]), 10) / 2
    return float(largest), float(smallest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ieee(NumberFormat):
  """Sign, sign and digits of the exponent, digits of the mantissa.

  12345 in base 10 with 1 and 4 digits is <+><+><4><1><2><3><4>: 1.234e4. What
  is too large becomes the largest number, what is too small the smallest or
  zero, whichever is nearer; a zero from underflow has exponent sign "-".

  Attributes:
    base: of both parts.
    exponent_digits: of the exponent.
    mantissa_digits: of the mantissa, whose first digit stands before the point.
  """

  base: int = _size(10, 2, 36)
  exponent_digits: int = _size(1, 1, 3)
  mantissa_digits: int = _size(4, 1, 15)

  @property
  def length(self) -> int:
    """Tokens of a number."""
    return 2 + self.exponent_digits + self.mantissa_digits

  def _names(self) -> list[str]:
    return ["+", "-", *map(str, range(self.base))]

  @property
  def _largest_exponent(self) -> int:
    return self.base**self.exponent_digits - 1

  def _add_grammar(self, builder: Builder) -> None:
    digits = list(range(2, 2 + self.base))
    signed, plus, minus = builder.state(), builder.state(), builder.state()
    builder.allow(0, [0, 1], signed)
    builder.allow(signed, [0], plus)
    builder.allow(signed, [1], minus)
    # Two tracks through the exponent: all of it zero so far, or not.
    some, zeros = None, {0: plus, 1: minus}
    for _ in range(self.exponent_digits):
      after, ends = builder.state(), {s: builder.state() for s in zeros}
      if some is not None:
        builder.allow(some, digits, after)
      for sign, state in zeros.items():
        builder.allow(state, digits[:1], ends[sign])
        builder.allow(state, digits[1:], after)
      some, zeros = after, ends
    left = self.mantissa_digits - 1
    builder.chain(some, [digits[1:]] + [digits] * left, 0)
    builder.chain(zeros[0], [digits[1:]] + [digits] * left, 0)
    for state in zeros.values():
      # The mantissa may be zero behind an exponent of zeros; behind "-" it may
      # be nothing else, because 10^-0 is written 10^+0.
      builder.chain(state, [digits[:1]] * (1 + left), 0)

  def _encode(self, value: decimal.Decimal) -> list[int]:
    base, places = self.base, self.mantissa_digits - 1
    mantissa, exponent = rounding.scientific(value, base, places + 1)
    exponent = exponent + places if mantissa else 0
    exponent_sign = int(exponent < 0)
    if exponent > self._largest_exponent:
      mantissa, exponent = base ** (places + 1) - 1, self._largest_exponent
    elif exponent < -self._largest_exponent:
      nearer = self._is_above_half(value)
      mantissa = base**places if nearer else 0
      exponent = -self._largest_exponent if nearer else 0
    digits = rounding.digits_of(abs(exponent), base, self.exponent_digits)
    digits += rounding.digits_of(mantissa, base, places + 1)
    return [int(value < 0), exponent_sign, *(2 + digit for digit in digits)]

  def _is_above_half(self, value: decimal.Decimal) -> bool:
    """Whether |value| is nearer to the smallest number than to zero."""
    with decimal.localcontext() as context:
      context.Emin, context.prec = decimal.MIN_EMIN, 2000
      smallest = decimal.Decimal(self.base) ** self._largest_exponent
      return abs(value) * smallest * 2 > 1

  def _parts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mantissa as an integer, and the power that belongs to it."""
    cut = 2 + self.exponent_digits
    exponent = _number_of(ids[..., 2:cut] - 2, self.base)
    exponent = exponent * (1 - 2 * ids[..., 1])
    mantissa = _number_of(ids[..., cut:] - 2, self.base)
    return mantissa, exponent - (self.mantissa_digits - 1)

  def _values(self, ids: np.ndarray) -> np.ndarray:
    mantissa, power = self._parts(ids)
    return rounding.scaled((1 - 2 * ids[..., 0]) * mantissa, power, self.base)

  def _widths(self, ids: np.ndarray) -> np.ndarray:
    mantissa, power = self._parts(ids)
    least = -self._largest_exponent - (self.mantissa_digits - 1)
    power = np.where(mantissa == 0, least, power)
    return rounding.scaled(np.ones_like(power), power, self.base)

  def _zeros(self) -> list[list[int]]:
    digits = [2] * (self.exponent_digits + self.mantissa_digits)
    return [[sign, power, *digits] for sign in (0, 1) for power in (0, 1)]

  def _limits(self) -> tuple[float, float]:
    most, places = self._largest_exponent, self.mantissa_digits - 1
    halves = np.array([2 * self.base ** (places + 1) - 1, 2])
    powers = np.array([most - places, -most])
    largest, smallest = rounding.scaled(halves, powers, self.base) / 2
    return float(largest), float(smallest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalized(NumberFormat):
  """Numbers in [0, 1] by the digits behind the point; 1 is the largest.

  Attributes:
    base: of the digits.
    digits: tokens of a number.
  """

  base: int = _size(10, 2, 1024)
  digits: int = _size(3, 1, 50)

  def __post_init__(self):
    """Checks the sizes; raises InputError."""
    super().__post_init__()
    if self.base**self.digits > 1 << 53:
      raise InputError(
        f"Normalized: base {self.base} with {self.digits} digits has more "
        "steps than a float64: take fewer digits"
      )

  @property
  def length(self) -> int:
    """Tokens of a number."""
    return self.digits

  def _names(self) -> list[str]:
    return list(map(str, range(self.base)))

  def _add_grammar(self, builder: Builder) -> None:
    builder.chain(0, [list(range(self.base))] * self.digits, 0)

  def _encode(self, value: decimal.Decimal) -> list[int]:
    if not 0 <= value <= 1:
      raise InputError(
        f"target {value} is not in [0, 1], which a normalised number needs: "
        "scale it, or take another number format"
      )
    steps = self.base**self.digits
    with decimal.localcontext() as context:
      context.prec = 800
      scaled = int((value * steps).to_integral_value(decimal.ROUND_HALF_EVEN))
    return rounding.digits_of(min(scaled, steps - 1), self.base, self.digits)

  def _values(self, ids: np.ndarray) -> np.ndarray:
    power = np.full(ids.shape[:-1], -self.digits)
    return rounding.scaled(_number_of(ids, self.base), power, self.base)

  def _widths(self, ids: np.ndarray) -> np.ndarray:
    return np.full(ids.shape[:-1], float(self.base) ** -self.digits)

  def _zeros(self) -> list[list[int]]:
    return [[0] * self.digits]

  def _limits(self) -> tuple[float, float]:
    return 1.0, 0.0  # What is small is rounded like all others.


_KINDS: dict[str, type[NumberFormat]] = {
  "p10": P10,
  "ieee": Ieee,
  "normalized": Normalized,
}
_KIND_NAMES = {kind: name for name, kind in _KINDS.items()}


def from_json(value: dict[str, Any]) -> NumberFormat:
  """The format that `NumberFormat.to_json` described.

  Raises:
    InputError: it describes none.
  """
  try:
    sizes = dict(value)
    return _KINDS[sizes.pop("kind")](**sizes)
  except (KeyError, TypeError) as error:
    raise InputError(f"number format {shown(value)} is unknown") from error
