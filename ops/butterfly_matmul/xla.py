"""`butterfly_matmul` in plain JAX: by stages, or by products of merged ones.

A group of stages of the strides 2^a, ..., 2^(b-1) touches of a position

  (high, middle, low), of n / 2^b, 2^(b-a) and 2^a values

the middle alone: it is a batch over (high, low) of R x R matrices, R = 2^(b-a).
With a = 0 that is a matrix of R x R blocks on its diagonal. An entry of such a
matrix is a product of b - a entries of the twiddle, without a sum.
"""

import math

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.butterfly_matmul import tuning

# First bit a, last bit b, and whether strides increase.
type Group = tuple[int, int, bool]


def forward(
  x: jax.Array,
  twiddle: jax.Array,
  *,
  out_features: int,
  increasing_stride: bool,
  method: str | None = None,
) -> jax.Array:
  """Implements `butterfly_matmul`; arguments as in `ops`.

  `method` is a key of `METHODS`, or None for `tuning.choose`.
  """
  lead, features = x.shape[:-1], x.shape[-1]
  dtype = jnp.result_type(x.dtype, twiddle.dtype)
  if not jnp.issubdtype(dtype, jnp.complexfloating):
    dtype = x.dtype
  x = x.reshape(-1, features).astype(dtype)
  if method is None:
    method = tuning.choose(
      x.shape[0],
      features,
      out_features,
      twiddle.shape[1],
      jnp.dtype(dtype).itemsize,
      dispatch.platform(),
    )
  # Products of twiddles are of float32, and rounded to x's dtype at the end.
  exact = jnp.promote_types(jnp.result_type(dtype, twiddle.dtype), jnp.float32)
  y = METHODS[method](x, twiddle.astype(exact), out_features, increasing_stride)
  return y.astype(dtype).reshape(*lead, out_features)


def radix2(x, twiddle, out_features, increasing_stride):
  """Stage by stage in float32: the fewest operations, and log2 n passes."""
  stacks, blocks, stages, half = twiddle.shape[:4]
  rows, size = x.shape[0], 2 * half
  y = _padded(x, size).astype(twiddle.dtype)[:, None]
  y = jnp.broadcast_to(y, (rows, stacks, size))
  for block, increasing in enumerate(_orders(blocks, increasing_stride)):
    for stage in range(stages):
      stride = 2 ** (stage if increasing else stages - 1 - stage)
      pairs = y.reshape(rows, stacks, half // stride, 2, stride)
      own = twiddle[:, block, stage]
      own = own.reshape(1, stacks, half // stride, stride, 2, 2)
      first, second = pairs[..., 0, :], pairs[..., 1, :]
      y = [own[..., i, 0] * first + own[..., i, 1] * second for i in range(2)]
      y = jnp.stack(y, axis=-2).reshape(rows, stacks, size)
  return y.reshape(rows, stacks * size)[:, :out_features]


def merged(x, twiddle, out_features, increasing_stride):
  """Two or three groups of stages a block, each a batch of small products."""
  stacks, blocks, stages, half = twiddle.shape[:4]
  spans = tuning.spans(stages)
  rows, size = x.shape[0], 2 * half
  parts = _group_matrices(twiddle, spans, increasing_stride, rows)
  y = _padded(x, size)
  for at, ((first, last), matrix) in enumerate(parts):
    # Every stack reads the input itself first, and then what it made of it.
    axes = "mhjl" if at == 0 else "mshjl"
    shape = (size >> last, 1 << (last - first), 1 << first)
    y = y.reshape(rows, *(() if at == 0 else (stacks,)), *shape)
    y = _einsum(f"{axes},shlij->mshil", y, matrix, x.dtype)
  return y.reshape(rows, stacks * size)[:, :out_features]


def dense(x, twiddle, out_features, increasing_stride):
  """One product of rows with the whole matrix, which is made anew."""
  stacks, _, stages, _ = twiddle.shape[:4]
  rows, features = x.shape
  spans = ((0, stages),)
  parts = _group_matrices(twiddle, spans, increasing_stride, rows)
  for at, (_, matrix) in enumerate(parts):
    # (S, n, n): what meets no input and makes no output is left out.
    matrix = matrix[:, 0, 0]
    if at == 0:
      matrix = matrix[:, :, :features]
    if at == len(parts) - 1 and stacks == 1:
      matrix = matrix[:, :out_features]
    axes = "mj" if at == 0 else "msj"
    x = _einsum(f"{axes},sij->msi", x, matrix, x.dtype)
  return x.reshape(rows, math.prod(x.shape[1:]))[:, :out_features]


METHODS = {"radix2": radix2, "merged": merged, "dense": dense}


def _orders(blocks: int, increasing_stride: bool) -> list[bool]:
  """Whether strides increase in each block: they turn back and forth."""
  return [increasing_stride ^ bool(block % 2) for block in range(blocks)]


def _padded(x, size):
  return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))


