"""Attamba: every way to end and to compress chunks, whole and by steps."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attamba, attamba_released, chunks, language_model
from models.attamba_config import BOUNDARIES, REGULAR, AttambaConfig
from models.caches.chunked import ChunkedCache
from models.chunks import COST_OF_CHUNK, Texts
from models.convert import load, save_safetensors
from models.errors import InputError
from models.implementations import Implementations
from models.transformer_config import TransformerConfig
from ops import dispatch
from ops.chunked_attention import (
  UNUSED,
  chunked_attention_step,
  mosaic_gpu_step,
)
from ops.chunked_attention import (
  step as step_op,
)

VOCAB, T = 61, 24
# Each boundary and compressor at least once, and every choice. Uniform chunks
# are those of a first layer that finds costs.
CASES = {
  "ssm, by the first layer's, sizes differ": {
    "boundaries": "first_ssm",
    "chunk_sizes": (3, 5),
    "sink": False,
  },
  "ssm, carried, projected, K and V shared": {
    "boundaries": "token_class",
    "carry": True,
    "share_kv": True,
    "num_kv_heads": 2,
    "keep_projections": True,
  },
  "stride, cyclic, no window": {"compressor": "stride", "window": 0},
  "mean, by the first layer's attention": {
    "compressor": "mean",
    "boundaries": "first_attention",
    "num_kv_heads": 2,
  },
  "gated pool": {
    "compressor": "gated_pool",
    "boundaries": "surprise",
    "share_kv": True,
  },
  "overlapping pools, the best ones": {
    "compressor": "overlapping_gated_pool",
    "boundaries": "random",
    "top_chunks": 2,
    "num_kv_heads": 2,
  },
  "a window alone": {"compressor": "none", "sink": False},
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def draw(config):
  """Parameters at which every term tells, and costs of some tokens."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32),
    language_model.abstract_params(config),
  )
  if "chunk_costs" in params:
    shape = params["chunk_costs"].shape
    params["chunk_costs"] = rng.uniform(0, 0.6, shape).astype(np.float32)
  return params


@functools.cache
def tokens():
  return np.random.default_rng(1).integers(VOCAB, size=(2, T), dtype=np.int32)


# Slow programs that compile fast.
def jit(function, **options):
  options = {"static_argnums": 0} | options
  fast = {"xla_backend_optimization_level": 0}
  return jax.jit(function, compiler_options=fast, **options)


forward, decode = jit(language_model.forward), jit(language_model.decode)
prefill = jit(language_model.prefill, static_argnames="cache_size")
# Those whose prompts and packed rows are read too: of each kind of state.
READ = (
  "ssm, carried, projected, K and V shared",
  "overlapping pools, the best ones",
)


@functools.cache
def made(name):
  """A config, its parameters, and logits (2, T, V) of `tokens`."""
  config = AttambaConfig.tiny(vocab_size=VOCAB, **CASES[name])
  params = draw(config)
  # The same program then reads packed rows.
  ids = {"segment_ids": np.zeros((2, T), np.int32)} if name in READ else {}
  return config, params, np.asarray(forward(config, params, tokens(), **ids))


def empty(config):
  return language_model.init_state(config, 2, cache_size=T, dtype=jnp.float32)


def shapes(state):
  return jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize("name", CASES)
def test_decoding_from_the_compressed_cache_is_the_whole_pass(name):
  config, params, whole = made(name)
  state = empty(config)
  for t in range(T):
    found, state = decode(config, params, tokens()[:, t : t + 1], state)
    np.testing.assert_allclose(found[:, 0], whole[:, t], **TOLERANCE)
  assert shapes(state) == shapes(jax.eval_shape(lambda: empty(config)))
  np.testing.assert_array_equal(state.length, [T, T])


