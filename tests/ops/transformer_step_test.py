"""`transformer_step` against float64, its memory, and its checks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.paged_sparse_attention import KINDS, KeptPages, page_summary
from ops.transformer_step import (
  TransformerWeights,
  transformer_step,
  transformer_step_reference,
  xla,
)
from tests.ops.sequence_op import assert_close, tolerance

EPS = 1e-5


def make(
  seed, *, layers=2, batch=3, count=1, width=24, heads=4, kv_heads=2, size=8,
  hidden=40, slots=16, dtype="float32", extras=False,
):  # fmt: skip
  """Arrays of a step; rows have read different numbers of tokens.

  With `extras` there are biases, and norms of queries and keys.
  """
  rng = np.random.default_rng(seed)

  def normal(*shape, scale=1.0, mean=0.0):
    found = mean + scale * rng.normal(size=shape)
    return jnp.asarray(found, "float32").astype(dtype)

  matrix = lambda *shape: normal(layers, *shape, scale=shape[0] ** -0.5)
  scale = lambda size: normal(layers, size, scale=0.1, mean=1.0)
  q_size, kv_size = heads * size, kv_heads * size
  more = {}
  if extras:
    more = {"q_norm": scale(size), "k_norm": scale(size)}
    for one, features in (("q", q_size), ("k", kv_size), ("v", kv_size)):
      more[f"{one}_bias"] = normal(layers, features)
  weights = TransformerWeights(
    attn_norm=scale(width),
    q_proj=matrix(width, q_size),
    k_proj=matrix(width, kv_size),
    v_proj=matrix(width, kv_size),
    o_proj=matrix(q_size, width),
    mlp_norm=scale(width),
    gate_proj=matrix(width, hidden),
    up_proj=matrix(width, hidden),
    down_proj=matrix(hidden, width),
    **more,
  )
  lengths = np.asarray([5, 0, slots - count, 9][:batch], np.int32)
  keys, values = (
    normal(layers, batch, slots, kv_heads, size) for _ in range(2)
  )
  x = normal(batch, count, width)
  frequencies = np.float32(0.5) ** np.arange(size // 2, dtype=np.float32)
  return x, weights, keys, values, jnp.asarray(lengths), frequencies


def step(*arrays, fused=False):
  """The step, with sums in the place of products where these would copy."""
  run = jax.jit(functools.partial(transformer_step, eps=EPS))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "sums_are_fused", lambda: fused)
    return run(*arrays)


# One token; several with all that a layer can have; rows of more than a few.
CASES = {
  "one_row": {"batch": 1},
  "one_token": {"width": 23, "slots": 13},
  "extras": {"batch": 2, "count": 2, "extras": True},
  "many_tokens": {"batch": 2, "count": 9, "heads": 2, "kv_heads": 1},
}


@pytest.mark.parametrize(
  "case, dtype, fused",
  [
    ("one_row", "float32", True),
    ("one_row", "bfloat16", True),
    ("one_token", "float32", True),
    ("one_token", "bfloat16", False),
    ("extras", "float32", True),
    ("extras", "bfloat16", False),
    ("many_tokens", "float32", False),
    ("many_tokens", "bfloat16", True),
  ],
)
def test_equals_the_float64_loop(case, dtype, fused):
  arrays = make(0, dtype=dtype, **CASES[case])
  expected = transformer_step_reference(*arrays, eps=EPS)
  found = step(*arrays, fused=fused)
  # Each of two layers rounds four sums to the dtype of the stream.
  bound = 2 * 4 * tolerance(dtype, 40)
  assert found[0].dtype == found[1].dtype == dtype
  assert_close(found, expected, bound, case)


def test_what_slots_behind_the_end_hold_is_not_seen():
  x, weights, keys, values, lengths, frequencies = make(1)
  unseen = np.arange(keys.shape[2])[None] >= np.asarray(lengths)[:, None]
  unseen = jnp.asarray(unseen)[None, :, :, None, None]
  other = [jnp.where(unseen, 1e4, cache) for cache in (keys, values)]
  expected = step(x, weights, keys, values, lengths, frequencies)[0]
  found = step(x, weights, *other, lengths, frequencies)[0]
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("extras", [False, True])
def test_tokens_one_by_one_equal_tokens_at_once(extras):
  x, weights, keys, values, lengths, frequencies = make(
    2, batch=2, count=3, extras=extras
  )
  lengths = lengths - 3 * (lengths > 9)
  whole = step(x, weights, keys, values, lengths, frequencies)
  parts = []
  for t in range(3):
    part, keys, values = step(
      x[:, t : t + 1], weights, keys, values, lengths + t, frequencies
    )
    parts.append(part)
  found = jnp.concatenate(parts, axis=1), keys, values
  assert_close(found, whole, 8 * tolerance("float32", 40))


def test_tokens_past_the_end_are_dropped():
  x, weights, keys, values, _, frequencies = make(3, batch=2)
  lengths = jnp.full((2,), keys.shape[2], jnp.int32)
  _, *caches = step(x, weights, keys, values, lengths, frequencies)
  for found, old in zip(caches, (keys, values)):
    np.testing.assert_array_equal(found, old)


def test_no_product_of_a_step_reads_a_matrix_or_a_cache():
  arrays = make(4, batch=1, width=64, hidden=96, slots=64)

  def largest(jaxpr):
    """The largest operand of any product of a program."""
    sizes = [0]
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        sizes += [v.aval.size for v in eqn.invars]
      inner = jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "jaxpr"))
      sizes += [largest(v.jaxpr) for v in inner if hasattr(v, "jaxpr")]
    return max(sizes)

  def found(fused):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(xla, "sums_are_fused", lambda: fused)
      run = functools.partial(transformer_step, eps=EPS)
      return largest(jax.make_jaxpr(run)(*arrays).jaxpr)

  # The smallest matrix is 64 by 16, a layer's cache 64 by 2 by 8; new keys and
  # values are 2 by 8.
  assert found(fused=True) < 64 * 16
  assert found(fused=False) >= 64 * 96


@pytest.mark.parametrize("fused", [False, True])
def test_caches_are_written_where_they_lie(fused):
  layers, slots = 8, 4096
  *like, frequencies = make(5, layers=layers, batch=1, slots=slots)

  def steps(x, weights, keys, values, lengths):
    def one(carry, _):
      x, keys, values, lengths = carry
      x, keys, values = transformer_step(
        x, weights, keys, values, lengths, frequencies, eps=EPS
      )
      return (x, keys, values, lengths + 1), None

    return jax.lax.scan(one, (x, keys, values, lengths), length=4)[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "sums_are_fused", lambda: fused)
    lowered = jax.jit(steps, donate_argnums=(0, 2, 3, 4)).lower(*like)
  memory = lowered.compile().memory_analysis()
  # A CPU copies what it slices of a layer. The caches have 2 heads of 8.
  cache = layers * slots * 2 * 8 * 4
  assert memory.alias_size_in_bytes >= 2 * cache
  assert memory.temp_size_in_bytes < cache


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="asks XLA for a GPU")
@pytest.mark.parametrize("count", [1, 2])
def test_a_gpu_copies_nothing_large(count):
  *like, frequencies = make(
    6, layers=3, batch=1, count=count, width=1024, heads=8, kv_heads=4,
    size=64, hidden=2048, slots=2048, dtype="bfloat16",
  )  # fmt: skip
  run = functools.partial(
    transformer_step, frequencies=frequencies, eps=EPS, implementation="xla"
  )
  run = jax.jit(run, donate_argnums=(0, 2, 3))
  memory = run.lower(*like).compile().memory_analysis()
  # The smallest matrix is 1024 by 256, and a layer's cache as large.
  assert memory.temp_size_in_bytes < 2 * 1024 * 256


def test_shapes_are_checked():
  x, weights, keys, values, lengths, frequencies = make(4, batch=2)
  for changed, message in (
    ({"x": x[0]}, "are not"),
    ({"values": values[:1]}, "are not"),
    ({"lengths": lengths[:1]}, "lengths is"),
    ({"frequencies": frequencies[:1]}, "frequencies is"),
    ({"keys": keys.astype(jnp.float16)}, "keys are float16"),
    (
      {"weights": dataclasses.replace(weights, o_proj=weights.o_proj[:, 1:])},
      "o_proj is",
    ),
    (
      {"weights": dataclasses.replace(weights, q_proj=weights.k_proj[..., 1:])},
      "no whole number",
    ),
  ):
    arrays = {
      "x": x, "weights": weights, "keys": keys, "values": values,
      "lengths": lengths, "frequencies": frequencies,
    } | changed  # fmt: skip
    with pytest.raises(ValueError, match=message):
      transformer_step(**arrays, eps=EPS)


def paged(keys, lengths, num_pages, *, page_size, kind="bounds"):
  """`KeptPages` of caches."""
  several = [
    page_summary(one, lengths, page_size=page_size, kind=kind) for one in keys
  ]
  summary = jax.tree.map(lambda *parts: jnp.stack(parts), *several)
  return KeptPages(summary, num_pages, int(np.max(num_pages)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_reads_the_best_pages(kind):
  x, weights, keys, values, _, frequencies = make(0, slots=64)
  # A token that begins a page, the first one, and one in the last page.
  lengths = jnp.asarray([60, 0, 33], jnp.int32)
  given = x, weights, keys, values, lengths, frequencies
  num_pages = np.random.default_rng(0).integers(1, 7, (2, 3, 2), np.int32)
  pages = paged(keys, lengths, num_pages, page_size=4, kind=kind)
  run = functools.partial(transformer_step, eps=EPS)
  *found, summary = jax.jit(run)(*given, pages=pages)
  expected = transformer_step_reference(*given, eps=EPS, pages=pages)
  bound = 8 * tolerance("float32", 64)
  assert_close(tuple(found), expected, bound)
  behind = paged(found[1], lengths + 1, num_pages, page_size=4, kind=kind)
  assert_close(summary, behind.summary, bound)


def test_pages_that_do_not_fit_are_refused():
  x, weights, keys, values, lengths, frequencies = make(0, count=2)
  num_pages = np.full((2, 3, 2), 3, np.int32)
  pages = paged(keys, lengths, num_pages, page_size=4)
  run = lambda x, pages: transformer_step(
    x, weights, keys, values, lengths, frequencies, eps=EPS, pages=pages
  )
  with pytest.raises(ValueError, match="pages take one token"):
    run(x, pages)
  with pytest.raises(ValueError, match="num_pages is"):
    run(x[:, :1], dataclasses.replace(pages, num_pages=num_pages[0]))
