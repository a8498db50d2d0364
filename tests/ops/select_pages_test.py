import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import page_bounds, page_scores, select_pages
from ops.select_pages import select_pages_reference

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def make(shape, dtype="float32", seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bounds_and_scores(dtype):
  q, k = make((2, 5, 6, 8), dtype), make((2, 12, 3, 8), dtype, seed=1)
  low, high = page_bounds(k, page_size=4)
  assert low.shape == high.shape == (2, 3, 3, 8)
  scores = jax.jit(page_scores)(q, low, high)
  assert scores.shape == (2, 5, 6, 3) and scores.dtype == jnp.float32
  q64, k64 = np.asarray(q, np.float64), np.asarray(k, np.float64)
  for b, t, h, p in np.ndindex(2, 5, 6, 3):
    page = k64[b, 4 * p : 4 * p + 4, h // 2]
    products = q64[b, t, h] * page
    bound = products.max(0).sum()
    size = np.abs(products).max(0).sum()
    assert abs(scores[b, t, h, p] - bound) <= 8 * EPSILON["float32"] * size
    assert scores[b, t, h, p] >= products.sum(-1).max() - 1e-5


def test_bounds_of_an_unfilled_page_are_refused():
  with pytest.raises(ValueError, match="pages of 4"):
    page_bounds(make((1, 10, 1, 8)), page_size=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pages", [1, 5, 33])
@pytest.mark.parametrize("forced", [False, True])
def test_matches_reference(dtype, pages, forced):
  rng = np.random.default_rng(pages)
  # Few distinct values, so that ties are common.
  scores = jnp.asarray(rng.integers(-4, 4, (6, 4, pages)) / 2, dtype)
  num_pages = rng.integers(0, pages + 2, (6, 4))
  valid = rng.random((6, 4, pages)) < 0.7
  always = rng.random((6, 4, pages)) < 0.2 if forced else None
  kept = jax.jit(select_pages)(scores, num_pages, valid=valid, always=always)
  expected = select_pages_reference(
    np.asarray(scores, np.float64), num_pages, valid=valid, always=always
  )
  np.testing.assert_array_equal(kept, expected)


def test_keeps_ties():
  scores = jnp.asarray([1.0, 3.0, 1.0, 1.0, 0.0])
  kept = select_pages(scores, 2, valid=jnp.ones(5, bool))
  np.testing.assert_array_equal(kept, [True, True, True, True, False])


def test_forced_pages_use_up_the_budget():
  scores = jnp.asarray([0.0, 4.0, 3.0, 2.0, 1.0])
  valid = jnp.asarray([True, True, True, True, False])
  always = jnp.asarray([True, False, False, True, True])
  kept = [
    select_pages(scores, n, valid=valid, always=always).tolist()
    for n in (1, 3, 4)
  ]
  assert kept == [
    [True, False, False, True, False],
    [True, True, False, True, False],
    [True, True, True, True, False],
  ]


def test_vmap_matches_batch():
  scores, valid = make((6, 4, 9)), make((6, 4, 9), seed=1) > -0.5
  num_pages = jnp.arange(6)
  batch = select_pages(scores, num_pages[:, None], valid=valid)
  mapped = jax.vmap(lambda s, n, v: select_pages(s, n, valid=v))
  np.testing.assert_array_equal(mapped(scores, num_pages, valid), batch)
