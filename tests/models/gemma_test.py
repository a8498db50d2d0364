"""Gemma 3: sliding layers and their ring, its files, its norms.

Logits against transformers are in `parity_test.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, transformer
from models.caches import sliding
from models.transformer_config import TransformerConfig
from ops.quantized import Quantizer, Taps, formats

_LENGTH, _ROOM = 48, 60
forward = jax.jit(language_model.forward, static_argnums=0)
decode = jax.jit(transformer.decode, static_argnums=0)
prefill = jax.jit(
  transformer.prefill, static_argnums=0, static_argnames="cache_size"
)


@pytest.fixture(scope="module")
def small():
  config = TransformerConfig.tiny_gemma()
  params = transformer.init(config, jax.random.key(0))
  # Norms and keys at which heads attend sharply, so that every key tells.
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * (3.0 if "norm" in str(path) else 1.5), params
  )
  rng = np.random.default_rng(1)
  tokens = jnp.asarray(rng.integers(0, 64, (2, _LENGTH)), jnp.int32)
  return config, params, tokens, forward(config, params, tokens)


def _close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_a_split_text_equals_the_whole(small):
  """Prefill of rows of other lengths, then several tokens, then more."""
  config, params, tokens, whole = small
  lengths = jnp.array([20, 9], jnp.int32)
  hidden, state = prefill(
    config, params, tokens[:, :20], lengths=lengths, cache_size=_ROOM
  )
  logits = transformer.bind(config, params).logits(hidden)
  _close(logits[0], whole[0, :20])
  _close(logits[1, :9], whole[1, :9])
  for count in (7, 7, 7, 7):
    at = state.length[:, None] + jnp.arange(count)[None]
    found, state = decode(
      config, params, jnp.take_along_axis(tokens, at, axis=1), state
    )
    wanted = jnp.take_along_axis(whole, at[:, :, None], axis=1)
    _close(found, wanted)
  np.testing.assert_array_equal(state.length, [48, 37])


def test_the_ring_goes_round_and_tokens_may_be_taken_back(small, monkeypatch):
  """With a ring of 7 slots, of which 2 are to spare, 2 tokens are undone."""
  monkeypatch.setattr(sliding, "SPARE", 2)
  config, params, tokens, whole = small
  state = transformer.init_state(config, 2, cache_size=_ROOM)
  assert state.cache.ring.k.shape == (2, 2, 7, 2, 8)
  step = jax.jit(transformer.decode, static_argnums=0)
  for start in range(0, 27, 3):
    wrong = (tokens[:, start : start + 3] + 1) % 64
    tried = wrong.at[:, 0].set(tokens[:, start])
    found, after = step(config, params, tried, state)
    _close(found[:, 0], whole[:, start])
    # The first is kept, the two that are wrong are taken back.
    back = transformer.TransformerState(
      cache=after.cache, length=state.length + 1
    )
    rest = jnp.concatenate(
      [tokens[:, start + 1 : start + 3], wrong[:, :1]], axis=1
    )
    found, after = step(config, params, rest, back)
    _close(found[:, :2], whole[:, start + 1 : start + 3])
    state = transformer.TransformerState(
      cache=after.cache, length=state.length + 3
    )


def test_a_ring_holds_what_its_layers_see_and_no_more():
  config = TransformerConfig.gemma3_270m()
  size = 8192
  state = jax.eval_shape(
    functools.partial(
      transformer.init_state, config, 1, cache_size=size, dtype=jnp.bfloat16
    )
  )
  total = lambda tree: sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )
  slot = 2 * 2 * config.num_kv_heads * config.head_dim
  assert total(state.cache.whole) == 3 * size * slot
  assert total(state.cache.ring) == 15 * (512 + sliding.SPARE) * slot
  dense = 18 * size * slot
  assert dense / total(state.cache) > 4.5
  # A short cache has no ring that is longer than itself.
  short = jax.eval_shape(
    functools.partial(transformer.init_state, config, 1, cache_size=64)
  )
  assert short.cache.ring.k.shape == (15, 1, 64, 1, 256)


def test_a_ring_keeps_few_bits(small):
  config, params, tokens, exact = small
  each = Quantizer(scales=None, format=formats.get("int8"))
  taps = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (3, *leaf.shape)), Taps(k=each, v=each)
  )
  attn = params["layers"]["attn"] | {"taps": taps}
  params = params | {"layers": params["layers"] | {"attn": attn}}
  whole = forward(config, params, tokens)
  _, state = prefill(config, params, tokens[:, :30], cache_size=_ROOM)
  assert state.cache.ring.k.values.dtype == jnp.int8
  parts = []
  for start in (30, 37):
    logits, state = decode(config, params, tokens[:, start : start + 7], state)
    parts.append(logits)
  # Sums in another order move a number over the edge between two codes.
  error = np.linalg.norm(jnp.concatenate(parts, 1) - whole[:, 30:44])
  rounding = np.linalg.norm((whole - exact)[:, 30:44])
  assert error < 0.1 * rounding


def test_layers_one_by_one_equal_the_scan(small):
  config, params, tokens, whole = small
  kinds = [one.kind for one in transformer.layers_of(config)]
  assert kinds == ["sliding", "sliding", "decoder"]
  x = transformer.before_layers(config, params, tokens)
  for index, kind in enumerate(kinds):
    own = jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"])
    x = transformer.layer(config, own, kind, x)
  hidden = transformer.after_layers(config, params, x)
  _close(language_model.logits(config, params, hidden), whole)


def test_packed_texts_are_apart(small):
  config, params, tokens, whole = small
  packed = jnp.concatenate([tokens[:1, :30], tokens[1:, :18]], axis=1)
  packed = jnp.concatenate([packed, packed])
  segments = jnp.asarray(np.repeat([[1] * 30 + [2] * 18], 2, 0), jnp.int32)
  positions_of = language_model.hidden_states(
    config, params, packed, segment_ids=segments
  )
  logits = language_model.logits(config, params, positions_of)
  _close(logits[0, :30], whole[0, :30])
  # Rotations tell distances alone, so that the second text is as by itself.
  _close(logits[0, 30:], whole[1, :18])
