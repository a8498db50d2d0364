"""How thread blocks of a cluster give each other values of their registers.

A thread gives what it holds to the threads of the same number in the other
thread blocks, which have the same rows and places. So the order in memory is
free: each thread's values lie side by side and go 16 bytes at a time, those of
a warp behind each other. `plgpu.async_store_smem` would send 4 bytes at a time,
each of them a message of its own that counts at a barrier.
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


def _address(ref):
  """Where this thread's first values of a reference are."""
  i32 = ir.IntegerType.get_signless(32)
  thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(_THREADS, i32))
  size = ir.MemRefType(ref.type).shape[-1] * _VALUE
  first = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))
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


def give(ref, values: list[jax.Array]) -> None:
  """Stores shares of the values to the thread blocks of the cluster.

  The others see them when the threads have signalled after `given`. Addresses
  are made anew for each store, because the compiler keeps what it can make
  before a loop in registers, of which there are none left.

  Args:
    ref: Of `memory`, for the share that each thread block gets, (share, ...).
    values: (64, rows) in bfloat16, by the thread block that they go to.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[_LAYOUT] * len(values)))
  def run(_, ref, *values):
    i32 = ir.IntegerType.get_signless(32)
    address, (offsets, each) = _address(ref), _parts(ref)
    names = ", ".join(f"${1 + k}" for k in range(each))
    for at, value in enumerate(values):
      block, own = divmod(at, len(offsets))
      words = [mgpu.utils.bitcast(word, i32) for word in value.registers.flat]
      for part, offset in enumerate(offsets[own]):
        _run(
          "{ .reg .b32 there;"
          f" mapa.shared::cluster.u32 there, $0, {block};"
          f" st.shared::cluster.v{each}.b32 [there+{offset}], {{{names}}}; }}",
          "!llvm.void",
          [address, *words[part * each : (part + 1) * each]],
          "r" + ",r" * each,
        )

  run(ref, *values)


def given() -> None:
  """Orders what all threads have given before what any of them signals next."""

  @plgpu.inline_mgpu()
  def fence(_):
    _run("fence.acq_rel.cluster;", "!llvm.void", [], "")

  fence()
  plgpu.commit_smem()


def take(ref, shape: tuple[int, int]) -> list[jax.Array]:
  """All that this thread block has been given, (64, rows) in bfloat16 each.

  It has waited for a barrier at which all have signalled. That orders what lies
  in its own shared memory, so that no fence, which waits for all of memory, is
  needed a second time.
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
