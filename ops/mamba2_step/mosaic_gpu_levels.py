"""Levels of 8 bits as the matrix unit takes them, and other short ways.

A sum over the levels of a state times float32 numbers needs no levels as
floats: a fixed-point number of 32 bits has four digits of 8 bits, and the
matrix unit multiplies levels by digits and adds up, exactly.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, vector

from ops import hopper_tiles
from ops.mamba2_step.mosaic_gpu_codes import constant, pick, word_type

# Channels of a state, and rows of its levels that a warp's matrix unit takes.
HEAD = 64
_ROWS = 16
# Columns that the matrix unit adds to a sum at least; four are digits.
_COLUMNS = 8
# Levels that a thread loads at once.
_SIDE = 16
DIGITS = 4
# The largest of what is taken as fixed-point numbers becomes this.
_ONE = 2.0**30
# The least of such a largest number, whose inverse times _ONE is finite.
_LEAST = 2.0**-96


def _quarters(size: int, tiles, warps):
  """Tiles of which the last one, 8 rows, has a quarter of a row a thread."""
  tiles = (*tiles, (8, size // 4))
  if size // 4 == _SIDE:
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warps(-3), (-2, -3), -1)
  tiles = (*tiles, (_SIDE,))
  return plgpu.Layout.TILED(plgpu.Tiling(tiles), warps(-4), (-3, -4), -1)


def layout_of(size: int):
  """The layout of a state (HEAD, N): a thread holds a quarter of two rows.

  So lie the operands of the matrix unit, but that it sums up in another order.

  Args:
    size: N.
  """
  tiles = (HEAD, size), (_ROWS, size)
  return _quarters(size, tiles, lambda quarter: (quarter - 3,))


def layout_of_digits(size: int):
  """The layout of digits (8, N), which each warp holds.

  Args:
    size: N.
  """
  return _quarters(size, ((_COLUMNS, size),), lambda _: (plgpu.Replicated(4),))


def digits_of(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Fixed-point digits of (N,) float32, and what these are to be multiplied by.

  Returns:
    (8, N) int8, the last four like the first ones, the lowest of these first,
    in `layout_of_digits`, and a scalar.
  """
  (size,) = values.shape
  layout = layout_of_digits(size)
  largest = jnp.maximum(jnp.max(jnp.abs(values)), _LEAST)
  fixed = (values * (_ONE / largest)).astype(jnp.int32)
  # The lower digits are to be of -128 to 127.
  fixed = hopper_tiles.repeat(fixed + 0x808080, 1, (_COLUMNS, size), layout)
  digit = plgpu.broadcasted_iota(
    jnp.int32, (_COLUMNS, size), 0, layout=layout
  ) & jnp.int32(DIGITS - 1)
  fixed = lax.shift_right_arithmetic(fixed, digit * 8)
  fixed ^= jnp.where(digit < DIGITS - 1, jnp.int32(0x80), jnp.int32(0))
  return fixed.astype(jnp.int8), largest * (1 / _ONE)


def weigh(levels: jax.Array, digits: jax.Array, interpret: bool) -> jax.Array:
  """Sums over N levels (HEAD, N) int8 times fixed-point numbers: (HEAD,).

  Args:
    levels: In `layout_of`.
    digits: Of `digits_of`.
    interpret: Whether the kernel is interpreted.
  """
  if interpret:
    wide = [a.astype(jnp.int32) for a in (levels, digits[:DIGITS])]
    sums = jnp.dot(wide[0], wide[1].T).astype(jnp.float32)
    return sum(256.0**k * sums[:, k] for k in range(DIGITS))
  size = levels.shape[1]
  layouts = layout_of(size), layout_of_digits(size)
  summed = layouts[0].reduce(1)

  @plgpu.inline_mgpu(
    arg_types=layouts,
    return_type=plgpu.ShapeDtypeStruct((HEAD,), jnp.float32, summed),
  )
  def run(_, levels, digits):
    words = [_words(a) for a in (levels, digits)]
    own, weights = words
    half = len(own) // 2
    upper, lower = own[:half], own[half:]
    sums = [constant(0)] * 4
    for i in range(0, half, 2):
      left = upper[i], lower[i], upper[i + 1], lower[i + 1]
      sums = _multiply(sums, left, weights[i : i + 2])
    f32 = ir.F32Type.get()
    sums = [arith.sitofp(f32, one) for one in sums]
    number = lambda value: mgpu.utils.c(value, f32)
    # A thread has two neighbouring digits of both rows.
    odd = arith.andi(mgpu.utils.thread_idx(), constant(1))
    odd = arith.cmpi(arith.CmpIPredicate.ne, odd, constant(0))
    factor = arith.select(odd, number(65536.0), number(1.0))
    found = []
    for low, high in (sums[:2], sums[2:]):
      pair = arith.addf(arith.mulf(high, number(256.0)), low)
      pair = arith.mulf(pair, factor)
      found.append(arith.addf(pair, mgpu.utils.shfl_bfly(pair, 1)))
    return _vector_of(found, summed.to_mgpu(), (HEAD,))

  return run(levels, digits)


