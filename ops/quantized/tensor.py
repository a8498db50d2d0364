"""`QTensor`: an array of few bits that stands wherever a weight does."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from ops.quantized.formats import Format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QTensor:
  """Codes of a format with the scales of their blocks.

  It stands for the array x of shape (..., S, ...), S along `axis`, with

    x ~ (level(values) - zeros) scales

  In memory `axis` is the last one, whichever of x it is, since products read
  along it: a weight (D, F) of axis -2 is kept as (F, D), and `T` moves nothing.
  So `values`, `scales` and `zeros` have the other axes of x in order, and then
  the codes of S, or their G blocks of S / G neighbours; along the other axes
  the last two have one entry or x's size. `axis` counts from the end, and
  nothing static depends on leading axes: so `jax.vmap`, `jax.lax.scan` and
  indexing over stacked layers see an array a leaf. Transformations that change
  dtypes leaf by leaf break a QTensor.

  Attributes:
    values: (..., packed_size(S)), codes in the format's dtype, or
      packed in uint8, the first code in the lowest bits.
    scales: (..., G) in the format's scale_dtype, or a QTensor of that shape
      and axis -1 where the format has a second level.
    zeros: (..., G), whole numbers in the format's dtype, or None.
    choices: (..., packed G) uint8, which of the format's special levels a block
      has, packed as `Format.choices` says; None where it has none.
    book: (..., levels) float32, the tensor's own levels where the format is
      fitted, with one entry along axes that share them; else None.
    format: Row of the table.
    axis: Negative: the axis that products sum over, and blocks lie along.
    length: S.
    dtype: Of the array that it stands for.
  """

  values: jax.Array
  scales: "jax.Array | QTensor"
  zeros: jax.Array | None
  format: Format = dataclasses.field(metadata={"static": True})
  axis: int = dataclasses.field(metadata={"static": True})
  length: int = dataclasses.field(metadata={"static": True})
  dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
  choices: jax.Array | None = None
  book: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array that it stands for."""
    shape = list(self.values.shape[:-1])
    shape.insert(self.ndim + self.axis, self.length)
    return tuple(shape)

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.values.shape)

  @property
  def size(self) -> int:
    """Number of values."""
    return math.prod(self.shape)

  @property
  def num_blocks(self) -> int:
    """G."""
    return self.scales.shape[-1]

  @property
  def nbytes(self) -> int:
    """Bytes of codes, scales, zero points, choices and own levels."""
    return sum(
      math.prod(leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(self)
    )

  def check(self) -> None:
    """Checks codes, scales and zero points against each other.

    Raises:
      ValueError: the invariant does not hold, in one line.
    """
    form, others = self.format, self.values.shape[:-1]
    wanted = "uint8" if form.packed else form.dtype
    if self.values.dtype != wanted:
      raise ValueError(f"values are {self.values.dtype}, not {wanted}")
    if self.values.shape[-1] != form.packed_size(self.length):
      raise ValueError(
        f"values {self.values.shape} do not hold {self.length} codes"
      )
    if isinstance(self.scales, QTensor):
      self.scales.check()
    elif self.scales.dtype != form.scale_dtype:
      raise ValueError(
        f"scales are {self.scales.dtype}, not {form.scale_dtype}"
      )
    if (self.zeros is None) != form.symmetric:
      raise ValueError(f"zero points do not belong to {form}")
    for part in (self.scales, self.zeros):
      if part is None:
        continue
      *own, blocks = part.shape
      fits = len(own) == len(others) and blocks and not self.length % blocks
      if not fits or any(a not in (1, b) for a, b in zip(own, others)):
        raise ValueError(f"scales {part.shape} do not fit {self.shape}")
    if (self.book is None) != (form.fitted is None):
      raise ValueError(f"levels of its own do not belong to {form}")
    if form.fitted:
      wide = (*[1] * len(others), len(form.codebook))
      if len(self.book.shape) != len(wide) or any(
        a not in (b, c)
        for a, b, c in zip(self.book.shape, wide, (*others, wide[-1]))
      ):
        raise ValueError(f"levels {self.book.shape} do not fit {self.shape}")
    if (self.choices is None) != (not form.specials):
      raise ValueError(f"choices of levels do not belong to {form}")
    if form.specials:
      wanted = (
        *self.scales.shape[:-1],
        form.choices.packed_size(self.num_blocks),
      )
      if self.choices.shape != wanted or self.choices.dtype != "uint8":
        raise ValueError(
          f"choices {self.choices.dtype} {self.choices.shape} do not fit "
          f"{self.shape}"
        )

  @property
  def T(self) -> Self:
    """Its last two axes exchanged, of which one is `axis`."""
    if self.axis not in (-1, -2):
      raise ValueError(f"QTensor.T: axis is {self.axis}, not -1 or -2")
    return dataclasses.replace(self, axis=-3 - self.axis)

  def __getitem__(self, index: Any) -> Self:
    """Indexes axes other than `axis`, which stays whole.

    Args:
      index: What arrays take; behind `axis` slices alone, since it is counted
        from the end.

    Raises:
      IndexError: The index touches `axis` or removes an axis behind it.
    """
    index = expand_index(index, self.ndim)
    if any(
      not isinstance(one, slice) or (axis == 0 and one != slice(None))
      for axis, one in enumerate(index[self.axis :])
    ):
      raise IndexError(
        f"QTensor: {index} touches axis {self.axis} of {self.shape}"
      )

    # In the order of memory, where `axis` is the last one.
    index = list(index)
    index.append(index.pop(self.axis))

    def part(leaf):
      own = [
        _of_one(one) if size == 1 else one
        for one, size in zip(index[:-1], leaf.shape)
      ]
      return leaf[(*own, slice(None))]

    return dataclasses.replace(
      self,
      values=self.values[tuple(index)],
      scales=part(self.scales),
      zeros=None if self.zeros is None else part(self.zeros),
      choices=None if self.choices is None else part(self.choices),
      book=None if self.book is None else part(self.book),
    )


def expand_index(index: Any, ndim: int) -> tuple[Any, ...]:
  """One entry an axis; an Ellipsis and missing axes become whole slices.

  Raises:
    IndexError: There are more entries than axes.
  """
  index = index if isinstance(index, tuple) else (index,)
  before, after = index, ()
  for position, one in enumerate(index):
    if one is ...:
      before, after = index[:position], index[position + 1 :]
  missing = ndim - len(before) - len(after)
  if missing < 0:
    raise IndexError(f"QTensor: {index} has too many entries for {ndim} axes")
  return *before, *[slice(None)] * missing, *after


def _of_one(one: Any) -> Any:
  """The index of an axis of size 1 that stands for a whole axis."""
  return slice(None) if isinstance(one, slice) else one * 0
