"""Levels of a codebook of 16, looked up in registers of a Hopper GPU.

The bytes of a bfloat16 are looked up apart: `prmt` picks four bytes out of
eight by four selectors of 4 bits, which is how codes of 4 bits lie in memory.
Two of them, for codes below 8 and from 8, and a third that picks between both
by the codes' highest bits, give one byte of four levels. So eight levels take
22 instructions, whatever the codebook is, and shared memory has no part in it.

Where a block has a level of its own, the table's last entry is that of its
block: the table lies in registers anyway. Scales of small blocks multiply the
levels, where bfloat16 holds the products.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from ops.quantized.formats import Format, get

# Codes in 32 bits.
_CODES = 8
# Selectors that put four low and four high bytes side by side, by pairs.
_PAIRS = (0x5140, 0x7362)


def table_of(form: Format) -> tuple[int, ...]:
  """The bits of 16 levels in bfloat16 by the bits of their codes."""
  wide = np.zeros(16, np.float32)
  if form.codebook is None:
    # Integers in two's complement.
    wide[:] = [*range(8), *range(-8, 0)]
  else:
    wide[: len(form.codebook)] = form.codebook
  return tuple(wide.astype(jnp.bfloat16).view(np.uint16).tolist())


def is_exact(form: Format) -> bool:
  """Whether bfloat16 holds all levels of a format."""
  return _fits(np.asarray((*form.levels, *form.specials)))


def scales_are_exact(form: Format) -> bool:
  """Whether it holds all products of a level and a block's scale.

  That of a second level is not among them.
  """
  if form.scale_dtype == "float8_e8m0fnu":
    return is_exact(form)
  if form.scale_format is None:
    return False
  points = np.asarray((*form.levels, *form.specials))
  return _fits(np.outer(points, get(form.scale_format).levels))


def _fits(points: np.ndarray) -> bool:
  return bool(np.all(points.astype(jnp.bfloat16).astype(float) == points))


def plain(
  codes: jax.Array,
  table: tuple[int, ...],
  special: Sequence[jax.Array] = (),
  scales: Sequence[jax.Array] = (),
) -> jax.Array:
  """The same as `lookup` in plain JAX, for the interpreter."""
  levels = np.asarray(table, np.uint16).view(jnp.bfloat16).astype(float)
  index = codes.astype(jnp.int32) & 15
  # A kernel takes scalars from outside, and no arrays.
  found = jnp.zeros(codes.shape, jnp.bfloat16)
  for at, level in enumerate(levels.tolist()):
    own = jnp.bfloat16(level)
    if at == 15 and special:
      own = jnp.concatenate(list(special), axis=1)
    found = jnp.where(index == at, own, found)
  return found * jnp.concatenate(list(scales), axis=1) if scales else found


def lookup(
  codes: jax.Array,
  table: tuple[int, ...],
  special: Sequence[jax.Array] = (),
  scales: Sequence[jax.Array] = (),
) -> jax.Array:
  """Levels of codes, in a kernel.

  Args:
    codes: (TILE, K) int4 in the layout WGMMA, whose bits are indices.
    table: the bits of 16 levels in bfloat16.
    special: (TILE, K / n) bfloat16 each in the same layout, of n blocks side by
      side, alike along K: the levels of the last index; none for the table's.
    scales: alike, what levels are multiplied by; none for one.

  Returns:
    (TILE, K) bfloat16 in the same layout.
  """
  layout = plgpu.Layout.WGMMA

  @plgpu.inline_mgpu(
    arg_types=(layout,) * (1 + len(special) + len(scales)),
    return_type=plgpu.ShapeDtypeStruct(
      codes.shape, jnp.bfloat16, layout=layout
    ),
  )
  def run(_, codes, *beside):
    return _decoded(
      codes, table, beside[: len(special)], beside[len(special) :]
    )

  return run(codes, *special, *scales)


def _decoded(
  codes: FragmentedArray,
  table: tuple[int, ...],
  special: Sequence[FragmentedArray],
  scales: Sequence[FragmentedArray],
) -> FragmentedArray:
  """Registers of levels from registers of codes."""
  words: dict[Any, dict[int, Any]] = {}
  places = {}
  for at, register in np.ndenumerate(codes.registers):
    word, first, count = _word(register)
    places[at] = word, first, count
    # Codes of a half of a word have one block, the half of another may differ.
    own = words.setdefault(word, {})
    if special:
      own[2 * first // _CODES] = _of_block(special, codes, at)
  pairs = {
    word: _levels_of_word(_bits(word), table, own)
    for word, own in words.items()
  }
  found = np.empty_like(codes.registers)
  for at, (word, first, count) in places.items():
    value = _as_bfloat16(pairs[word][first // 2 : (first + count) // 2])
    if scales:
      value = arith.mulf(value, _of_block(scales, codes, at))
    found[at] = value
  return FragmentedArray(
    _registers=found, _layout=codes.layout, _is_signed=None
  )


def _of_block(
  blocks: Sequence[FragmentedArray], whole: FragmentedArray, at: tuple
) -> Any:
  """The register of a block that lies where one of the whole does.

  The second axis of registers counts eight columns each.
  """
  each = whole.registers.shape[1] // len(blocks)
  inner = (at[0], at[1] % each, *at[2:])
  return blocks[at[1] // each].registers[inner]


def _word(register: Any) -> tuple[Any, int, int]:
  """A vector that holds a register's codes, the first of them, and how many."""
  (count,) = ir.VectorType(register.type).shape
  slice_op = getattr(register.owner, "opview", None)
  if isinstance(slice_op, vector.ExtractStridedSliceOp):
    (size,) = ir.VectorType(slice_op.source.type).shape
    if size == _CODES:
      first = ir.IntegerAttr(slice_op.offsets[0]).value
      return slice_op.source, first, count
  return register, 0, count


