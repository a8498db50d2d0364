"""Codes of 8 bits to float32 and back in registers, in few instructions.

A multiprocessor converts between integers and floats at an eighth of the rate
at which it multiplies. So the bits of a float are put together instead: behind
the exponent of 2^23 the last byte counts ones.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

# Added, it leaves the nearest whole number, the even one of two, in the last
# bits of the sum, of which the lowest byte is that of its two's complement.
WHOLE = 1.5 * 2.0**23


def to_floats(codes: jax.Array, layout, interpret: bool) -> jax.Array:
  """Returns codes of any shape, int8 in a layout, as float32."""
  if interpret:
    return codes.astype(jnp.float32)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.float32, layout),
  )
  def convert(_, codes):
    # A code plus 128 is not negative. Behind the exponent of 2^23 this gives
    # 2^23 + 128 + code.
    return _each(codes, ir.F32Type.get(), _spread)

  return convert(codes) - (2.0**23 + 128.0)


def to_codes(values: jax.Array, layout, interpret: bool) -> jax.Array:
  """Returns int8 codes of float32 values of any shape to which WHOLE is added.

  The values without WHOLE are to be of at most 127.5.
  """
  if interpret:
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return bits.astype(jnp.int8)

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.int8, layout),
  )
  def convert(_, values):
    return _each(values, ir.IntegerType.get_signless(8), _gather)

  return convert(values)


def _each(array, dtype, function):
  """Applies a function to every register, a vector of a multiple of four."""
  registers = array.registers.copy()
  for index, register in enumerate(array.registers.flat):
    registers.flat[index] = function(register)
  is_signed = True if isinstance(dtype, ir.IntegerType) else None
  return mosaic.FragmentedArray(
    _registers=registers, _layout=array.layout, _is_signed=is_signed
  )


def word_type() -> ir.Type:
  """The type of 32 bits."""
  return ir.IntegerType.get_signless(32)


def constant(value: int) -> ir.Value:
  """A word, of a number that may be negative."""
  return arith.constant(word_type(), ir.IntegerAttr.get(word_type(), value))


def pick(a: ir.Value, b: ir.Value, selector: int) -> ir.Value:
  """Four bytes of the eight of two words, by the digits of the selector."""
  text = f"prmt.b32 $0, $1, $2, {selector:#06x};"
  return llvm.inline_asm(word_type(), [a, b], text, "=r,r,r")


def _spread(register):
  """Bytes to the bits of floats."""
  (size,) = ir.VectorType(register.type).shape
  words = vector.bitcast(ir.VectorType.get((size // 4,), word_type()), register)
  result = llvm.mlir_undef(ir.VectorType.get((size,), word_type()))
  flip, exponent = constant(-0x7F7F7F80), constant(0x4B000000)
  for i in range(size):
    if i % 4 == 0:
      word = vector.extract(words, [], [i // 4])
      word = arith.xori(word, flip)
    bits = pick(word, exponent, 0x7650 + i % 4)
    result = llvm.insertelement(result, bits, constant(i))
  return vector.bitcast(ir.VectorType.get((size,), ir.F32Type.get()), result)


def _gather(register):
  """The last bytes of the bits of floats."""
  (size,) = ir.VectorType(register.type).shape
  bits = vector.bitcast(ir.VectorType.get((size,), word_type()), register)
  result = llvm.mlir_undef(ir.VectorType.get((size // 4,), word_type()))
  for i in range(size // 4):
    four = [vector.extract(bits, [], [4 * i + k]) for k in range(4)]
    low, high = pick(*four[:2], 0x0040), pick(*four[2:], 0x0040)
    word = pick(low, high, 0x5410)
    result = llvm.insertelement(result, word, constant(i))
  byte = ir.IntegerType.get_signless(8)
  return vector.bitcast(ir.VectorType.get((size,), byte), result)
