import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import top_mask
from ops.ceil_share import ceil_share

METHODS = {
  "chosen": top_mask.top_mask,
  "rank": top_mask._by_rank,
  "bisection": top_mask._by_bisection,
  "radix": top_mask._by_radix,
}


def reference(x, count):
  x = np.asarray(x, np.float64)
  greater = (x[..., None, :] > x[..., :, None]).sum(-1)
  return greater < np.asarray(count)[..., None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1, 7, 66])
def test_every_method_is_exact(method, dtype, size):
  rng = np.random.default_rng(size)
  x = jnp.asarray(rng.normal(size=(5, 3, size)) * 100, dtype)
  count = rng.integers(-1, size + 2, size=(5, 3)).astype(np.int32)
  mask = jax.jit(METHODS[method])(x, jnp.asarray(count))
  np.testing.assert_array_equal(mask, reference(x, count))


@pytest.mark.parametrize("method", METHODS)
def test_ties_infinities_and_signed_zeros(method):
  inf = np.inf
  x = jnp.asarray(
    [
      [1.0, 1.0, 1.0, 0.5, 2.0],
      [0.0, -0.0, 0.0, -0.0, -1.0],
      [-inf, -inf, 3.0, -inf, inf],
      [-3.0, -2.0, -2.0, -1.0, -1e-40],
    ],
    jnp.float32,
  )
  for count in range(6):
    counts = jnp.full((4,), count, jnp.int32)
    mask = METHODS[method](x, counts)
    expected = reference(x, counts)
    # Subnormals may be flushed: the last row is checked up to that.
    np.testing.assert_array_equal(mask, expected, err_msg=f"count {count}")


def test_vmap_matches_batch():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(6, 40)), jnp.float32)
  count = jnp.arange(0, 42, 7, dtype=jnp.int32)
  np.testing.assert_array_equal(
    jax.vmap(top_mask.top_mask)(x, count), top_mask.top_mask(x, count)
  )


@pytest.mark.parametrize(
  ("share", "total", "count"),
  [(0.1, 520, 52), (0.1, 521, 53), (1.0, 7, 7), (0.45, 576, 260), (0.3, 1, 1)],
)
def test_ceil_share(share, total, count):
  assert int(ceil_share(share, total)) == count


def test_ceil_share_over_whole_tables():
  tenths = np.arange(1, 11)
  totals = np.arange(1, 2049)
  expected = -(-tenths[:, None] * totals // 10)
  shares = jnp.asarray(tenths / 10, jnp.float32)[:, None]
  counts = jax.jit(functools.partial(ceil_share))(shares, totals[None])
  np.testing.assert_array_equal(counts, expected)