@pytest.mark.parametrize(
  "name",
  [
    "ssm, by the first layer's, sizes differ",
    "ssm, carried, projected, K and V shared",
  ],
)
def test_a_step_that_reads_the_cache_where_it_lies(monkeypatch, name):
  """With XLA in the kernel's place, which has tests of its own."""
  everywhere = dict.fromkeys(step_op.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(step_op, "IMPLEMENTATIONS", everywhere)
  called = []

  def forward(*arrays, scale):
    called.append(arrays)
    return chunked_attention_step(*arrays, scale=scale, implementation="xla")

  monkeypatch.setattr(mosaic_gpu_step, "forward", forward)
  config, params, whole = made(name)
  by_kernel = functools.partial(
    language_model.decode,
    config,
    implementations=Implementations(step="mosaic_gpu"),
  )
  run, state = jit(by_kernel, static_argnums=()), empty(config)
  for t in range(T):
    found, state = run(params, tokens()[:, t : t + 1], state)
    np.testing.assert_allclose(found[:, 0], whole[:, t], **TOLERANCE)
  assert len(called) == len(config.runs)
  with pytest.raises(InputError, match="not 2 tokens"):
    by_kernel(params, tokens()[:, :2], state)


@pytest.mark.parametrize("name", READ)
def test_prompts_of_other_lengths_then_one_and_several_tokens(name):
  """Rows are then at other places of their chunks."""
  config, params, whole = made(name)
  lengths = np.array([5, 11])
  hidden, state = prefill(
    config, params, tokens()[:, :12], lengths, cache_size=T
  )
  assert shapes(state) == shapes(jax.eval_shape(lambda: empty(config)))
  found = language_model.logits(config, params, hidden)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(
      found[row, :length], whole[row, :length], **TOLERANCE
    )
  for count in (1, 7, 1):
    more = [tokens()[row, n : n + count] for row, n in enumerate(lengths)]
    found, state = decode(config, params, np.stack(more), state)
    for row, n in enumerate(lengths):
      np.testing.assert_allclose(
        found[row], whole[row, n : n + count], **TOLERANCE
      )
    lengths = lengths + count
  np.testing.assert_array_equal(state.length, lengths)


@pytest.mark.parametrize("name", READ)
def test_texts_and_rows_never_leak(name):
  """Packed and padded texts give the numbers of each alone, in either row."""
  config, params, whole = made(name)
  first, second = tokens()
  packed = np.concatenate([[7, 7], first[:9], second[:3], first[:8], [9, 9]])
  ids = np.array([-1] * 2 + [0] * 9 + [1] * 3 + [0] * 8 + [-1] * 2, np.int32)
  for rows in ([packed, second], [second, packed]):
    at = 0 if rows[0] is packed else 1
    segment_ids = np.zeros((2, T), np.int32)
    segment_ids[at] = ids
    found = np.asarray(
      forward(config, params, np.stack(rows), segment_ids=segment_ids)
    )
    np.testing.assert_allclose(found[at, 2:11], whole[0, :9], **TOLERANCE)
    np.testing.assert_allclose(found[at, 11:14], whole[1, :3], **TOLERANCE)
    np.testing.assert_allclose(found[at, 14:22], whole[0, :8], **TOLERANCE)
    np.testing.assert_allclose(found[1 - at], whole[1], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_safetensors_keep_the_model(name, tmp_path):
  config = AttambaConfig.tiny(vocab_size=VOCAB, **CASES[name])
  params = draw(config)
  save_safetensors(tmp_path / "model", config, params)
  found = load(tmp_path / "model")
  assert found.config == config
  assert jax.tree.structure(found.params) == jax.tree.structure(params)
  for ours, theirs in zip(*map(jax.tree.leaves, (params, found.params))):
    np.testing.assert_array_equal(ours, theirs)


def ends_of(boundaries, places, layer=1, **changes):
  config = AttambaConfig.tiny(boundaries=boundaries, **changes)
  found = chunks.closed_by_place(
    config, config.runs[0], jnp.int32(layer), places[None]
  )
  return np.flatnonzero(found[0])


def test_regular_boundaries():
  places = np.arange(32, dtype=np.int32)
  regular = functools.partial(ends_of, places=places)
  np.testing.assert_array_equal(regular("uniform"), [0, *range(3, 32, 4)])
  np.testing.assert_array_equal(regular("uniform", sink=False), range(3, 32, 4))
  # Half a chunk earlier in the second of two layers.
  np.testing.assert_array_equal(regular("cyclic"), [0, *range(1, 32, 4)])
  np.testing.assert_array_equal(regular("cyclic", layer=0), regular("uniform"))
  drawn = regular("random", sink=False)
  np.testing.assert_array_equal(drawn // 4, range(8))
  assert len(set(drawn % 4)) > 1
  assert set(drawn) != set(regular("random", sink=False, layer=0))
  assert set(drawn) != set(regular("random", sink=False, seed=1))


def test_boundaries_by_token():
  config = AttambaConfig.tiny(boundaries="surprise")
  whole = COST_OF_CHUNK
  # Chunks of 2 to 8 tokens; token 0 is one of its own.
  costs = [whole, whole, 0, 1, 0, whole, *[0] * 9, whole - 1, 1, 0]
  costs = np.array([costs], np.int32)
  places = np.arange(costs.size, dtype=np.int32)[None]
  zero = jnp.zeros(1, jnp.int32)
  closed, count, spent = chunks.closed_by_cost(
    config, config.runs[0], costs, places, zero, zero
  )
  np.testing.assert_array_equal(np.flatnonzero(closed[0]), [0, 2, 5, 13, 16])
  assert (count[0], spent[0]) == (1, 0)


def test_chunks_that_no_token_sees_are_not_kept():
  config = AttambaConfig.tiny(boundaries="uniform", window=3)
  ids = np.array([[0] * 12 + [1] * 4 + [2] * 9 + [-1] * 2], np.int32)
  texts = Texts.of(ids.shape, jnp.asarray(ids))
  closed = chunks.closed_by_place(
    config, config.runs[0], jnp.int32(0), texts.places
  )
  most = chunks.most_kept(config, config.runs[0], ids.shape[1])
  kept = chunks.find(config, closed, texts, most, keep_all=False)
  ends = np.asarray(kept.ends[0])
  np.testing.assert_array_equal(ends[:5], [0, 3, 7, 16, 19])
  assert (ends[5:] == UNUSED).all()
  np.testing.assert_array_equal(kept.seen_from[0, :5], ends[:5] + 4)


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("window", [0, 5])
def test_rows_of_short_texts_find_room(boundaries, window):
  """However short texts are, `most_kept` is enough for their chunks."""
  rng = np.random.default_rng(0)
  for compressor in ("ssm", "mean")[: 2 - (boundaries == "first_ssm")]:
    config = AttambaConfig.tiny(
      boundaries=boundaries, window=window, compressor=compressor
    )
    run = config.runs[0]
    ids = np.cumsum(rng.uniform(size=(40, 50)) < 0.12, axis=1)
    ids[:20] = np.arange(50) // (window + np.arange(2, 22)[:, None])
    texts = Texts.of(ids.shape, jnp.asarray(ids, jnp.int32))
    closed = rng.uniform(size=ids.shape) < 0.5
    if boundaries not in REGULAR:
      zero = jnp.zeros(40, jnp.int32)
      costs = np.full(ids.shape, COST_OF_CHUNK, np.int32)
      closed, _, _ = chunks.closed_by_cost(
        config, run, costs, texts.places, zero, zero
      )
    else:
      closed = chunks.closed_by_place(config, run, jnp.int32(1), texts.places)
    most = chunks.most_kept(config, run, 50)
    all_of_them = chunks.find(config, closed, texts, 50, keep_all=False)
    assert np.sum(np.asarray(all_of_them.ends) < UNUSED, axis=1).max() <= most


def nbytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_costs_of_a_first_layer_are_some_of_a_chunk():
  config = AttambaConfig.tiny(vocab_size=VOCAB, boundaries="first_attention")
  assert [run.num_layers for run in config.runs] == [1, 1]
  params = draw(config)
  stream = language_model.before_layers(config, params, tokens())
  assert stream[1] is None
  first, second = language_model.layers_of(config)
  own = jax.tree.map(lambda x: x[0], params["layers"][0])
  layer = jit(language_model.layer, static_argnums=(0, 2))
  _, costs = layer(config, own, first.kind, stream)
  assert costs.shape == (2, T) and second.kind != first.kind
  mean = np.asarray(costs).mean() / COST_OF_CHUNK
  assert 0.5 < 4 * mean < 2 and np.unique(costs).size > 10


@pytest.mark.parametrize(
  "preset, least", [("attamba_p4", 3.9), ("attamba_p8", 7.5)]
)
def test_bytes_of_the_cache(preset, least):
  """Of keys and values at 8,192 tokens, against those of a Transformer."""
  config = getattr(AttambaConfig, preset)()
  size = functools.partial(
    language_model.init_state, batch=1, cache_size=8192, dtype=jnp.bfloat16
  )
  state = jax.eval_shape(lambda: size(config))
  full = TransformerConfig(
    vocab_size=32000, num_layers=8, d_model=512, d_ff=1536, num_heads=8,
    num_kv_heads=8, head_dim=64,
  )  # fmt: skip
  whole = nbytes(jax.eval_shape(lambda: size(full)).cache)
  assert whole == 8 * 2 * 8192 * 512 * 2
  cache = state.layers[0].cache
  assert isinstance(cache, ChunkedCache)
  assert whole / nbytes(cache) > least
  # With the states of the open chunk.
  assert whole / nbytes(state) > 0.95 * least
  shared = dataclasses.replace(config, share_kv=True)
  cache = jax.eval_shape(lambda: size(shared)).layers[0].cache
  assert whole / nbytes(cache) > 2 * 0.99 * least


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"chunk_sizes": (512,)}, "a chunk of 512 tokens is longer"),
    ({"chunk_sizes": (4, 4, 4)}, "one for each of 2 layers"),
    ({"chunk_sizes": (0,)}, "chunk_sizes=0 is no positive"),
    ({"window": -1}, "window=-1 is no integer from 0"),
    ({"boundaries": "every"}, "boundaries='every': take from uniform"),
    ({"compressor": "zip"}, "compressor='zip': take from ssm"),
    ({"num_kv_heads": 2}, "are not as wide as d_model=32"),
    ({"ssm_head_dim": 7}, "ssm_channels=16 is no multiple"),
    ({"compressor": "mean", "carry": True}, "carry=True is of"),
    ({"compressor": "mean", "boundaries": "first_ssm"}, "need compressor="),
  ],
)
def test_bad_settings_are_one_line(changes, words):
  with pytest.raises(InputError, match=words) as error:
    AttambaConfig.tiny(**changes)
  assert "\n" not in str(error.value)


