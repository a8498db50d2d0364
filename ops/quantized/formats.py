"""The table of number formats. A further format is a row of it.

A value x of a format is kept as a code c, and each block of values has a scale
s and, where the format is asymmetric, a zero point z:

  x ~ (level(c) - z) s

A level is a point of an integer grid, of a float type, or of a codebook. No
code outside of this file asks for a format by name. A row that stands is never
changed, since files name it; a better one gets a name of its own.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

Granularity = int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """How numbers are kept in few bits.

  Attributes:
    name: In the table.
    bits: Of a code.
    dtype: Of a code before it is packed: an integer or a float type of jax.
    codebook: Its levels, ascending, where codes are indices; else None, and a
      code is its own level.
    symmetric: Whether there are no zero points. An integer grid then leaves out
      its lowest number, so that it is symmetric too.
    group: Values that share a scale: "tensor" for all, "row" for all along the
      axis that a product sums over, or how many neighbours along that axis.
    scale_dtype: Of the scales.
    scale_format: Name of the format that scales are kept in, where there is a
      second level; its blocks lie along the same axis.
    packed: Whether codes lie bit by bit, the first in the lowest bits, in as
      few bytes as their bits fill: two of 4 bits in one, four of 6 in three.
  """

  name: str
  bits: int
  dtype: str
  codebook: tuple[float, ...] | None = None
  symmetric: bool = True
  group: Granularity = "row"
  scale_dtype: str = "float32"
  scale_format: str | None = None
  packed: bool = False

  def __str__(self) -> str:
    """Returns what `get` makes this format of."""
    return f"{self.name}:{self.group}"

  @property
  def is_integer(self) -> bool:
    """Whether levels are whole numbers of a grid."""
    return self.codebook is None and jnp.issubdtype(self.dtype, jnp.integer)

  @property
  def pack(self) -> tuple[int, int]:
    """How many codes fill how many elements of the values."""
    if not self.packed:
      return 1, 1
    whole = math.lcm(self.bits, 8)
    return whole // self.bits, whole // 8

  def packed_size(self, length: int) -> int:
    """Elements of the values that hold `length` codes."""
    codes, elements = self.pack
    return -(-length // codes) * elements

  @property
  def levels(self) -> np.ndarray:
    """All levels, ascending, float64."""
    return _levels(self)


@functools.cache
def _levels(form: Format) -> np.ndarray:
  if form.codebook is not None:
    return np.asarray(form.codebook, np.float64)
  if form.is_integer:
    half = 2 ** (form.bits - 1)
    return np.arange(-half + form.symmetric, half, dtype=np.float64)
  codes = np.arange(2**form.bits, dtype=np.uint8)
  values = codes.view(jnp.dtype(form.dtype)).astype(np.float64)
  return np.unique(values[np.isfinite(values)])


FORMATS: Mapping[str, Format] = types.MappingProxyType(
  {
    row.name: row
    for row in (
      Format(name="int8", bits=8, dtype="int8"),
      Format(name="int6", bits=6, dtype="int8", packed=True),
      Format(name="int4", bits=4, dtype="int8", group=128, packed=True),
      Format(name="fp8_e4m3", bits=8, dtype="float8_e4m3fn"),
    )
  }
)


def get(form: str | Format) -> Format:
  """Returns the format that a text names.

  Args:
    form: A name of the table, such as "int8", or with a granularity behind it:
      "int8:tensor", "int8:row", "int4:64". A `Format` is returned as it is.

  Raises:
    ValueError: There is no such format or granularity, in one line.
  """
  if isinstance(form, Format):
    return form
  name, colon, group = form.partition(":")
  if name not in FORMATS:
    raise ValueError(
      f"there is no number format {name!r}; there are {', '.join(FORMATS)}"
    )
  if not colon:
    return FORMATS[name]
  if group not in ("tensor", "row"):
    if not (group.isascii() and group.isdigit() and int(group)):
      raise ValueError(
        f"{form!r}: {group!r} is no granularity; it is tensor, row or the size"
        " of a group"
      )
    group = int(group)
  return dataclasses.replace(FORMATS[name], group=group)
