import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import page_bounds, sparse_attention
from ops.sparse_attention import sparse_attention_reference

EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
PAGE = 4


def make(*, b=2, r=3, t=5, n=2, g=2, d=8, s=24, c=11, dtype="float32", seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    "q": (b, r, t, n * g, d),
    "k": (b, s, n, d),
    "v": (b, s, n, d),
    "suffix_k": (b, r, c, n, d),
    "suffix_v": (b, r, c, n, d),
  }
  arrays = {
    name: jnp.asarray(rng.normal(size=shape), dtype)
    for name, shape in shapes.items()
  }
  keep = rng.choice([0.1, 0.4, 0.7, 1.0], size=(b, r, t))
  arrays["keep"] = jnp.asarray(keep, jnp.float32)
  lengths = PAGE * rng.integers(0, s // PAGE + 1, size=(b, r))
  return arrays, jnp.asarray(lengths, jnp.int32)


@functools.partial(
  jax.jit, static_argnames=("keep_sink_and_current", "shared", "scale")
)
def attend(arrays, lengths, start, **options):
  return sparse_attention(
    **arrays,
    prefix_lengths=lengths,
    query_start=start,
    page_size=PAGE,
    **options,
  )


def to_float64(arrays):
  return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def assert_close(found, expected, dtype, values, length):
  """Sums of `length` rounded products of weights that add up to one."""
  tolerance = 4 * EPSILON[dtype] * np.sqrt(length) * np.abs(values).max()
  found = np.asarray(found, np.float64)
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("sizes", [{}, {"g": 1, "n": 3}, {"c": 12, "d": 5}])
def test_matches_reference(forced, start, sizes):
  arrays, lengths = make(**sizes)
  out = attend(arrays, lengths, start, keep_sink_and_current=forced)
  expected = sparse_attention_reference(
    **to_float64(arrays),
    prefix_lengths=np.asarray(lengths),
    query_start=start,
    page_size=PAGE,
    keep_sink_and_current=forced,
  )
  assert_close(out, expected, "float32", arrays["v"], 35)


def test_heads_of_a_group_may_share_their_pages():
  arrays, lengths = make(seed=3)
  options = {"keep_sink_and_current": True, "shared": True}
  out = attend(arrays, lengths, 3, **options)
  expected = sparse_attention_reference(
    **to_float64(arrays),
    prefix_lengths=np.asarray(lengths),
    query_start=3,
    page_size=PAGE,
    **options,
  )
  assert_close(out, expected, "float32", arrays["v"], 35)
  alone = attend(arrays, lengths, 3, keep_sink_and_current=True)
  assert np.abs(np.asarray(out - alone)).max() > 0.1


@pytest.mark.parametrize("keep", [None, "some"])
def test_windows_match_the_reference(keep):
  """They end in the midst of pages, and at last reach no prefix."""
  arrays, lengths = make(seed=2)
  arrays["keep"] = arrays["keep"] if keep else None
  for behind in (2, 5, 12, 99):
    out = attend(arrays, lengths, 6, keep_sink_and_current=True, behind=behind)
    expected = sparse_attention_reference(
      **to_float64(arrays) | ({} if keep else {"keep": None}),
      prefix_lengths=np.asarray(lengths),
      query_start=6,
      page_size=PAGE,
      keep_sink_and_current=True,
      behind=behind,
    )
    assert_close(out, expected, "float32", arrays["v"], 35)
  whole = attend(arrays, lengths, 6, keep_sink_and_current=True)
  np.testing.assert_allclose(out, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", [None, 1.0])
def test_bfloat16(keep):
  # Selected pages may differ under rounding, so all of them are kept here.
  arrays, lengths = make(dtype="bfloat16")
  if keep is None:
    arrays["keep"] = None
  else:
    arrays["keep"] = jnp.full(arrays["keep"].shape, keep)
  out = attend(arrays, lengths, 4)
  assert out.dtype == jnp.bfloat16
  exact = {k: x for k, x in arrays.items() if k != "keep"}
  expected = sparse_attention_reference(
    **to_float64(exact),
    keep=None,
    prefix_lengths=np.asarray(lengths),
    query_start=4,
    page_size=PAGE,
  )
  values = np.asarray(arrays["v"], np.float64)
  assert_close(out, expected, "bfloat16", values, 35)


def test_bfloat16_selects_the_pages_of_its_own_keys():
  # Keys that differ by whole steps leave no room for rounding.
  arrays, lengths = make(dtype="bfloat16", d=4)
  for name in ("q", "k", "suffix_k"):
    arrays[name] = jnp.round(2 * arrays[name])
  out = attend(arrays, lengths, 4)
  expected = sparse_attention_reference(
    **to_float64(arrays),
    prefix_lengths=np.asarray(lengths),
    query_start=4,
    page_size=PAGE,
  )
  values = np.asarray(arrays["v"], np.float64)
  assert_close(out, expected, "bfloat16", values, 35)


@pytest.mark.parametrize("forced", [False, True])
def test_block_equals_single_steps(forced):
  arrays, lengths = make(t=16, c=16, seed=3)
  block = attend(arrays, lengths, 0, keep_sink_and_current=forced)

  @jax.jit
  def step(q, keep, suffix_k, suffix_v, slot):
    now = {
      **arrays,
      "q": q,
      "keep": keep,
      "suffix_k": suffix_k,
      "suffix_v": suffix_v,
    }
    return attend(now, lengths, slot, keep_sink_and_current=forced)

  filled = jnp.arange(16)[None, None, :, None, None]
  for slot in range(16):
    # Slots not yet written hold other numbers, which must not matter.
    single = step(
      arrays["q"][:, :, slot : slot + 1],
      arrays["keep"][:, :, slot : slot + 1],
      jnp.where(filled <= slot, arrays["suffix_k"], 99.0),
      jnp.where(filled <= slot, arrays["suffix_v"], -99.0),
      slot,
    )
    np.testing.assert_allclose(single[:, :, 0], block[:, :, slot], atol=1e-5)


def test_shared_prefix_equals_repeated_prefix():
  arrays, lengths = make()
  shared = attend(arrays, lengths, 2)
  for rollout in range(3):
    own = {
      name: x if name in "kv" else x[:, rollout : rollout + 1]
      for name, x in arrays.items()
    }
    alone = attend(own, lengths[:, rollout : rollout + 1], 2)
    np.testing.assert_allclose(alone[:, 0], shared[:, rollout], atol=1e-6)


def test_keep_one_is_dense_attention():
  arrays, _ = make(t=11, seed=1)
  lengths = jnp.full((2, 3), 16, jnp.int32)
  ones = {**arrays, "keep": jnp.ones((2, 3, 11))}
  sparse = attend(ones, lengths, 0)
  dense = attend({**arrays, "keep": None}, lengths, 0)
  np.testing.assert_array_equal(sparse, dense)
  for rollout in range(3):
    k = [arrays["k"][:, :16], arrays["suffix_k"][:, rollout]]
    v = [arrays["v"][:, :16], arrays["suffix_v"][:, rollout]]
    mask = jnp.arange(27)[None] <= 16 + jnp.arange(11)[:, None]
    expected = jax.nn.dot_product_attention(
      arrays["q"][:, rollout],
      jnp.concatenate(k, axis=1),
      jnp.concatenate(v, axis=1),
      mask=mask[None, None],
    )
    np.testing.assert_allclose(dense[:, rollout], expected, atol=1e-5)


def test_equal_keys_keep_every_page():
  arrays, lengths = make()
  ones = {"k": jnp.ones((2, 24, 2, 8)), "suffix_k": jnp.ones((2, 3, 11, 2, 8))}
  # Whole numbers, because scores tie only where they are exact.
  tied = {**arrays, **ones, "q": jnp.round(arrays["q"])}
  dense = {**tied, "keep": None}
  np.testing.assert_array_equal(
    attend(tied, lengths, 6), attend(dense, lengths, 6)
  )


def test_one_page_is_kept_at_the_smallest_share():
  arrays, _ = make(b=1, r=1, t=1, n=1, g=1, d=2)
  arrays["q"] = jnp.ones((1, 1, 1, 1, 2))
  arrays["k"] = jnp.zeros((1, 24, 1, 2)).at[0, 9].set(1.0)
  arrays["suffix_k"] = jnp.full((1, 1, 11, 1, 2), -1.0)
  arrays["keep"] = jnp.full((1, 1, 1), 0.1)
  out = attend(arrays, jnp.full((1, 1), 24, jnp.int32), 0, scale=0.0)
  expected = arrays["v"][0, 8:12, 0].mean(0)
  np.testing.assert_allclose(out[0, 0, 0, 0], expected, atol=1e-6)


def test_precomputed_bounds_change_nothing():
  arrays, lengths = make()
  bounds = page_bounds(arrays["k"], page_size=PAGE)
  np.testing.assert_array_equal(
    attend(arrays, lengths, 2, bounds=bounds), attend(arrays, lengths, 2)
  )


@pytest.mark.parametrize("dense", [False, True])
def test_gradient_against_finite_differences(dense):
  with jax.enable_x64(True):
    arrays, lengths = make(dtype="float64", t=2, seed=5)
    keep = None if dense else arrays["keep"]
    names = ["q", "k", "v", "suffix_k", "suffix_v"]
    values = [arrays[name] for name in names]
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 2, 4, 8)))

    @jax.jit
    def loss(*values):
      now = {**dict(zip(names, values)), "keep": keep}
      return jnp.sum(attend(now, lengths, 6) * weight)

    gradients = jax.grad(loss, argnums=range(5))(*values)
    rng = np.random.default_rng(2)
    # Logits are accumulated in float32, which bounds the difference quotient.
    step = 1e-2
    for index, gradient in enumerate(gradients):
      direction = jnp.asarray(rng.normal(size=gradient.shape))
      direction = direction / jnp.linalg.norm(direction.ravel())
      ends = []
      for sign in (1, -1):
        moved = list(values)
        moved[index] = moved[index] + sign * step * direction
        ends.append(loss(*moved))
      quotient = (ends[0] - ends[1]) / (2 * step)
      np.testing.assert_allclose(
        jnp.vdot(gradient, direction), quotient, rtol=2e-3, atol=2e-4
      )


