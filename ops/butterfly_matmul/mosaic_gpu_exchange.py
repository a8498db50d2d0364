"""How thread blocks of a cluster give each other values of their registers.

A thread gives what it holds to the threads of the same number in the other
thread blocks, which have the same rows and places. So the order in memory is
free: each thread's values lie side by side and go 16 bytes at a time, those of
a warp behind each other. Each is a message that counts at a barrier where it
goes to; `plgpu.async_store_smem` would make four of it. On an H200 a product of
32,768 x 4,096 takes .383 ms so, .395 by plain stores and a fence behind them;
of 2,048 channels .296 and .344.
"""

import math

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

_LAYOUT = plgpu.Layout.WGMMA
_THREADS = 128
# Bytes of a value, of a register, and of registers that go together.
_VALUE, _REGISTER, _TOGETHER = 2, 4, 16


def memory(*shape: int) -> plgpu.SMEM:
  """Shared memory for values (..., 64, rows) as threads hold them."""
  *count, places, rows = shape
  own = places * rows // _THREADS
  each = math.gcd(own, _TOGETHER // _VALUE)
  return plgpu.SMEM((*count, own // each, _THREADS, each), jnp.bfloat16)


def _thread():
  i32 = ir.IntegerType.get_signless(32)
  return arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(_THREADS, i32))


def _pointer(ref):
  i32 = ir.IntegerType.get_signless(32)
  return llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))


def _address(ref):
  """Where this thread's first values of a reference are."""
  i32 = ir.IntegerType.get_signless(32)
  size = ir.MemRefType(ref.type).shape[-1] * _VALUE
  thread, first = _thread(), _pointer(ref)
  return arith.addi(first, arith.muli(thread, mgpu.utils.c(size, i32)))


def _parts(ref):
  """The offsets of a value's parts, by value, and the registers of a part."""
  count, parts, threads, each = ir.MemRefType(ref.type).shape
  size = threads * each * _VALUE
  offsets = [
    [(k * parts + part) * size for part in range(parts)] for k in range(count)
  ]
  return offsets, each * _VALUE // _REGISTER


def _run(text, results, operands, constraints):
  return llvm.inline_asm(
    ir.Type.parse(results), operands, text, constraints, has_side_effects=True
  )


def barriers(count: int) -> plgpu.SMEM:
  """Shared memory for `count` barriers that count the bytes that arrive.

  Those of Pallas count threads of a cluster alone.
  """
  return plgpu.SMEM((count, 2), jnp.int32)


def start(barrier) -> None:
  """Makes one of `barriers`; a signal through the cluster has to follow.

  Args:
    barrier: (2,), this warpgroup's.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
  def run(_, barrier):
    _run(
      "{ .reg .pred p; setp.eq.u32 p, $1, 0;"
      " @p mbarrier.init.shared::cta.b64 [$0], 1;"
      " @p fence.mbarrier_init.release.cluster; }",
      "!llvm.void",
      [_pointer(barrier), _thread()],
      "r,r",
    )

  run(barrier)


def give(ref, values: list[jax.Array], barrier) -> None:
  """Sends shares of the values to the thread blocks of the cluster.

  Each message of 16 bytes counts at the barrier of the thread block that it
  goes to, so that nobody waits for memory or for a signal behind it. Addresses
  are made anew for each of them, because the compiler keeps what it can make
  before a loop in registers, of which there are none left.

  Args:
    ref: Of `memory`, for the share that each thread block gets, (share, ...).
    values: (64, rows) in bfloat16, by the thread block that they go to.
    barrier: Of `barriers`, (2,), started. It is told to await as many bytes as
      all values here have, since thread blocks give each other equal shares.
  """
  size = sum(value.size for value in values) * _VALUE

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.RefType(), *[_LAYOUT] * len(values))
  )
  def run(_, ref, barrier, *values):
    i32 = ir.IntegerType.get_signless(32)
    address, (offsets, each) = _address(ref), _parts(ref)
    own = _pointer(barrier)
    _run(
      "{ .reg .pred p; setp.eq.u32 p, $1, 0;"
      f" @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size}; }}",
      "!llvm.void",
      [own, _thread()],
      "r,r",
    )
    names = ", ".join(f"${2 + k}" for k in range(each))
    for at, value in enumerate(values):
      block, share = divmod(at, len(offsets))
      words = [mgpu.utils.bitcast(word, i32) for word in value.registers.flat]
      for part, offset in enumerate(offsets[share]):
        _run(
          "{ .reg .b32 there, bar;"
          f" mapa.shared::cluster.u32 there, $0, {block};"
          f" mapa.shared::cluster.u32 bar, $1, {block};"
          " st.async.shared::cluster.mbarrier::complete_tx::bytes"
          f".v{each}.b32 [there+{offset}], {{{names}}}, [bar]; }}",
          "!llvm.void",
          [address, own, *words[part * each : (part + 1) * each]],
          "r,r" + ",r" * each,
        )

  run(ref, barrier, *values)


def wait(barrier, time) -> None:
  """Waits until all have arrived that are given at a time.

  Args:
    barrier: As in `give`.
    time: How often there has been an exchange before, an int32.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT()))
  def run(_, barrier, time):
    i32 = ir.IntegerType.get_signless(32)
    odd = ir.IntegerType.get_signless(1)
    parity = arith.trunci(odd, time.registers.item())
    base = mgpu.utils.memref_ptr(barrier)
    one = mgpu.utils.BarrierRef(base, mgpu.utils.c(0, i32), None, 1)
    one.wait_parity(parity)

  run(barrier, time)


def take(ref, shape: tuple[int, int]) -> list[jax.Array]:
  """All that this thread block has been given, (64, rows) in bfloat16 each.

  It has waited for it by `wait`, which orders what lies in its own shared
  memory.
  """
  one = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, _LAYOUT)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),), return_type=[one] * ref.shape[0]
  )
  def run(_, ref):
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    address, (offsets, each) = _address(ref), _parts(ref)
    names = ", ".join(f"${k}" for k in range(each))
    results = f"!llvm.struct<({', '.join(['i32'] * each)})>"
    layout, found = _LAYOUT.to_mgpu(), []
    for own in offsets:
      words = []
      for offset in own:
        text = f"ld.shared.v{each}.b32 {{{names}}}, [${each}+{offset}];"
        many = _run(text, results, [address], "=r," * each + "r")
        words += [llvm.extractvalue(i32, many, [k]) for k in range(each)]
      registers = np.empty(layout.registers_shape(shape), dtype=object)
      for index, word in zip(np.ndindex(registers.shape), words, strict=True):
        registers[index] = mgpu.utils.bitcast(word, pair)
      found.append(
        mgpu.FragmentedArray(
          _registers=registers, _layout=layout, _is_signed=None
        )
      )
    return found

  return run(ref)
