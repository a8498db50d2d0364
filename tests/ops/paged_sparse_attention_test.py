"""`paged_sparse_attention` against float64, dense attention, and its memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.paged_sparse_attention import (
  KINDS,
  page_summary,
  paged_sparse_attention,
  paged_sparse_attention_reference,
  update_page_summary,
)
from tests.ops.sequence_op import assert_close, tolerance

PAGE = 4
summarize = jax.jit(page_summary, static_argnames=("page_size", "kind"))
update = jax.jit(update_page_summary)


def make(
  seed=0, *, batch=3, heads=4, kv_heads=2, size=8, slots=32, page=PAGE,
  lengths=(30, 9, 1), kind="bounds", dtype="float32",
):  # fmt: skip
  """Arrays of a call, the scores of whose pages differ."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  q = normal(batch, heads, size)
  # Pages lie around means of their own, so that few scores are near another.
  means = rng.normal(size=(batch, slots // page, 1, kv_heads, size))
  keys = 0.3 * rng.normal(size=(batch, slots // page, page, kv_heads, size))
  keys = jnp.asarray(keys + means, dtype).reshape(batch, slots, kv_heads, size)
  values = normal(batch, slots, kv_heads, size)
  lengths = jnp.asarray(lengths, jnp.int32)
  summary = summarize(keys, lengths, page_size=page, kind=kind)
  return q, keys, values, summary, lengths


def all_pages_equal(arrays, row):
  """The arrays with the row's first page of keys in the place of all pages."""
  q, keys, values, summary, lengths = arrays
  page = keys.shape[1] // summary.first.shape[1]
  same = jnp.tile(keys[row, :page], (keys.shape[1] // page, 1, 1))
  keys = keys.at[row].set(same)
  summary = summarize(keys, lengths, page_size=page, kind=summary.kind)
  return q, keys, values, summary, lengths


@functools.partial(jax.jit, static_argnames="max_pages")
def attend(q, keys, values, summary, lengths, num_pages, max_pages=None):
  return paged_sparse_attention(
    q, keys, values, summary, lengths, num_pages, max_pages=max_pages
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_float64_loop(kind, dtype):
  arrays = make(kind=kind, dtype=dtype)
  # One program: budgets differ between rows and heads, and from call to call.
  for num_pages in ([[3, 5], [2, 3], [4, 4]], [[1, 9], [0, 2], [3, 2]]):
    num_pages = np.asarray(num_pages, np.int32)
    found = attend(*arrays, num_pages, max_pages=5)
    expected = paged_sparse_attention_reference(*arrays, num_pages, max_pages=5)
    assert found.dtype == dtype
    assert_close(found, expected, tolerance(dtype, 32))


def test_of_equal_scores_the_earlier_page_wins():
  arrays = all_pages_equal(make(lengths=(32, 9, 1)), row=0)
  num_pages = np.full((3, 2), 4, np.int32)
  found = attend(*arrays, num_pages, max_pages=5)
  expected = paged_sparse_attention_reference(*arrays, num_pages, max_pages=5)
  assert_close(found, expected, tolerance("float32", 32))


def test_all_pages_are_dense_attention():
  q, keys, values, summary, _ = make()
  lengths = jnp.asarray([30, 9, 0], jnp.int32)
  found = attend(q, keys, values, summary, lengths, np.int32(8))
  dense = jax.jit(jax.nn.dot_product_attention)(
    q[:, None], keys, values, key_value_seq_lengths=lengths
  )[:, 0]
  assert_close(found[:2], dense[:2], tolerance("float32", 32))
  # A row that holds nothing.
  np.testing.assert_array_equal(found[2], np.zeros_like(found[2]))


def test_pages_that_are_not_kept_are_not_read():
  q, keys, values, summary, lengths = make()
  expected = attend(q, keys, values, summary, lengths, np.int32(2), max_pages=5)
  slots = np.arange(keys.shape[1])[None]
  page, last = slots // PAGE, (np.asarray(lengths)[:, None] - 1) // PAGE
  kept = ((page == 0) | (page == last))[..., None, None]
  behind = (slots >= np.asarray(lengths)[:, None])[..., None, None]
  spoil = lambda x: jnp.where(kept, jnp.where(behind, 1e4, x), jnp.nan)
  found = attend(
    q, spoil(keys), spoil(values), summary, lengths, np.int32(2), max_pages=5
  )
  np.testing.assert_array_equal(found, expected)


def test_no_product_reads_a_whole_cache():
  batch, slots, heads, size = 2, 512, 2, 16
  arrays = make(
    batch=batch, slots=slots, size=size, lengths=(512, 300), page=16
  )
  lowered = attend.lower(*arrays, np.int32(4), max_pages=8)
  cache = batch * slots * heads * size
  found = dict.fromkeys(("gather", "dot"), 0)
  for line in lowered.compile().as_text().splitlines():
    match = re.match(
      r"\s*(?:ROOT )?%?\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", line
    )
    if match is None or match[2] in ("parameter", "bitcast", "reshape"):
      continue
    count = math.prod(int(x) for x in match[1].split(",") if x)
    # Nothing of a cache's size is made; what is gathered is a quarter of it.
    assert count <= cache // 4, line
    for name in found:
      found[name] += match[2] == name
  assert found["gather"] >= 2, found
  assert 0 < found["dot"]


def test_gradients_are_those_of_the_kept_tokens():
  q, keys, values, summary, lengths = make()

  def loss(q, keys, values, all_pages):
    count = jnp.where(all_pages, 8, 3).astype(jnp.int32)
    out = paged_sparse_attention(q, keys, values, summary, lengths, count)
    return jnp.sum(jnp.sin(out))

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  dense = gradients(q, keys, values, True)
  sparse = gradients(q, keys, values, False)

  def plain(q, keys, values):
    out = jax.nn.dot_product_attention(
      q[:, None], keys, values, key_value_seq_lengths=lengths
    )
    return jnp.sum(jnp.sin(out))

  expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(q, keys, values)
  assert_close(dense, expected, 4 * tolerance("float32", 32))
  # Three of four pages a head of the first row have none.
  touched = np.any(np.asarray(sparse[2])[0] != 0, axis=-1)
  assert touched.reshape(8, PAGE, -1).any(axis=1).sum(axis=0).tolist() == [3, 3]


def test_vmap_is_a_call_each():
  arrays = make()
  twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), arrays)
  counts = jnp.asarray([3, 5], jnp.int32)
  run = lambda arrays, count: paged_sparse_attention(
    *arrays, count, max_pages=5
  )
  found = jax.jit(jax.vmap(run))(twice, counts)
  backwards = jax.tree.map(lambda x: x[::-1], arrays)
  for one, own, count in zip(found, (arrays, backwards), counts):
    expected = attend(*own, count, max_pages=5)
    assert_close(one, expected, tolerance("float32", 32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_is_kept_up_token_by_token(kind):
  keys = make()[1]
  lengths = jnp.zeros(3, jnp.int32)
  summary = summarize(keys, lengths, page_size=PAGE, kind=kind)
  assert not np.any(summary.first)
  for step in range(12):
    # The second row has begun later, and the third holds nothing yet.
    lengths = jnp.asarray([step + 1, max(step - 2, 0), 0], jnp.int32)
    summary = update(summary, keys, lengths)
    expected = summarize(keys, lengths, page_size=PAGE, kind=kind)
    assert_close(summary, expected, tolerance("float32", PAGE))


def test_a_summary_forgets_tokens_that_are_taken_back():
  keys = make()[1]
  lengths = jnp.asarray([7, 6, 10], jnp.int32)
  summary = summarize(keys, lengths, page_size=PAGE)
  back = jnp.asarray([6, 5, 9], jnp.int32)
  found = update(summary, keys, back)
  expected = summarize(keys, back, page_size=PAGE)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(one, other)


def test_moments_are_those_of_numpy():
  _, keys, _, summary, _ = make(kind="moments", lengths=(32, 32, 32))
  paged = np.asarray(keys, np.float64).reshape(3, 8, PAGE, 2, 8)
  assert_close(summary.first, paged.mean(axis=2), tolerance("float32", PAGE))
  assert_close(summary.second, paged.std(axis=2), tolerance("float32", PAGE))


def test_what_does_not_fit_is_refused():
  q, keys, values, summary, lengths = make()
  run = lambda *arrays, **options: paged_sparse_attention(*arrays, 3, **options)
  for arrays, options, message in (
    ((q[0], keys, values, summary, lengths), {}, "are not"),
    ((q[:, :3], keys, values, summary, lengths), {}, "3 query heads"),
    ((q, keys, values[:, :4], summary, lengths), {}, "values is"),
    ((q, keys[:, :30], values[:, :30], summary, lengths), {}, "no 8 pages"),
    ((q, keys, values, summary, lengths[:1]), {}, "lengths is"),
    ((q, keys, values, summary, lengths), {"max_pages": 1}, "always kept"),
  ):
    with pytest.raises(ValueError, match=message):
      run(*arrays, **options)
  with pytest.raises(ValueError, match="num_pages is"):
    paged_sparse_attention(*make(), jnp.ones((2,), jnp.int32))
  with pytest.raises(ValueError, match="take one of bounds, moments"):
    page_summary(keys, lengths, page_size=PAGE, kind="median")
  with pytest.raises(ValueError, match="do not fill"):
    page_summary(keys, lengths, page_size=5)
