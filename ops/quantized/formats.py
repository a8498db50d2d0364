"""The table of number formats. A further format is a row of it.

A value x of a format is kept as a code c, and each block of values has a scale
s and, where the format is asymmetric, a zero point z:

  x ~ (level(c) - z) s

A level is a point of an integer grid, of a float type, or of a codebook; the
last code of some codebooks stands for another level in each block. No code
outside of this file asks for a format by name. A row that stands is never
changed, since files name it; a better one gets a name of its own.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ops.quantized import codebooks

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
    fitted: How each tensor finds a codebook of its own, a name of
      `ops.quantized.fitting.FITS`; `codebook` is then where it begins. Levels
      are shares of a block's largest magnitude. None where all have the same.
    specials: Levels of which each block has one more than the codebook, the one
      that fits its values best; the code behind the codebook's stands for it.
    symmetric: Whether there are no zero points. An integer grid then leaves out
      its lowest number, so that it is symmetric too.
    group: Values that share a scale: "tensor" for all, "row" for all along the
      axis that a product sums over, or how many neighbours along that axis.
    scale_dtype: Of the scales. Those of float8_e8m0fnu are powers of two by the
      rule of Open Compute's MX formats: 2^(floor(log2 m) - floor(log2 top)),
      with m the block's largest magnitude and top the largest level's.
    scale_format: Name of the format that scales are kept in, where there is a
      second level; its blocks lie along the same axis.
    packed: Whether codes lie bit by bit, the first in the lowest bits, in as
      few bytes as their bits fill: two of 4 bits in one, four of 6 in three.
  """

  name: str
  bits: int
  dtype: str
  codebook: tuple[float, ...] | None = None
  fitted: str | None = None
  specials: tuple[float, ...] = ()
  symmetric: bool = True
  group: Granularity = "row"
  scale_dtype: str = "float32"
  scale_format: str | None = None
  packed: bool = False

  def __str__(self) -> str:
    """Returns what `get` makes this format of."""
    return f"{self.name}:{self.group}"

  @property
  def is_signed(self) -> bool:
    """Whether levels are of both signs: for values, not for scales."""
    return bool(self.levels[0] < 0)

  @property
  def keeps_rows_apart(self) -> bool:
    """Whether no scale, of either level, belongs to more than one row."""
    second = None if self.scale_format is None else get(self.scale_format)
    apart = second is None or second.keeps_rows_apart
    return self.group != "tensor" and apart

  @property
  def is_integer(self) -> bool:
    """Whether levels are whole numbers of a grid."""
    return self.codebook is None and jnp.issubdtype(self.dtype, jnp.integer)

  @property
  def choices(self) -> "Format | None":
    """The format of the indices of blocks' special levels, or None."""
    if not self.specials:
      return None
    bits = max(len(self.specials) - 1, 1).bit_length()
    return Format(name="choices", bits=bits, dtype="uint8", packed=True)

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
    """The levels that all blocks have, ascending, float64."""
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


# What formats of few bits share: blocks of 128 with scales of two bytes.
_INT = {"dtype": "int8", "group": 128, "packed": True}
_FEW = {"scale_dtype": "bfloat16", **_INT}
_BOOK = {**_FEW, "dtype": "uint8"}
_MX = {"group": 32, "scale_dtype": "float8_e8m0fnu", "packed": True}
_NV = {"bits": 4, "dtype": "uint8", "group": 16, "packed": True}
_FP3 = {"bits": 3, "codebook": codebooks.FP3, **_BOOK}
_FP4 = {"bits": 4, "codebook": codebooks.FP4, **_BOOK}