def _group_matrices(twiddle, spans, increasing_stride, rows):
  """[((a, b), (S, high, low, R, R) of x's dtype)] in the order of use.

  Where strides turn, the last group of a block meets the first of the next over
  the same channels. They are multiplied into one where there are more rows than
  a matrix has, so that this costs less than it saves.
  """
  found = []
  for block, increasing in enumerate(
    _orders(twiddle.shape[1], increasing_stride)
  ):
    for span in spans if increasing else spans[::-1]:
      matrix = group_matrix(twiddle[:, block], span, increasing)
      if found and found[-1][0] == span and rows > matrix.shape[-1]:
        before = found.pop()[1]
        matrix = _einsum("shlij,shljk->shlik", matrix, before, twiddle.dtype)
      found.append((span, matrix))
  return found


def group_matrix(twiddle, span, increasing):
  """The matrices (S, high, low, R, R) of the stages of one span of strides.

  Args:
    twiddle: of one block, (S, log2 n, n/2, 2, 2).
    span: (a, b), of the strides 2^a to 2^(b-1).
    increasing: whether the smallest stride comes first.
  """
  stacks, stages, half = twiddle.shape[:3]
  first, last = span
  low = 1 << first
  matrix = jnp.ones((stacks, 2 * half // low, low, 1, 1), twiddle.dtype)
  for bit in range(first, last):
    width = 1 << (bit - first)
    stage = bit if increasing else stages - 1 - bit
    # Blocks of twice the width from pairs of blocks: (S, high, 2, low, w, w)
    # and the stage's entries (S, high, w, low, 2, 2).
    pairs = matrix.reshape(stacks, -1, 2, low, width, width)
    own = twiddle[:, stage].reshape(stacks, -1, width, low, 2, 2)
    # A stage that comes last multiplies rows, one that comes first columns.
    sides = "sgkljc,sgjlik->sglijkc" if increasing else "sgilrj,sgjlik->sglirkj"
    matrix = _outer(sides, pairs, own)
    matrix = matrix.reshape(stacks, -1, low, 2 * width, 2 * width)
  return matrix


def _outer(spec, a, b):
  """An einsum without a sum, as a product of entries: exact on any machine."""
  inputs, output = spec.split("->")
  aligned = []
  for letters, array in zip(inputs.split(","), (a, b)):
    kept = [letter for letter in output if letter in letters]
    array = array.transpose([letters.index(letter) for letter in kept])
    absent = [at for at, letter in enumerate(output) if letter not in letters]
    aligned.append(jnp.expand_dims(array, absent))
  return jnp.multiply(*aligned)


def _einsum(spec, a, b, dtype):
  """A product in `dtype` with sums of float32, rounded to it.

  The result is asked for in `dtype`. Asked for in float32 and cast, it would
  have a gradient of float32, for which both products of the backward pass, and
  all that they read, would be float32 too.
  """
  return jnp.einsum(
    spec,
    a.astype(dtype),
    b.astype(dtype),
    precision="highest",
    preferred_element_type=dtype,
  )
