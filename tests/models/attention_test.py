import jax
import jax.numpy as jnp
import numpy as np

from models import attention


def data(queries, keys):
  names = jax.random.split(jax.random.key(0), 3)
  shapes = ((2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))
  return [jax.random.normal(k, s) for k, s in zip(names, shapes)]


def test_only_the_first_keys_are_seen():
  q, k, v = data(3, 5)
  lengths = jnp.array([5, 2], jnp.int32)
  found = attention.attend_to_text(q, k, v, lengths)
  for row, length in enumerate((5, 2)):
    alone = attention.attend_to_text(
      q[row, None],
      k[row, None, :length],
      v[row, None, :length],
      jnp.array([length], jnp.int32),
    )
    # Sums of five products in float32.
    np.testing.assert_allclose(found[row], alone[0], rtol=1e-5, atol=1e-6)


def test_without_a_gpu_there_is_no_kernel(monkeypatch):
  assert not attention.cudnn_runs(4, 2, 8, "bfloat16")
  assert not attention.cudnn_runs(4, 2, 8, "float32")


def test_the_kernel_is_for_many_even_scores(monkeypatch):
  asked = []
  monkeypatch.setattr(attention, "cudnn_runs", lambda *a: asked.append(a))
  for queries, keys in ((2, 64), (7, 8192), (64, 512)):
    jax.eval_shape(
      attention.attend_to_text, *data(queries, keys), jnp.ones(2, jnp.int32)
    )
  assert asked == [(4, 2, 8, "float32")]


def test_many_scores_go_in_blocks_of_queries(monkeypatch):
  q, k, v = data(7, 8)
  lengths = jnp.array([8, 3], jnp.int32)

  def loss(q, k, v):
    return jnp.sum(attention.attend_to_text(q, k, v, lengths) ** 2)

  whole = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
  # Three queries at a time: the last block has one, and padding.
  monkeypatch.setattr(attention, "_MOST_SCORES", 3 * 2 * q.shape[2] * 8)
  blocks = jax.value_and_grad(loss, (0, 1, 2))
  assert "scan" in str(jax.make_jaxpr(blocks)(q, k, v))
  for found, expected in zip(
    jax.tree.leaves(blocks(q, k, v)), jax.tree.leaves(whole)
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