def test_released_semantics_mix_places_within_chunks():
  """By a loop over pairs of tokens, as its kernels mask them."""
  rng = np.random.default_rng(0)
  b, length, h, p, n = 2, 150, 2, 3, 4
  shapes = (b, length, h, p), (b, length, h), (b, length, 1, n)
  x, dt, B = (rng.normal(size=s).astype(np.float32) for s in shapes)
  C = rng.normal(size=shapes[2]).astype(np.float32)
  A, D, bias = -np.arange(1, h + 1) / 4, rng.normal(size=h), np.ones(h)
  numbers = (np.arange(length)[None] + np.array([[0], [5]])) % 8
  found = jit(attamba_released.scan, static_argnums=())(
    x, dt, A, B, C, jnp.asarray(numbers), D=D, dt_bias=bias
  )
  dt = np.logaddexp(0, dt.astype(np.float64) + bias)
  total = np.cumsum(dt * A, axis=1)
  expected = D[:, None] * x
  block = attamba_released.BLOCK
  for row, t in np.ndindex(b, length):
    for s in range(t + 1):
      own = numbers[row, t] == numbers[row, s]
      # From block to block goes what the last token of each has the number of.
      ends = numbers[row, block * (s // block) + block - 1 : t : block]
      ends = ends[: t // block - s // block]
      if own and (ends == numbers[row, t]).all():
        decay = np.exp(total[row, t] - total[row, s]) * dt[row, s]
        weight = C[row, t, 0] @ B[row, s, 0] * decay
        expected[row, t] += weight[:, None] * x[row, s]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_released_semantics_are_read_and_not_decoded():
  config = AttambaConfig.tiny(vocab_size=VOCAB, semantics="released")
  params = draw(config)
  ids = np.zeros((2, T), np.int32)
  read = lambda rows: np.asarray(forward(config, params, rows, segment_ids=ids))
  whole = read(tokens())
  changed = tokens().copy()
  changed[0, 9] += 1
  again = read(changed)
  np.testing.assert_array_equal(again[1], whole[1])
  np.testing.assert_array_equal(again[0, :9], whole[0, :9])
  assert np.abs(again - whole)[0, 9:].max() > 1e-3
  # Two texts in the first row, the second of which begins in a chunk.
  first, second = tokens()
  rows = np.stack([np.concatenate([first[:10], second[:14]]), second])
  ids[0, 10:] = 1
  packed = read(rows)
  np.testing.assert_allclose(packed[0, :10], whole[0, :10], **TOLERANCE)
  np.testing.assert_allclose(packed[0, 10:], whole[1, :14], **TOLERANCE)
  with pytest.raises(InputError, match="no state to decode from"):
    empty(config)
  with pytest.raises(InputError, match="are of compressor='ssm'"):
    dataclasses.replace(config, carry=True)
  # With fewer tokens a chunk than layers, its cyclic boundaries do not move.
  one = functools.partial(ends_of, "cyclic", np.arange(32), num_layers=8)
  still = one(semantics="released", layer=7)
  np.testing.assert_array_equal(still, one(layer=0))
  assert set(one(layer=7)) != set(still)


def test_decoding_writes_a_donated_state_in_place():
  """All of it, and without another copy of the chunks' keys."""
  config = AttambaConfig.tiny(num_layers=3)
  init = functools.partial(
    language_model.init_state, config, 3, cache_size=148, dtype=jnp.float32
  )
  state = jax.eval_shape(init)
  step = jit(language_model.decode, donate_argnums=3).lower(
    config,
    language_model.abstract_params(config),
    jax.ShapeDtypeStruct((3, 1), jnp.int32),
    state,
  )
  compiled = step.compile()
  assert compiled.memory_analysis().alias_size_in_bytes == nbytes(state)
  assert "f32[3,3,38,4,8]" in compiled.as_text()
  assert not re.findall(r"= f32\[3,3,38,4,8\]\S* copy\(", compiled.as_text())


def test_chunks_and_windows_that_a_model_was_not_trained_with():
  """With every token a chunk, or in the window, all tokens are seen."""
  config = AttambaConfig.tiny(
    vocab_size=VOCAB, compressor="stride", boundaries="uniform", sink=False
  )
  params = draw(config)
  every = attamba.with_chunks(config, params, chunk_size=1, window=0)
  wide = attamba.with_chunks(config, params, window=T)
  assert every[0].chunk_sizes == (1,) and wide[0].window == T
  found, expected = (forward(*changed, tokens()) for changed in (every, wide))
  np.testing.assert_allclose(found, expected, **TOLERANCE)
  # Twice as many tokens are to cost as much as a chunk.
  config = AttambaConfig.tiny(vocab_size=VOCAB, boundaries="surprise")
  costs = {"chunk_costs": np.linspace(0, 1, VOCAB)}
  _, found = attamba.with_chunks(config, costs, chunk_size=8)
  np.testing.assert_allclose(found["chunk_costs"], costs["chunk_costs"] / 2)
  config = AttambaConfig.tiny(chunk_sizes=(4, 8))
  with pytest.raises(InputError, match="4, 8 tokens"):
    attamba.with_chunks(config, {}, chunk_size=2)
  with pytest.raises(InputError, match="window"):
    attamba.with_chunks(config, {}, window=-1)
