"""What butterflies begin as: random, orthogonal, identity, or the FFT."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def padded_size(features: int) -> int:
  """The power of two n >= 2 that `features` channels are padded to."""
  return 1 << max(1, (features - 1).bit_length())


def twiddle_shape(
  in_features: int, out_features: int, *, blocks: int = 1
) -> tuple[int, ...]:
  """The shape (S, K, log2 n, n/2, 2, 2) of a rectangular layer's twiddles.

  Inputs are padded to n, and S = ceil(out_features / n) stacks read them all.

  Raises:
    ValueError: a number is below 1.
  """
  if min(in_features, out_features, blocks) < 1:
    raise ValueError(
      f"twiddle_shape: {in_features} to {out_features} channels by {blocks}"
      " blocks: all must be at least 1"
    )
  n = padded_size(in_features)
  return -(-out_features // n), blocks, n.bit_length() - 1, n // 2, 2, 2


def init_twiddle(
  key: jax.Array,
  shape: tuple[int, ...],
  *,
  kind: str = "randn",
  dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
  """Draws the twiddles of `butterfly_matmul`.

  Args:
    key: Of the draw.
    shape: (S, K, log2 n, n/2, 2, 2), as `twiddle_shape` gives it.
    kind: "randn" draws entries of variance 1/2, so that a product keeps the
      variance of its input; "orthogonal" makes every 2 x 2 matrix a rotation
      or a reflection by a uniform angle, of a complex dtype a unitary matrix of
      Haar measure, so that the product is orthogonal or unitary; "identity".
    dtype: float32, complex64, or another float or complex dtype.

  Raises:
    ValueError: There is no such kind.
  """
  dtype = jnp.dtype(dtype)
  if kind == "identity":
    return jnp.broadcast_to(jnp.eye(2, dtype=dtype), shape)
  if kind == "randn":
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.5**0.5, dtype)
  if kind != "orthogonal":
    raise ValueError(
      f"init_twiddle: kind is {kind!r}, not 'randn', 'orthogonal', 'identity'"
    )
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return _unitary(key, shape[:-2]).astype(dtype)
  angle_key, sign_key = jax.random.split(key)
  angle = jax.random.uniform(angle_key, shape[:-2], maxval=2 * math.pi)
  sign = jnp.where(jax.random.bernoulli(sign_key, shape=shape[:-2]), 1.0, -1.0)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _matrices(cos, -sign * sin, sin, sign * cos).astype(dtype)


def fft_twiddle(
  n: int,
  *,
  inverse: bool = False,
  increasing_stride: bool = True,
  dtype: jnp.dtype = jnp.complex64,
) -> jax.Array:
  """The twiddles (1, 1, log2 n, n/2, 2, 2) of a Fourier transform.

  With w = exp(-2 pi i j / 2s) at pair j of stride s, and r = `bit_reversal(n)`,

    fft(x) = butterfly_matmul(x[..., r], t)       [[1, w], [1, -w]], increasing
    fft(x) = butterfly_matmul(x, t)[..., r]       [[1, 1], [w, -w]], decreasing

  Cooley and Tukey, decimated in time and in frequency. The inverse has the
  conjugates, and halves at every stage.

  Raises:
    ValueError: n is no power of two, or below 2.
  """
  _check_size("fft_twiddle", n)
  stages = n.bit_length() - 1
  twiddle = np.zeros((stages, n // 2, 2, 2), np.complex128)
  for stage in range(stages):
    stride = 2 ** (stage if increasing_stride else stages - 1 - stage)
    w = np.exp(
      (2j if inverse else -2j) * np.pi * np.arange(stride) / 2 / stride
    )
    w = np.tile(w, n // 2 // stride)
    one = np.ones_like(w)
    own = [one, w, one, -w] if increasing_stride else [one, one, w, -w]
    twiddle[stage] = np.stack(own, axis=-1).reshape(-1, 2, 2)
  return jnp.asarray(twiddle / (2 if inverse else 1), dtype)[None, None]


def bit_reversal(n: int) -> np.ndarray:
  """The indices (n,) whose binary digits are those of 0, 1, ... reversed.

  Raises:
    ValueError: n is no power of two, or below 2.
  """
  _check_size("bit_reversal", n)
  reversed_ = np.zeros(1, np.int32)
  while len(reversed_) < n:
    reversed_ = np.concatenate([2 * reversed_, 2 * reversed_ + 1])
  return reversed_


def _check_size(name: str, n: int) -> None:
  if n < 2 or n & (n - 1):
    raise ValueError(f"{name}: n is {n}, not a power of two of at least 2")


def _matrices(a, b, c, d) -> jax.Array:
  """[[a, b], [c, d]] on two new axes behind."""
  return jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)


def _unitary(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws from U(2): a uniform phase times a uniform quaternion."""
  quaternion_key, phase_key = jax.random.split(key)
  four = jax.random.normal(quaternion_key, (4, *shape))
  four = four / jnp.linalg.norm(four, axis=0, keepdims=True)
  a, b = jax.lax.complex(four[0], four[1]), jax.lax.complex(four[2], four[3])
  angle = jax.random.uniform(phase_key, shape, maxval=2 * math.pi)
  phase = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
  return _matrices(phase * a, -phase * b.conj(), b, a.conj())
