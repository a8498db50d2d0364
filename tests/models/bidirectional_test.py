import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import bidirectional

B, L, H, N, K = 2, 9, 4, 2, 8


def heads(seed=0, scale=1.0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = [(B, L, H, K), (B, L, N, K), (B, L, N, K)]
  return [scale * jax.random.normal(k, s) for k, s in zip(keys, shapes)]


def mask():
  return jnp.arange(L)[None] < jnp.array([L, 5])[:, None]


def weighted(q, k, v, weight):
  """Attention with `weight(q, k)` as plain loops."""
  out = np.zeros((B, L, H, K))
  seen = np.asarray(mask())
  for b in range(B):
    for t in range(L):
      for h in range(H):
        n = h * N // H
        w = np.array([weight(q[b, t, h], k[b, j, n]) for j in range(L)])
        w = w * seen[b]
        out[b, t, h] = w @ np.asarray(v[b, :, n], np.float64) / w.sum()
  return out


def test_linear_attention_is_the_sum_it_stands_for():
  q, k, v = heads()
  attend = bidirectional.linear_attend(mask(), bidirectional.elu_features)
  phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
  expected = weighted(
    *(np.asarray(x) for x in (q, k, v)), lambda q, k: phi(q) @ phi(k)
  )
  found, _ = attend(q, k, v, None)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_full_attention_is_softmax_over_the_mask():
  q, k, v = heads()
  expected = weighted(
    *(np.asarray(x, np.float64) for x in (q, k, v)),
    lambda q, k: np.exp(q @ k / np.sqrt(K)),
  )
  found, _ = bidirectional.full_attend(mask())(q, k, v, None)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_random_features_come_near_softmax_with_their_number():
  q, k, v = heads(scale=0.4)
  exact, _ = bidirectional.full_attend(mask())(q, k, v, None)
  errors = []
  for number in (16, 256, 4096):
    features = bidirectional.favor_features(K, number)
    found, _ = bidirectional.linear_attend(mask(), features)(q, k, v, None)
    errors.append(float(jnp.sqrt(jnp.mean((found - exact) ** 2))))
  # The error of a mean falls with the root, by 4 each time; exponentials of
  # Gaussians have long tails, so that one draw may be off by half of that.
  assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2
  assert errors[2] < 0.02


def test_random_features_are_unbiased_and_finite_far_out():
  x, y = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, K)) * 0.3
  directions = bidirectional.orthogonal_gaussian(1 << 15, K, 0)
  phi = lambda x: jnp.exp(directions @ x[0, 0, 0] - x[0, 0, 0] @ x[0, 0, 0] / 2)
  estimate = jnp.mean(phi(x) * phi(y))
  exact = jnp.exp(jnp.sum(x * y))
  assert abs(estimate / exact - 1) < 0.05
  far = [300.0 * z for z in heads()]
  features = bidirectional.favor_features(K, 32)
  found, _ = bidirectional.linear_attend(mask(), features)(*far, None)
  assert jnp.isfinite(found).all()


def test_directions_are_orthogonal_in_blocks_with_gaussian_lengths():
  rows = bidirectional.orthogonal_gaussian(4000, K, 5)
  gram = rows[:K] @ rows[:K].T
  np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5)
  # The mean square of K normals is 1, its deviation over 4000 rows below .01.
  assert abs(np.mean(rows**2) - 1) < 0.05
  with pytest.raises(AssertionError):
    np.testing.assert_array_equal(
      rows, bidirectional.orthogonal_gaussian(4000, K, 6)
    )