def layout_of_words(size: int):
  """The layout of the words of `words_of`, as the matrix unit takes them.

  Args:
    size: N.
  """
  return plgpu.Layout.TILED(
    plgpu.Tiling(((size,), (size // 4,), (2,), (1,))),
    (plgpu.Replicated(4),), (-4, -2, plgpu.Replicated(4)), -1,
  )  # fmt: skip


def words_of(values: jax.Array, interpret: bool) -> jax.Array:
  """What `update` takes of (N,) float32, in `layout_of_words`.

  A float32 is the sum of three bfloat16. Each thread has two of them, in a word
  of its own.
  """
  if interpret:
    return values
  layout = layout_of_words(*values.shape)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.int32, layout),
  )
  def run(_, values):
    thread = mgpu.utils.thread_idx()
    second, last = _bit(thread, 1), _bit(thread, 0)
    registers = values.registers.copy()
    for index, register in enumerate(registers.flat):
      one, two, three = _parts(vector.extract(register, [], [0]))
      # Those beside the parts that `update` takes of the other operand.
      low = arith.select(second, three, one)
      high = arith.select(second, arith.select(last, two, one), two)
      registers.flat[index] = vector.broadcast(
        ir.VectorType.get((1,), word_type()), _upper_halves(low, high)
      )
    return mgpu.FragmentedArray(
      _registers=registers, _layout=values.layout, _is_signed=True
    )

  return run(values)


def update(
  levels: jax.Array, factors: jax.Array, words: jax.Array, interpret: bool
) -> tuple[jax.Array, jax.Array]:
  """Adds the outer product of float32 vectors to levels.

  The matrix unit multiplies levels by one, which makes them float32 where they
  are, and adds the products of the parts of the vectors.

  Args:
    levels: (HEAD, N) int8 in `layout_of`.
    factors: (HEAD,), as a sum over N gives them.
    words: `words_of` (N,).
    interpret: Whether the kernel is interpreted.

  Returns:
    The sum, (HEAD, N) float32, and the largest magnitude of each row.
  """
  if interpret:
    found = levels.astype(jnp.float32) + factors[:, None] * words[None]
    return found, jnp.max(jnp.abs(found), axis=1)
  size = levels.shape[1]
  layout = layout_of(size)

  @plgpu.inline_mgpu(
    arg_types=(layout, layout.reduce(1), layout_of_words(size)),
    return_type=[
      plgpu.ShapeDtypeStruct(levels.shape, jnp.float32, layout),
      plgpu.ShapeDtypeStruct((HEAD,), jnp.float32, layout.reduce(1)),
    ],
  )
  def run(_, levels, factors, words):
    f32 = ir.F32Type.get()
    thread = mgpu.utils.thread_idx()
    last, second = _bit(thread, 0), _bit(thread, 1)
    left = []
    for register in factors.registers.flat:
      one, two, three = _parts(vector.extract(register, [], [0]))
      low = arith.select(last, two, one)
      left.append(_upper_halves(low, arith.select(second, three, low)))
    # A thread's column of ones and zeros has a one where its row is its column.
    row = arith.andi(arith.shrui(thread, constant(2)), constant(7))
    place = arith.subi(
      row, arith.shli(arith.andi(thread, constant(3)), constant(1))
    )
    equal = lambda value: arith.cmpi(
      arith.CmpIPredicate.eq, place, constant(value)
    )
    ones = arith.select(equal(1), constant(0x3C000000), constant(0))
    ones = arith.select(equal(0), constant(0x3C00), ones)
    # The bits of a level and 128, behind the exponent of 1024 in float16.
    bias = [mgpu.utils.c(-1152.0, f32)] * 4
    own = _words(levels)
    half = len(own) // 2
    found = [], []
    right = [vector.extract(w, [], [0]) for w in words.registers.flat]
    for i in range(half):
      pair = [
        arith.xori(word, constant(-0x7F7F7F80))
        for word in (own[i], own[half + i])
      ]
      for k, selector in enumerate((0x4140, 0x4342)):
        some = [pick(word, constant(0x64646464), selector) for word in pair]
        sums = _multiply_floats("f16", bias, some, ones)
        sums = _multiply_floats("bf16", sums, left, right[2 * i + k])
        found[0].extend(sums[:2])
        found[1].extend(sums[2:])
    registers = np.empty(layout.to_mgpu().registers_shape(levels.shape), object)
    kind = ir.VectorType.get((16,), f32)
    numbers = found[0] + found[1]
    for index in range(registers.size):
      some = numbers[16 * index : 16 * index + 16]
      registers.flat[index] = vector.from_elements(kind, some)
    state = mgpu.FragmentedArray(
      _registers=registers, _layout=layout.to_mgpu(), _is_signed=None
    )
    largest = [_largest(row) for row in found]
    return [state, _vector_of(largest, layout.reduce(1).to_mgpu(), (HEAD,))]

  return run(levels, factors, words)


def inverse(values: jax.Array, layout, interpret: bool) -> jax.Array:
  """Returns 1 / values, to a bit or so; 0 beyond 2^126."""
  if interpret:
    return 1 / values

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.float32, layout),
  )
  def run(_, values):
    registers = values.registers.copy()
    for index, register in enumerate(registers.flat):
      registers.flat[index] = _inverses(register)
    return mgpu.FragmentedArray(
      _registers=registers, _layout=values.layout, _is_signed=None
    )

  return run(values)


