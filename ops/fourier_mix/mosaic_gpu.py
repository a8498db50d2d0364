"""`fourier_mix` on Hopper: XLA's products between two kernels that fold.

What is even and what is odd comes of values and their mirror images, and so do
the quadrants of the result. XLA reads mirror images one by one. Here a thread
reads eight neighbours and the eight that mirror them, as 16 bytes each, and
stores what it makes of them in registers in either order, 16 bytes at a time.

The mirror image of position d is D - d. So those of 8 v + 1, ..., 8 v + 8 lie
side by side where 16 bytes begin, and a thread needs one value of the next one.

A kernel is written for one thread, with what `Threads` offers. The same text
runs with numbers of Python in its test, as the interpreter knows no threads.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ops import dispatch
from ops.fourier_mix import xla

# Values that a thread loads and stores at once, and threads of a block.
EACH = 8
THREADS = 128
_SCALAR = plgpu.Layout.WG_SPLAT
# Half of L + D from which an FFT takes less time than products.
_MOST = 3700


def supports(x: Any = None, **options: Any) -> str | None:
  """Returns why the kernels do not run, or None."""
  del options
  reason = dispatch.needs_hopper()
  return reason if reason or x is None else unfit(x)


def unfit(x: jax.Array) -> str | None:
  """Returns why x does not fit the kernels, or None."""
  if x.dtype != jnp.bfloat16:
    return f"takes bfloat16, not {x.dtype}"
  if x.shape[-2] % (2 * EACH) or x.shape[-1] % (2 * EACH):
    return f"takes multiples of {2 * EACH} tokens and channels, not {x.shape}"
  if sum(x.shape[-2:]) >= 2 * _MOST:
    return (
      f"takes less than {2 * _MOST} tokens and channels, as an FFT is faster"
    )
  if not 0 < x.size < 2**31:
    return f"takes 1 to 2^31 - 1 values, not {x.size}"
  return None


def transform(x: jax.Array) -> jax.Array:
  """Implements `fourier_mix`."""
  sizes = x.shape[-2:]
  even, odd = fold(x.reshape(math.prod(x.shape[:-2]), *sizes))
  with_cos = xla.product(even, sizes, 0)
  with_sin = xla.product(odd, sizes, 1)
  return unfold(with_cos, with_sin, sizes).reshape(x.shape)


class Threads:
  """What a thread computes with, as instructions of the kernel."""

  @staticmethod
  def number(value: int):
    """An int32."""
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))

  def _of(self, value):
    return self.number(value) if isinstance(value, int) else value

  def add(self, a, b):
    """The sum of integers."""
    return arith.addi(self._of(a), self._of(b))

  def minus(self, a, b):
    """The difference of integers."""
    return arith.subi(self._of(a), self._of(b))

  def times(self, a, b):
    """The product of integers."""
    return arith.muli(self._of(a), self._of(b))

  def divided(self, a, b):
    """The quotient and the rest of integers that are not negative."""
    b = self._of(b)
    return arith.divui(a, b), arith.remui(a, b)

  def less(self, a, b):
    """Whether a is less than b, of integers that are not negative."""
    return arith.cmpi(arith.CmpIPredicate.ult, self._of(a), self._of(b))

  def same(self, a, b):
    """Whether integers are equal."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, self._of(b))

  def either(self, a, b):
    """Whether one of both is true."""
    return arith.ori(a, b)

  def where(self, condition, a, b):
    """a where the condition holds, else b: integers, or float32."""
    return arith.select(condition, self._of(a), self._of(b))

  def zero(self):
    """In float32."""
    return arith.constant(ir.F32Type.get(), 0.0)

  def plus(self, a, b):
    """The sum of float32."""
    return arith.addf(a, b)

  def less_by(self, a, b):
    """The difference of float32."""
    return arith.subf(a, b)

  def when(self, condition):
    """A context for what is done where the condition holds."""
    return mgpu.utils.when(condition)

  @staticmethod
  def _pointer(ref, at):
    at = arith.extsi(ir.IntegerType.get_signless(64), at)
    pointer = mgpu.utils.memref_ptr(ref)
    return mgpu.utils.getelementptr(pointer, [at], ir.BF16Type.get())

  def load(self, ref, at):
    """A value in float32."""
    value = llvm.load(ir.BF16Type.get(), self._pointer(ref, at))
    return arith.extf(ir.F32Type.get(), value)

  def load_each(self, ref, at):
    """`EACH` values in float32 from a multiple of `EACH` on."""
    kind = ir.VectorType.get((EACH,), ir.BF16Type.get())
    values = llvm.load(kind, self._pointer(ref, at))
    return [
      arith.extf(ir.F32Type.get(), llvm.extractelement(values, self.number(k)))
      for k in range(EACH)
    ]

  def store_each(self, ref, at, values):
    """Stores `EACH` values from a multiple of `EACH` on."""
    kind = ir.VectorType.get((EACH,), ir.BF16Type.get())
    found = llvm.mlir_undef(kind)
    for k, value in enumerate(values):
      value = arith.truncf(ir.BF16Type.get(), value)
      found = llvm.insertelement(found, value, self.number(k))
    llvm.store(found, self._pointer(ref, at))


