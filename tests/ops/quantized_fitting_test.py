"""Codebooks that tensors fit to themselves, and scales that clip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models.convert import quantized as files
from ops import dequantize, quantize
from ops.quantized import FORMATS, Searched, absmax, codebooks, fitting
from research.quantization.format_errors import lloyd_max

CLIPPED = ["int4_asym", "sf4", "bitmod4", "mxfp4", "nvfp4"]


@functools.cache
def t_draws(nu):
  """(256, 1024) of Student's t."""
  rng = np.random.default_rng(nu)
  return rng.standard_t(nu, (256, 1024)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("name", "observer"))
def round_trip(x, name, observer=absmax):
  q = quantize(x, name, observer=observer)
  return q, jnp.sum(jnp.square(dequantize(q) - x))


@pytest.mark.parametrize("nu", [3, 5, 10])
def test_fitted_levels_are_those_of_least_error(nu):
  """Within 2% of Lloyd-Max of the same blocks, where quantiles are not."""
  x = t_draws(nu)
  least = lloyd_max(x, 16)
  error = {
    name: float(round_trip(x, name)[1]) / least
    for name in ("lloyd4", "sf4_fit", "sf4", "nf4", "af4")
  }
  assert 0.999 < error["lloyd4"] < 1.02
  assert min(error["sf4_fit"], error["sf4"], error["nf4"]) > 1.02
  assert (error["sf4_fit"] < error["nf4"]) == (nu < 10)


def test_fitted_levels_of_three_bits():
  x = t_draws(5)
  ratio = float(round_trip(x, "lloyd3")[1]) / lloyd_max(x, 8)
  assert 0.999 < ratio < 1.02


def test_quantiles_are_those_of_the_likeliest_t():
  delta = (1 / 32 + 1 / 30) / 2
  low, high = np.linspace(delta, 0.5, 8), np.linspace(0.5, 1 - delta, 9)[1:]
  for nu in (3, 5, 10):
    points = special.stdtrit(nu, np.concatenate([low, high]))
    expected = points / np.abs(points).max()
    found = fitting.quantiles(jnp.float32(nu), 4)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    seen = fitting.degrees_of_freedom(jnp.asarray(t_draws(nu)[:16].ravel()))
    assert float(seen) == pytest.approx(nu, rel=0.25)
  np.testing.assert_allclose(
    fitting.quantiles(jnp.float32(5), 3), codebooks.SF3, atol=2e-6
  )


def test_levels_of_af4_are_medians_of_their_cells():
  """Of normal numbers over the largest magnitude of 64 (numeric integral)."""
  largest = np.linspace(0.5, 8, 2001)
  inside = special.erf(largest / np.sqrt(2))
  density = inside**63 * np.exp(-(largest**2) / 2)
  density /= density.sum()
  at = np.linspace(-1, 1, 8001)
  whole = special.ndtr(at[:, None] * largest) - special.ndtr(-largest)
  share = (density * whole / inside).sum(1)
  book = np.asarray(codebooks.AF4)
  middles = np.concatenate([[-1], (book[1:] + book[:-1]) / 2, [1]])
  ends = np.interp(middles, at, share)
  medians = np.interp((ends[1:] + ends[:-1]) / 2, share, at)
  # The levels beside zero and the ends, which are given, meet fixed ones.
  free = [1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14]
  np.testing.assert_allclose(medians[free], book[free], atol=2e-4)


@pytest.mark.parametrize("name", CLIPPED)
def test_a_searched_scale_leaves_no_block_worse(name):
  x = t_draws(3)[:32]
  errors, values = [], jax.jit(dequantize)
  for observer in (absmax, Searched()):
    q, _ = round_trip(x, name, observer)
    error = np.square(np.asarray(values(q)) - x)
    errors.append(error.reshape(-1, FORMATS[name].group).sum(1))
  plain, searched = errors
  assert searched.sum() < 0.98 * plain.sum()
  # Scales of a second level move with all others.
  if FORMATS[name].scale_format is None:
    assert np.all(searched <= plain * (1 + 1e-5))
  with pytest.raises(ValueError, match="not in"):
    Searched((2.5,))


def test_levels_of_a_tensor_go_where_it_goes():
  x = jnp.asarray(np.stack([t_draws(3)[:128, :256], t_draws(10)[:128, :256]]))
  run = lambda x: quantize(x, "lloyd4", axis=-2)
  q = jax.jit(jax.vmap(run))(jnp.swapaxes(x, 1, 2))
  q.check()
  assert q.book.shape == (2, 1, 16) and not np.allclose(q.book[0], q.book[1])
  assert q.nbytes == x.size / 2 + 2 * x.size / 128 + 2 * 16 * 4
  # Not compiled whole, each of its dozens of small steps is a program.
  values = jax.jit(dequantize)
  back = np.asarray(values(q))
  one = jax.tree.map(np.asarray, q[1])
  np.testing.assert_array_equal(values(q[1]), back[1])
  np.testing.assert_array_equal(values(q[:, :, 2:5]), back[:, :, 2:5])
  arrays, text = files.to_arrays({"w": one})
  read = files.Quantized(text, list(arrays), "file").read("w", arrays.get)
  jax.tree.map(np.testing.assert_array_equal, read, one)
  with pytest.raises(ValueError, match="cannot be rounded stochastically"):
    quantize(x[0], "sf4_fit", noise=jnp.zeros(x[0].shape))
