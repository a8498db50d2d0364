"""The sums along chunks of the Mosaic GPU `ssd`, interpreted."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest

from ops.ssd import mosaic_gpu_decays as decays
from ops.ssd.mosaic_gpu_decays import CHUNK

# Rows that are fewer than a thread block takes, and no multiple of them.
SHAPES = [(1, 3, 2 * CHUNK), (2, 5, 7 * CHUNK)]
INTERPRETED = {"interpret": plgpu.InterpretGPUParams()}
ULP = 2.0**-24


def chunked(v):
  return np.asarray(v, np.float64).reshape(*v.shape[:2], -1, CHUNK)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("forgotten", [0.0, 0.3, 1.0])
def test_decays_are_rounded_once(shape, forgotten):
  """However many tokens of a chunk forget the state, exp(-128)."""
  rng = np.random.default_rng(0)
  log_decay = -rng.exponential(size=shape)
  log_decay[rng.uniform(size=shape) < forgotten] = -128
  dt = rng.exponential(size=shape)
  dt[:, :, ::7] = 0
  log_decay, dt = log_decay.astype(np.float32), dt.astype(np.float32)
  run = jax.jit(functools.partial(decays.chunk_decays, **INTERPRETED))
  cum, cum_dt, dt_again = np.moveaxis(np.asarray(run(log_decay, dt)), 3, 0)

  # Each log decay is rounded once in base 2, what is left of it below 1 is
  # summed in float32, and the whole is rounded.
  exact = np.cumsum(chunked(log_decay), axis=-1) * np.log2(np.e)
  bound = 2 * ULP * np.abs(exact) + ULP * CHUNK**1.5
  assert (np.abs(cum - exact) <= bound).all()
  np.testing.assert_array_equal(dt_again, chunked(dt))
  with np.errstate(divide="ignore"):
    log_dt = np.log2(chunked(dt))
  np.testing.assert_array_equal(np.isinf(cum_dt), log_dt == -np.inf)
  assert cum_dt.max() == np.inf
  some = np.isfinite(log_dt)
  error = np.abs(cum_dt[some] - (exact - log_dt)[some])
  assert (error <= (2 * bound)[some] + 8 * ULP * np.abs(log_dt[some])).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_sums_along_chunks(shape):
  b, h, length = shape
  rng = np.random.default_rng(1)
  size = b, h, length // CHUNK, 4, CHUNK
  # As far apart as the paths of a chunk are.
  sums = rng.normal(size=size) * np.exp(rng.normal(0, 3, size))
  sums = sums.astype(np.float32)
  run = jax.jit(functools.partial(decays.decay_gradients, **INTERPRETED))
  found = run(sums)
  assert found.shape == shape and found.dtype == np.float32
  into, across, within, out = np.moveaxis(sums.astype(np.float64), 3, 0)
  expected = (
    np.cumsum((into - within)[..., ::-1], axis=-1)[..., ::-1]
    + np.cumsum(out, axis=-1)
    - out
    + across.sum(-1, keepdims=True)
  )
  scale = np.abs(sums).sum((3, 4))[..., None]
  assert (np.abs(chunked(found) - expected) <= 4 * ULP * scale).all()


def test_what_nothing_crosses_has_no_gradient():
  """Only the last token goes out of its chunk: no rounding error is left."""
  sums = np.zeros((1, 64, 1, 4, CHUNK), np.float32)
  sums[..., 3, -1] = np.random.default_rng(2).normal(size=(1, 64, 1))
  found = decays.decay_gradients(sums, **INTERPRETED)
  np.testing.assert_array_equal(found, 0)
