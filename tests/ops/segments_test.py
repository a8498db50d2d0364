import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import segments


def resets_by_hand(ids):
  found = np.zeros(ids.shape, bool)
  for row, row_ids in enumerate(ids):
    last = None
    for t, value in enumerate(row_ids):
      if value >= 0:
        found[row, t] = last is not None and value != last
        last = value
  return found


def test_known_rows():
  ids = jnp.asarray(
    [
      [-1, -1, 4, 4, -1, 4, 5],
      [0, 0, 0, 1, 1, -1, -3],
      [-1, -2, -1, -1, -1, -1, -1],
      [2, -1, 3, 2, 2, 2, 7],
    ],
    jnp.int32,
  )
  found = np.asarray(segments.resets(ids))
  expected = np.zeros((4, 7), bool)
  for row, slot in [(0, 6), (1, 3), (3, 2), (3, 3), (3, 6)]:
    expected[row, slot] = True
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(segments.is_padding(ids), np.asarray(ids) < 0)


@pytest.mark.parametrize("seed", range(3))
def test_random_rows_match_a_loop(seed):
  ids = np.random.default_rng(seed).integers(-2, 3, (5, 23)).astype(np.int32)
  found = jax.jit(segments.resets)(jnp.asarray(ids))
  np.testing.assert_array_equal(found, resets_by_hand(ids))


def test_padding_is_zeroed_with_what_it_holds():
  ids = jnp.asarray([[-1, 0, 0]], jnp.int32)
  x = jnp.full((1, 3, 2, 2), jnp.nan).at[:, 1:].set(3.0)
  found = segments.zero_padding(x, ids)
  np.testing.assert_array_equal(found[0, :, 0, 0], [0, 3, 3])
  gradient = jax.grad(lambda x: jnp.sum(segments.zero_padding(x, ids)))(x)
  np.testing.assert_array_equal(gradient[0, :, 0, 0], [0, 1, 1])
  assert segments.zero_padding(x, None) is x


def test_ids_are_checked():
  segments.check("op", None, 2, 3)
  segments.check("op", jnp.zeros((2, 3), jnp.int32), 2, 3)
  with pytest.raises(ValueError, match=r"op: segment_ids are \(3, 2\), not"):
    segments.check("op", jnp.zeros((3, 2), jnp.int32), 2, 3)
  with pytest.raises(ValueError, match="float32, not int32"):
    segments.check("op", jnp.zeros((2, 3)), 2, 3)
