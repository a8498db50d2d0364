"""Numbers that thread blocks hand to each other, each beside a tag.

Where a block counts what it has done, others see it after three trips: what it
wrote has to arrive, then its count, and then they read. A number that lies
beside a tag needs one: who reads both at once knows by the tag whether it is
what it waits for. Eight bytes of memory are written at once. Tags are the bits
of numbers, so that an array of floats holds both.
"""

from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf, vector
from jaxlib.mlir.dialects import llvm

_SPLAT = plgpu.Layout.WG_SPLAT
_THREADS, _WARP = 128, 32


def _assembly(text, results, operands, constraints):
  return llvm.inline_asm(
    ir.Type.parse(results), operands, text, constraints, has_side_effects=True
  )


def _pointers(ref, layout, shape) -> list[ir.Value]:
  """Where a thread's registers of an array lie, in their order."""
  i64, index = ir.IntegerType.get_signless(64), ir.IndexType.get()
  strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
  base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
  found = []
  for place in layout.thread_idxs(shape):
    offset = mgpu.utils.c(0, index)
    for axis, (one, stride) in enumerate(zip(place, strides, strict=True)):
      # Four bytes, and as many of a tag.
      size = 4 * stride * (2 if axis == len(strides) - 1 else 1)
      size = mgpu.utils.c(size, index)
      offset = arith.addi(offset, arith.muli(one, size))
    found.append(arith.addi(base, arith.index_cast(i64, offset)))
  return found


def give(ref: Any, value: jax.Array, layout: Any, tag: jax.Array) -> None:
  """Writes an array that all warps of the warpgroup hold alike.

  Args:
    ref: (..., 2 F) float32 in memory, in which numbers and tags take turns.
    value: (..., F) float32.
    layout: Of `value`.
    tag: int32 scalar.
  """
  shape = value.shape

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, _SPLAT()))
  def run(_, ref, value, tag):
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(_THREADS, i32))
    tag, own = tag.registers.item(), layout.to_mgpu()
    for pointer, register in zip(
      _pointers(ref, own, shape), value.registers.flat, strict=True
    ):
      words = []
      for k in range(own.vector_length):
        one = vector.extract(register, [], [k])
        words += [mgpu.utils.bitcast(one, i32), tag]
      names = ", ".join(f"${2 + k}" for k in range(len(words)))
      _assembly(
        "{ .reg .pred p; setp.lt.u32 p, $1, " + str(_WARP) + ";"
        f" @p st.volatile.global.v{len(words)}.u32 [$0], {{{names}}}; }}",
        "!llvm.void",
        [pointer, thread, *words],
        "l,r" + ",r" * len(words),
      )

  run(ref, value, tag)


def give_scalar(ref: Any, value: jax.Array, tag: jax.Array) -> None:
  """As `give` for a float32 scalar, to (2,)."""

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT(), _SPLAT()))
  def run(_, ref, value, tag):
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    thread = arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(_THREADS, i32))
    pointer = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    word = mgpu.utils.bitcast(value.registers.item(), i32)
    _assembly(
      "{ .reg .pred p; setp.eq.u32 p, $1, 0;"
      " @p st.volatile.global.v2.u32 [$0], {$2, $3}; }",
      "!llvm.void",
      [pointer, thread, word, tag.registers.item()],
      "l,r,r,r",
    )

  run(ref, value, tag)


def take(places: list[tuple], tag: jax.Array) -> list[jax.Array]:
  """Waits for arrays, and reads them.

  Args:
    places: Of each a reference as `give` takes it, its shape and layout.
    tag: int32 scalar, that they are to have; larger ones do as well.

  Returns:
    The arrays, float32.
  """
  forms = [(shape, layout.to_mgpu()) for _, shape, layout in places]
  types = [
    plgpu.ShapeDtypeStruct(shape, jnp.float32, layout)
    for _, shape, layout in places
  ]

  @plgpu.inline_mgpu(
    arg_types=(*[plgpu.RefType()] * len(places), _SPLAT()), return_type=types
  )
  def run(_, *operands):
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    *refs, tag = operands
    tag = tag.registers.item()
    pointers = [
      (pointer, own.vector_length)
      for ref, (shape, own) in zip(refs, forms)
      for pointer in _pointers(ref, own, shape)
    ]

    def read(pointer, count):
      """Numbers, and whether one of them is not there yet."""
      words, late = [], None
      each = 2 * count
      names = ", ".join(f"${k}" for k in range(each))
      many = _assembly(
        f"ld.volatile.global.v{each}.u32 {{{names}}}, [${each}];",
        f"!llvm.struct<({', '.join(['i32'] * each)})>",
        [pointer],
        "=r," * each + "l",
      )
      for k in range(count):
        words.append(llvm.extractvalue(i32, many, [2 * k]))
        found = llvm.extractvalue(i32, many, [2 * k + 1])
        other = arith.cmpi(arith.CmpIPredicate.slt, found, tag)
        late = other if late is None else arith.ori(late, other)
      return words, late

    def loop(some):
      """Reads until all are there."""
      count = sum(each for _, each in some)
      loop = scf.WhileOp([i32] * count, [])
      before = loop.before.blocks.append()
      with ir.InsertionPoint(before):
        words, late = [], None
        for place in some:
          one, other = read(*place)
          words += one
          late = other if late is None else arith.ori(late, other)
        scf.condition(late, words)
      after = loop.after.blocks.append(*[i32] * count)
      with ir.InsertionPoint(after):
        scf.yield_([])
      return list(loop.results)

    # To read all of it again and again would take memory's time from others.
    loop(pointers[:1])
    words = iter(loop(pointers))
    results = []
    for shape, own in forms:
      registers = np.empty(own.registers_shape(shape), dtype=object)
      kind = ir.VectorType.get((own.vector_length,), f32)
      for index in np.ndindex(registers.shape):
        numbers = [
          mgpu.utils.bitcast(next(words), f32) for _ in range(own.vector_length)
        ]
        registers[index] = vector.from_elements(kind, numbers)
      results.append(
        mgpu.FragmentedArray(_registers=registers, _layout=own, _is_signed=None)
      )
    return results

  return run(*[ref for ref, *_ in places], tag)