_ROWS = (
  Format(name="int8", bits=8, dtype="int8"),
  Format(name="int6", bits=6, dtype="int8", packed=True),
  Format(name="int4", bits=4, **_INT),
  Format(name="fp8_e4m3", bits=8, dtype="float8_e4m3fn"),
  # Integers with zero points, and of 3 bits.
  Format(name="int4_asym", bits=4, symmetric=False, **_FEW),
  Format(name="int3", bits=3, **_FEW),
  Format(name="int3_asym", bits=3, symmetric=False, **_FEW),
  # Quantiles of a normal and of a t distribution (SF4).
  Format(name="nf4", bits=4, codebook=codebooks.NF4, **_BOOK),
  Format(name="sf4", bits=4, codebook=codebooks.SF4, **_BOOK),
  Format(name="nf3", bits=3, codebook=codebooks.NF3, **_BOOK),
  Format(name="sf3", bits=3, codebook=codebooks.SF3, **_BOOK),
  # What is best for the largest magnitudes of blocks of 64 normal numbers, and
  # codebooks that each tensor fits.
  Format(name="af4", bits=4, codebook=codebooks.AF4, **(_BOOK | {"group": 64})),
  *(
    Format(
      name=name.format(bits), bits=bits, codebook=book, fitted=how, **_BOOK
    )
    for name, how in (("sf{}_fit", "student_t"), ("lloyd{}", "lloyd_max"))
    for bits, book in ((4, codebooks.NF4), (3, codebooks.NF3))
  ),
  # Small floats, and sums of powers of two.
  Format(name="fp4", **_FP4),
  Format(name="fp4_sr", bits=4, codebook=codebooks.FP4_SUPER_RANGE, **_BOOK),
  Format(
    name="fp4_sp", bits=4, codebook=codebooks.FP4_SUPER_PRECISION, **_BOOK
  ),
  Format(name="fp4_e3m0", bits=4, codebook=codebooks.E3M0, **_BOOK),
  Format(name="fp3", **_FP3),
  Format(name="apot4", bits=4, codebook=codebooks.APOT4, **_BOOK),
  Format(
    name="apot4_sp", bits=4, codebook=codebooks.APOT4_SUPER_PRECISION, **_BOOK
  ),
  # BitMoD: the second zero is one of four levels, scales are integers of 8
  # bits of a scale a row. Extra resolution and asymmetry are halves of it.
  Format(name="fp4_er", specials=(5.0, -5.0), **_FP4),
  Format(name="fp4_ea", specials=(8.0, -8.0), **_FP4),
  Format(
    name="bitmod4", specials=(5.0, -5.0, 8.0, -8.0), scale_format="int8", **_FP4
  ),
  Format(name="fp3_er", specials=(3.0, -3.0), **_FP3),
  Format(name="fp3_ea", specials=(6.0, -6.0), **_FP3),
  Format(
    name="bitmod3", specials=(3.0, -3.0, 6.0, -6.0), scale_format="int8", **_FP3
  ),
  # Open Compute's MX, NVFP4, and RaZeR on top of the latter: its scales of 6
  # and 7 bits leave room in a byte for the choice of the level.
  Format(name="mxint4", bits=4, dtype="int8", **_MX),
  Format(name="mxfp4", bits=4, dtype="uint8", codebook=codebooks.FP4, **_MX),
  Format(
    name="nvfp4", codebook=codebooks.FP4, scale_format="fp8_e4m3:tensor", **_NV
  ),
  Format(
    name="razer4",
    codebook=codebooks.FP4,
    specials=(5.0, -5.0, 8.0, -8.0),
    scale_format="ufp6_e3m3:tensor",
    **_NV,
  ),
  Format(
    name="razer4_inputs",
    codebook=codebooks.FP4,
    specials=(5.0, -5.0),
    scale_format="ufp7_e4m3:tensor",
    **_NV,
  ),
  # The same with second-level scales a row, for inputs and caches: tokens do
  # not share one there, since a token must not depend on those behind it.
  Format(
    name="nvfp4_token",
    codebook=codebooks.FP4,
    scale_format="fp8_e4m3",
    **_NV,
  ),
  Format(
    name="razer4_token",
    codebook=codebooks.FP4,
    specials=(5.0, -5.0),
    scale_format="ufp7_e4m3",
    **_NV,
  ),
  # Scales are not negative, so these formats of them have no sign.
  Format(
    name="ufp6_e3m3",
    bits=6,
    dtype="uint8",
    codebook=codebooks.E3M3,
    packed=True,
  ),
  Format(
    name="ufp7_e4m3",
    bits=7,
    dtype="uint8",
    codebook=codebooks.E4M3,
    packed=True,
  ),
)
FORMATS: Mapping[str, Format] = types.MappingProxyType(
  {row.name: row for row in _ROWS}
)
# Rows whose levels are of both signs, for values; the others are for scales.
SIGNED = tuple(name for name, row in FORMATS.items() if row.is_signed)


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
