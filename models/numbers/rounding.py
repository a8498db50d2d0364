"""Exact rounding of numbers to a few digits in any base.

Rounding starts from the shortest decimal string of a number, as it was written
by whoever measured it: 0.57 is 57 hundredths, not the binary fraction next to
it. All steps are exact; ties go to the even digit.
"""

import decimal
import fractions
import math
import numbers
from typing import Any

import numpy as np

from models.errors import InputError

# Wide enough for every float64 and for what users may pass as Decimal.
_CONTEXT = decimal.Context(
  prec=60, rounding=decimal.ROUND_HALF_EVEN, Emax=999999, Emin=-999999
)


def exact(value: Any) -> decimal.Decimal:
  """The decimal that a number was written as.

  Args:
    value: a number of Python or NumPy; a float32 counts as its own shortest
      string, not as that of the float64 next to it.

  Returns:
    A decimal, perhaps NaN or infinite.

  Raises:
    InputError: it is no real number.
  """
  if getattr(value, "shape", None) == () and hasattr(value, "item"):
    # NumPy's scalars, and arrays of no axes, also of JAX.
    array = np.asarray(value)
    value = array.item() if array.dtype.kind in "iub" else array[()]
  if isinstance(value, bool | np.bool_):
    raise InputError(f"target {value!r} is no number: give a float or None")
  if isinstance(value, numbers.Integral):
    return decimal.Decimal(int(value))
  if isinstance(value, decimal.Decimal):
    return value
  if isinstance(value, fractions.Fraction):
    value = float(value)
  if not isinstance(value, numbers.Real):
    raise InputError(f"target {value!r} is no number: give a float or None")
  return decimal.Decimal(str(value))


def scientific(
  value: decimal.Decimal, base: int, digits: int
) -> tuple[int, int]:
  """Rounds |value| to `digits` digits: mantissa * base^exponent.

  Args:
    value: finite.
    base: of the digits, at least 2.
    digits: of the mantissa, at least 1.

  Returns:
    `(mantissa, exponent)`, the mantissa in [base^(digits-1), base^digits), or
    (0, 0) for zero.
  """
  if not value:
    return 0, 0
  if base == 10:
    rounded = format(
      _CONTEXT.create_decimal(value).copy_abs(), f".{digits - 1}e"
    )
    mantissa, exponent = rounded.split("e")
    return int(mantissa.replace(".", "")), int(exponent) - digits + 1
  whole = abs(fractions.Fraction(value))
  exponent = _floor_log(whole, base) - digits + 1
  mantissa = round(whole * fractions.Fraction(base) ** -exponent)
  if mantissa == base**digits:
    return mantissa // base, exponent + 1
  return mantissa, exponent


def _floor_log(value: fractions.Fraction, base: int) -> int:
  """The largest e with base^e <= value, exactly."""
  log = math.log(value.numerator) - math.log(value.denominator)
  guess = math.floor(log / math.log(base))
  while fractions.Fraction(base) ** guess > value:
    guess -= 1
  while fractions.Fraction(base) ** (guess + 1) <= value:
    guess += 1
  return guess


def scaled(mantissa: np.ndarray, exponent: np.ndarray, base: int) -> np.ndarray:
  """mantissa * base^exponent in float64, each number correctly rounded.

  Args:
    mantissa: integers (...), any sign.
    exponent: integers (...).
    base: of the power.

  Returns:
    float64 (...); what no float64 can hold is infinite.
  """
  mantissa, exponent = np.broadcast_arrays(mantissa, exponent)
  values = np.empty(mantissa.shape, np.float64)
  for power in np.unique(exponent):
    at = exponent == power
    step = base ** abs(int(power))
    if step < 1 << 53 and np.abs(mantissa[at]).max() < 1 << 53:
      # Both operands are exact, so one operation rounds once.
      whole, factor = mantissa[at].astype(np.float64), float(step)
      values[at] = whole * factor if power >= 0 else whole / factor
      continue
    factor = fractions.Fraction(base) ** int(power)
    values[at] = [_to_float(int(m) * factor) for m in mantissa[at]]
  return values


def _to_float(value: fractions.Fraction) -> float:
  try:
    return float(value)
  except OverflowError:
    return math.inf if value > 0 else -math.inf


def digits_of(value: int, base: int, count: int) -> list[int]:
  """The `count` last digits of a non-negative integer, the highest first."""
  found = []
  for _ in range(count):
    value, digit = divmod(value, base)
    found.append(digit)
  return found[::-1]