def fold_one(m, at, row, refs, shape) -> None:
  """Makes `EACH` values of what is even and of what is odd.

  Args:
    m: `Threads`, or what does the same.
    at: Number of the thread in its row of the batch.
    row: Of the batch.
    refs: x (B, L, D), and of what is even and odd (L', B, D').
    shape: (B, L, D).
  """
  x, even, odd = refs
  batch, length, channels = shape
  high, wide = (xla.padded_half(size) for size in shape[1:])
  j, v = m.divided(at, wide // EACH)
  with m.when(m.less(j, high)):
    zero, column = m.zero(), m.times(v, EACH)
    first = m.same(v, 0)
    # There stands D / 2 alone, and then what pads.
    last = m.same(v, channels // (2 * EACH))
    mirror = m.where(last, column, m.minus(channels - EACH, column))
    lone = m.either(first, last)
    beside = m.where(lone, column, m.add(mirror, EACH))
    inside = m.less(j, length // 2 + 1)
    own = m.where(inside, j, 0)
    alone = m.either(m.same(own, 0), m.same(own, length // 2))
    other = m.where(alone, 0, m.minus(length, own))
    parts = []
    for token, absent in ((own, m.less(length // 2, j)), (other, alone)):
      base = m.times(m.add(m.times(row, length), token), channels)
      here = m.load_each(x, m.add(base, column))
      there = m.load_each(x, m.add(base, mirror))
      there = [m.load(x, m.add(base, beside)), *there[:0:-1]]
      here[1:] = [m.where(last, zero, value) for value in here[1:]]
      there[1:] = [m.where(last, zero, value) for value in there[1:]]
      there[0] = m.where(lone, zero, there[0])
      parts += [
        [m.where(absent, zero, value) for value in values]
        for values in (here, there)
      ]
    place = m.add(
      m.times(m.add(m.times(j, batch), row), wide), m.times(v, EACH)
    )
    sums, differences = [], []
    for a, b, c, d in zip(*parts):
      sums.append(m.plus(m.plus(a, c), m.plus(b, d)))
      differences.append(m.less_by(m.less_by(a, c), m.less_by(b, d)))
    m.store_each(even, place, sums)
    m.store_each(odd, place, differences)


def unfold_one(m, at, row, refs, shape) -> None:
  """Makes `EACH` values of all four quadrants.

  Args:
    m: `Threads`, or what does the same.
    at: Number of the thread in its row of the batch.
    row: Of the batch.
    refs: Products with cosines and with sines (L', B, D'), and y (B, L, D).
    shape: (B, L, D).
  """
  with_cos, with_sin, y = refs
  batch, length, channels = shape
  wide = xla.padded_half(channels)
  k, v = m.divided(at, channels // (2 * EACH))
  with m.when(m.less(k, length // 2 + 1)):
    column = m.times(v, EACH)
    place = m.add(m.times(m.add(m.times(k, batch), row), wide), column)
    a, b = (
      [*m.load_each(ref, place), m.load(ref, m.add(place, EACH))]
      for ref in (with_cos, with_sin)
    )
    near = [m.less_by(*pair) for pair in zip(a, b)]
    far = [m.plus(*pair) for pair in zip(a, b)]
    mirror = m.minus(channels - EACH, column)

    def store(token, here, there):
      base = m.times(m.add(m.times(row, length), token), channels)
      m.store_each(y, m.add(base, column), here[:EACH])
      m.store_each(y, m.add(base, mirror), there[:0:-1])

    store(k, near, far)
    # The others are mirror images of themselves.
    inner = m.less(m.minus(k, 1), length // 2 - 1)
    with m.when(inner):
      store(m.minus(length, k), far, near)


def _kernel(one, name, shape, items, out_type):
  """A kernel in which `one` runs for each row and item of it."""

  def body(*refs):
    types = (plgpu.RefType(),) * len(refs)

    @plgpu.inline_mgpu(arg_types=(*types, _SCALAR(), _SCALAR()))
    def run(_, *arguments):
      *refs, block, row = arguments
      m = Threads()
      block, row = (v.registers.item() for v in (block, row))
      at = m.add(m.times(block, THREADS), mgpu.utils.thread_idx())
      one(m, at, row, refs, shape)

    run(*refs, lax.axis_index("block"), lax.axis_index("row"))

  return plgpu.kernel(
    body,
    out_type=out_type,
    grid=(shape[0], pl.cdiv(items, THREADS)),
    grid_names=("row", "block"),
    kernel_name=f"fourier_mix_{name}",
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
  )


def fold_items(shape) -> int:
  """Threads that a row of the batch takes to fold."""
  high, wide = (xla.padded_half(size) for size in shape[1:])
  return high * wide // EACH


def unfold_items(shape) -> int:
  """Threads that a row of the batch takes to unfold."""
  return (shape[1] // 2 + 1) * (shape[2] // (2 * EACH))


@jax.jit
def fold(x: jax.Array) -> list[jax.Array]:
  """What of x, (B, L, D), is even and what is odd: (L', B, D') each."""
  high, wide = (xla.padded_half(size) for size in x.shape[1:])
  out = jax.ShapeDtypeStruct((high, x.shape[0], wide), x.dtype)
  items = fold_items(x.shape)
  return _kernel(fold_one, "fold", x.shape, items, [out, out])(x)


@functools.partial(jax.jit, static_argnums=2)
def unfold(with_cos, with_sin, sizes: tuple[int, int]) -> jax.Array:
  """Of products, (L', B, D') each, the transform (B, L, D)."""
  shape = with_cos.shape[1], *sizes
  out = jax.ShapeDtypeStruct(shape, with_cos.dtype)
  items = unfold_items(shape)
  return _kernel(unfold_one, "unfold", shape, items, out)(with_cos, with_sin)