def _inverses(register):
  f32 = ir.F32Type.get()
  (size,) = ir.VectorType(register.type).shape
  result = llvm.mlir_undef(register.type)
  for i in range(size):
    one = vector.extract(register, [], [i])
    one = llvm.inline_asm(f32, [one], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
    result = llvm.insertelement(result, one, constant(i))
  return result


def _words(array):
  """All registers as words of four numbers."""
  found = []
  for register in array.registers.flat:
    (size,) = ir.VectorType(register.type).shape
    words = vector.bitcast(
      ir.VectorType.get((size // 4,), word_type()), register
    )
    found += [vector.extract(words, [], [i]) for i in range(size // 4)]
  return found


def _multiply(sums, left, right):
  """Adds the products of tiles of 16 and 8 rows of 32 bytes."""
  names = [f"${i}" for i in range(14)]
  group = lambda *these: "{" + ",".join(these) + "}"
  text = (
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    f" {group(*names[:4])}, {group(*names[4:8])}, {group(*names[8:10])},"
    f" {group(*names[10:])};"
  )
  found = llvm.inline_asm(
    llvm.StructType.get_literal([word_type()] * 4),
    [*left, *right, *sums],
    text,
    ",".join(["=r"] * 4 + ["r"] * 10),
  )
  return [llvm.extractvalue(word_type(), found, [i]) for i in range(4)]


def _vector_of(values, layout, shape):
  """A fragmented array of float32 with a number a register."""
  registers = np.empty(layout.registers_shape(shape), dtype=object)
  kind = ir.VectorType.get((1,), ir.F32Type.get())
  for i, value in enumerate(values):
    one = llvm.insertelement(llvm.mlir_undef(kind), value, constant(0))
    registers.flat[i] = one
  assert len(values) == registers.size, (registers.shape, len(values))
  return mgpu.FragmentedArray(
    _registers=registers, _layout=layout, _is_signed=None
  )


def _largest(numbers):
  """The largest magnitude of a row, of which four threads have a quarter."""
  chains = [math.absf(one) for one in numbers[:4]]
  for i, number in enumerate(numbers[4:]):
    chains[i % 4] = arith.maximumf(chains[i % 4], math.absf(number))
  found = functools.reduce(arith.maximumf, chains)
  for distance in (1, 2):
    found = arith.maximumf(found, mgpu.utils.shfl_bfly(found, distance))
  return found


def _bit(value, index):
  """Whether a bit of a word is set."""
  bit = arith.andi(value, constant(1 << index))
  return arith.cmpi(arith.CmpIPredicate.ne, bit, constant(0))


def _parts(value):
  """The upper halves of three float32 that add up to one."""
  f32, parts = ir.F32Type.get(), []
  for i in range(3):
    bits = arith.bitcast(word_type(), value)
    parts.append(bits)
    if i < 2:
      upper = arith.andi(bits, constant(-0x10000))
      value = arith.subf(value, arith.bitcast(f32, upper))
  return parts


def _upper_halves(low, high):
  """Of two words, as one."""
  return pick(low, high, 0x7632)


def _multiply_floats(kind, sums, left, right):
  """Adds the products of tiles of 16 and 8 rows of eight numbers."""
  f32 = ir.F32Type.get()
  names = [f"${i}" for i in range(11)]
  group = lambda *these: "{" + ",".join(these) + "}"
  text = (
    f"mma.sync.aligned.m16n8k8.row.col.f32.{kind}.{kind}.f32"
    f" {group(*names[:4])}, {group(*names[4:6])}, {group(names[6])},"
    f" {group(*names[7:])};"
  )
  found = llvm.inline_asm(
    llvm.StructType.get_literal([f32] * 4),
    [*left, right, *sums],
    text,
    ",".join(["=f"] * 4 + ["r"] * 3 + ["f"] * 4),
  )
  return [llvm.extractvalue(f32, found, [i]) for i in range(4)]