def test_gradients_are_finite_and_masked():
  arrays, lengths = make()

  def loss(suffix_k, v):
    now = {**arrays, "suffix_k": suffix_k, "v": v}
    return jnp.sum(jnp.square(attend(now, lengths, 2)))

  of_keys, of_values = jax.jit(jax.grad(loss, argnums=(0, 1)))(
    arrays["suffix_k"], arrays["v"]
  )
  assert jnp.isfinite(of_keys).all() and jnp.isfinite(of_values).all()
  np.testing.assert_array_equal(of_keys[:, :, 7:], 0.0)
  for row in range(2):
    end = int(lengths[row].max())
    np.testing.assert_array_equal(of_values[row, end:], 0.0)


def test_vmap_matches_loop():
  arrays, lengths = make()
  stacked = jax.tree.map(lambda x: jnp.stack([x, x + 0.5 * (x < 0)]), arrays)
  mapped = jax.vmap(lambda a: attend(a, lengths, 3))(stacked)
  for index in range(2):
    one = attend(jax.tree.map(lambda x, i=index: x[i], stacked), lengths, 3)
    np.testing.assert_allclose(mapped[index], one, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "shape", "message"),
  [
    ("v", (2, 24, 1, 8), "v is"),
    ("keep", (2, 3), "keep is"),
    ("suffix_v", (2, 3, 10, 2, 8), "suffix_v is"),
  ],
)
def test_wrong_shapes_are_named(name, shape, message):
  arrays, lengths = make()
  with pytest.raises(ValueError, match=message):
    attend({**arrays, name: jnp.zeros(shape)}, lengths, 0)


def test_prefix_that_does_not_fill_pages_is_refused():
  arrays, lengths = make(s=22)
  with pytest.raises(ValueError, match="22 prefix slots"):
    attend(arrays, lengths, 0)