def _bits(value: Any) -> Any:
  """A vector's bits in 32 of an integer, the first element in the lowest."""
  kind = ir.VectorType(value.type)
  element = kind.element_type
  size = 16 if isinstance(element, ir.BF16Type) else 4
  whole = ir.IntegerType.get_signless(size * kind.shape[0])
  one = vector.bitcast(ir.VectorType.get((1,), whole), value)
  found = vector.extract(
    one, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
  )
  if whole.width < 32:
    found = arith.extui(ir.IntegerType.get_signless(32), found)
  return found


def _constant(value: int) -> Any:
  word = ir.IntegerType.get_signless(32)
  signed = value - (1 << 32) if value >= 1 << 31 else value
  return arith.constant(word, ir.IntegerAttr.get(word, signed))


def _picked(low: Any, high: Any, selectors: Any) -> Any:
  """Bytes 0 to 3 of `low` and 4 to 7 of `high`, by four selectors."""
  word = ir.IntegerType.get_signless(32)
  return llvm.inline_asm(
    word, [low, high, selectors], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"
  )


def _levels_of_word(
  word: Any, table: tuple[int, ...], special: Mapping[int, Any]
) -> list[Any]:
  """Pairs of levels of the eight codes of a word, 32 bits each.

  Args:
    word: of 32 bits.
    table: the bits of 16 levels.
    special: by half of the word a register of the level of the last index.
  """
  index = arith.andi(word, _constant(0x77777777))
  upper = arith.shrui(arith.andi(word, _constant(0x88888888)), _constant(1))
  upper = arith.ori(upper, _constant(0x32103210))
  found = []
  for half in (0, 1):
    below, above = index, upper
    if half:
      below = arith.shrui(below, _constant(16))
      above = arith.shrui(above, _constant(16))
    planes = []
    for shift in (0, 8):
      parts = _parts_of_table(table, special.get(half), shift)
      planes.append(
        _picked(
          _picked(parts[0], parts[1], below),
          _picked(parts[2], parts[3], below),
          above,
        )
      )
    found += [_picked(*planes, _constant(pair)) for pair in _PAIRS]
  return found


def _parts_of_table(table, special, shift: int) -> list[Any]:
  """One byte of each of 16 levels, in four words."""
  own = [(bits >> shift) & 255 for bits in table]
  if special is not None:
    own[15] = 0
  parts = [
    _constant(sum(b << 8 * i for i, b in enumerate(own[at : at + 4])))
    for at in range(0, 16, 4)
  ]
  if special is not None:
    byte = arith.andi(_bits(special), _constant(255 << shift))
    byte = arith.shli(byte, _constant(24 - shift))
    parts[3] = arith.ori(parts[3], byte)
  return parts


def _as_bfloat16(pairs: list[Any]) -> Any:
  """A vector of bfloat16 of pairs of 32 bits."""
  word = ir.IntegerType.get_signless(32)
  whole = vector.from_elements(ir.VectorType.get((len(pairs),), word), pairs)
  return vector.bitcast(
    ir.VectorType.get((2 * len(pairs),), ir.BF16Type.get()), whole
  )
