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


def _addresses(ref, pointer):
  """The address of each part of this thread, and how many registers it has."""
  i32, byte = (ir.IntegerType.get_signless(bits) for bits in (32, 8))
  parts, _, each = ir.MemRefType(ref.type).shape
  thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(_THREADS, i32))
  size = each * _VALUE
  first = arith.muli(thread, mgpu.utils.c(size, i32))
  found = [
    mgpu.utils.getelementptr(
      pointer,
      [arith.addi(first, mgpu.utils.c(part * _THREADS * size, i32))],
      byte,
    )
    for part in range(parts)
  ]
  return found, size // _REGISTER


def give(ref, value: jax.Array, block: int) -> None:
  """Stores to the shared memory of a thread block of the cluster.

  The others see it when the threads have signalled after `given`.

  Args:
    ref: Of `memory`, without leading axes.
    value: (64, rows), bfloat16.
    block: Number of the thread block.
  """

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT))
  def run(_, ref, value):
    i32 = ir.IntegerType.get_signless(32)
    there = mgpu.utils.get_cluster_ptr(
      mgpu.utils.memref_ptr(ref), mgpu.utils.c(block, i32), generic=False
    )
    words = [mgpu.utils.bitcast(word, i32) for word in value.registers.flat]
    addresses, each = _addresses(ref, there)
    names = ", ".join(f"${1 + k}" for k in range(each))
    for part, address in enumerate(addresses):
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, *words[part * each : (part + 1) * each]],
        f"st.shared::cluster.v{each}.b32 [$0], {{{names}}};",
        "l" + ",r" * each,
        has_side_effects=True,
      )

  run(ref, value)


def _fence() -> None:
  @plgpu.inline_mgpu()
  def run(_):
    llvm.inline_asm(
      ir.Type.parse("!llvm.void"),
      [],
      "fence.acq_rel.cluster;",
      "",
      has_side_effects=True,
    )

  run()


def given() -> None:
  """Orders what all threads have given before what any of them does next."""
  _fence()
  plgpu.commit_smem()


def taken() -> None:
  """Orders what a barrier has told before what is read next."""
  _fence()


def take(ref, shape: tuple[int, int]) -> jax.Array:
  """What has been given to this thread block, (64, rows) in bfloat16."""

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, _LAYOUT),
  )
  def run(_, ref):
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    addresses, each = _addresses(ref, mgpu.utils.memref_ptr(ref))
    names = ", ".join(f"${k}" for k in range(each))
    words = []
    for address in addresses:
      many = llvm.inline_asm(
        ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * each)})>"),
        [address],
        f"ld.shared.v{each}.b32 {{{names}}}, [${each}];",
        "=r," * each + "l",
        has_side_effects=True,
      )
      words += [llvm.extractvalue(i32, many, [k]) for k in range(each)]
    layout = _LAYOUT.to_mgpu()
    found = np.empty(layout.registers_shape(shape), dtype=object)
    for index, word in zip(np.ndindex(found.shape), words, strict=True):
      found[index] = mgpu.utils.bitcast(word, pair)
    return mgpu.FragmentedArray(
      _registers=found, _layout=layout, _is_signed=None
    )

  return run(ref)
