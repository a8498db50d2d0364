"""Levels of a codebook of 16, looked up in registers of a Hopper GPU.

The bytes of a bfloat16 are looked up apart: `prmt` picks four bytes out of
eight by four selectors of 4 bits, which is how codes of 4 bits lie in memory.
Two of them, for codes below 8 and from 8, and a third that picks between both
by the codes' highest bits, give one byte of four levels. So eight levels take
22 instructions, whatever the codebook is, and shared memory has no part in it.

Where a block has a level of its own, the table's last entry is that of its
block: the table lies in registers anyway.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from ops.quantized.formats import Format

# Codes in 32 bits.
_CODES = 8
# Selectors that put four low and four high bytes side by side, by pairs.
_PAIRS = (0x5140, 0x7362)


def table_of(form: Format) -> tuple[int, ...] | None:
  """The bits of 16 levels in bfloat16; None where codes are levels."""
  if form.codebook is None:
    return None
  wide = np.zeros(16, np.float32)
  wide[: len(form.codebook)] = form.codebook
  return tuple(wide.astype(jnp.bfloat16).view(np.uint16).tolist())


def is_exact(form: Format) -> bool:
  """Whether bfloat16 holds all levels of a format."""
  points = np.asarray((*form.levels, *form.specials))
  return bool(np.all(points.astype(jnp.bfloat16).astype(float) == points))


def plain(
  codes: jax.Array, table: tuple[int, ...], special: jax.Array | None
) -> jax.Array:
  """The same as `lookup` in plain JAX, for the interpreter."""
  levels = np.asarray(table, np.uint16).view(jnp.bfloat16).astype(float)
  index = codes.astype(jnp.int32) & 15
  # A kernel takes scalars from outside, and no arrays.
  found = jnp.zeros(codes.shape, jnp.bfloat16)
  for at, level in enumerate(levels.tolist()):
    own = jnp.bfloat16(level) if at < 15 or special is None else special
    found = jnp.where(index == at, own, found)
  return found


def lookup(
  codes: jax.Array, table: tuple[int, ...], special: jax.Array | None
) -> jax.Array:
  """Levels of codes, in a kernel.

  Args:
    codes: (TILE, K) int4 in the layout WGMMA, whose bits are indices.
    table: the bits of 16 levels in bfloat16.
    special: (TILE, K) bfloat16 in the same layout, alike along K: the level of
      the last index; None for the table's.

  Returns:
    (TILE, K) bfloat16 in the same layout.
  """
  layout = plgpu.Layout.WGMMA
  given = (codes,) if special is None else (codes, special)

  @plgpu.inline_mgpu(
    arg_types=(layout,) * len(given),
    return_type=plgpu.ShapeDtypeStruct(
      codes.shape, jnp.bfloat16, layout=layout
    ),
  )
  def run(_, codes, *special):
    return _decoded(codes, table, *special)

  return run(*given)


def _decoded(
  codes: FragmentedArray,
  table: tuple[int, ...],
  special: FragmentedArray | None = None,
) -> FragmentedArray:
  """Registers of levels from registers of codes."""
  found, words = np.empty_like(codes.registers), {}
  for at, register in np.ndenumerate(codes.registers):
    word, first, count = _word(register)
    own = None if special is None else special.registers[at]
    # Registers that are parts of one word are looked up together. They lie in
    # one row, and so have one block.
    key = word if isinstance(word, int) else hash(word)
    if key not in words:
      words[key] = _levels_of_word(word, table, own)
    pairs = words[key][first // 2 : (first + count) // 2]
    found[at] = _as_bfloat16(pairs)
  return FragmentedArray(
    _registers=found, _layout=codes.layout, _is_signed=None
  )


def _word(register: Any) -> tuple[ir.Value, int, int]:
  """32 bits that hold a register's codes, the first of them, and how many."""
  (count,) = ir.VectorType(register.type).shape
  slice_op = getattr(register.owner, "opview", None)
  if isinstance(slice_op, vector.ExtractStridedSliceOp):
    (size,) = ir.VectorType(slice_op.source.type).shape
    if size == _CODES:
      first = ir.IntegerAttr(slice_op.offsets[0]).value
      return _bits(slice_op.source, 32), first, count
  whole = _bits(register, 4 * count)
  if count < _CODES:
    whole = arith.extui(ir.IntegerType.get_signless(32), whole)
  return whole, 0, count


def _bits(value: Any, size: int) -> Any:
  """A vector's bits as an integer of so many."""
  whole = ir.IntegerType.get_signless(size)
  one = vector.bitcast(ir.VectorType.get((1,), whole), value)
  return vector.extract(
    one, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
  )


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
  word: Any, table: tuple[int, ...], special: Any | None
) -> list[Any]:
  """Pairs of levels of the eight codes of a word, 32 bits each."""
  index = arith.andi(word, _constant(0x77777777))
  upper = arith.shrui(arith.andi(word, _constant(0x88888888)), _constant(1))
  upper = arith.ori(upper, _constant(0x32103210))
  planes = []
  for shift in (0, 8):
    parts = []
    for start in range(0, 16, 4):
      own = [(bits >> shift) & 255 for bits in table[start : start + 4]]
      if special is not None and start == 12:
        own[3] = 0
      parts.append(_constant(sum(b << 8 * i for i, b in enumerate(own))))
    if special is not None:
      level = _bits(special, 32)
      byte = arith.andi(level, _constant(255 << shift))
      byte = arith.shli(byte, _constant(24 - shift))
      parts[3] = arith.ori(parts[3], byte)
    planes.append(parts)
  found = []
  for half in (0, 16):
    below, above = index, upper
    if half:
      below = arith.shrui(below, _constant(half))
      above = arith.shrui(above, _constant(half))
    bytes_of = [
      _picked(
        _picked(parts[0], parts[1], below),
        _picked(parts[2], parts[3], below),
        above,
      )
      for parts in planes
    ]
    found += [_picked(*bytes_of, _constant(pair)) for pair in _PAIRS]
  return found


def _as_bfloat16(pairs: list[Any]) -> Any:
  """A vector of bfloat16 of pairs of 32 bits."""
  word = ir.IntegerType.get_signless(32)
  whole = vector.from_elements(ir.VectorType.get((len(pairs),), word), pairs)
  return vector.bitcast(
    ir.VectorType.get((2 * len(pairs),), ir.BF16Type.get()), whole
  )
