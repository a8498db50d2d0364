import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ops import dispatch
from ops.token_logprob import token_logprob, token_logprob_reference

VOCAB, WIDTH, SHAPE = 37, 16, (3, 5)


def make(dtype="float32", vocab=VOCAB, seed=0):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(*SHAPE, WIDTH)), dtype)
  weight = jnp.asarray(rng.normal(size=(vocab, WIDTH)), dtype)
  targets = rng.integers(0, VOCAB, size=SHAPE).astype(np.int32)
  targets[0, 0], targets[1, 2], targets[2, 4] = 0, -1, VOCAB - 1
  return hidden, weight, targets


def probabilities(hidden, weight, scale):
  logits = scale * np.einsum("ble,ve->blv", hidden, weight)
  logits -= logits.max(-1, keepdims=True)
  return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def reference_gradients(hidden, weight, targets, scale, outer, vocab=None):
  """Of sum(outer[0] * log p + outer[1] * normalizer), in float64."""
  hidden, full = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
  weight = full[:vocab]
  counts = (targets >= 0)[..., None]
  share = probabilities(hidden, weight, scale)
  hit = targets[..., None] == np.arange(len(weight))
  dlogits = outer[0][..., None] * (hit - share) + outer[1][..., None] * share
  dlogits = scale * np.where(counts, dlogits, 0.0)
  dweight = np.zeros_like(full)
  dweight[:vocab] = np.einsum("blv,ble->ve", dlogits, hidden)
  return np.einsum("blv,ve->ble", dlogits, weight), dweight


def assert_close(found, expected, dtype, length):
  """Products in `dtype` of values up to about one, `length` of them."""
  epsilon = float(jnp.finfo(jnp.dtype(dtype)).eps)
  tolerance = 4 * epsilon * np.sqrt(length)
  tolerance *= max(1.0, np.abs(expected).max())
  found = np.asarray(found, np.float64)
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@functools.partial(
  jax.jit, static_argnames=("block_size", "logit_scale", "valid_vocab")
)
def both(hidden, weight, targets, outer, **options):
  """Values and gradients."""
  run = functools.partial(
    token_logprob, targets=targets, return_log_normalizer=True, **options
  )
  values, pull = jax.vjp(run, hidden, weight)
  return values, pull(outer)


OUTER = tuple(
  np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
)


# 37 columns: one block, whole blocks and a rest, one column a block, more than
# the vocabulary.
@pytest.mark.parametrize("block_size", [None, 8, 36, 1, 64])
def test_matches_float64(block_size):
  hidden, weight, targets = make()
  values, gradients = both(
    *(hidden, weight, targets, OUTER), block_size=block_size, logit_scale=0.7
  )
  expected = token_logprob_reference(hidden, weight, targets, logit_scale=0.7)
  for value, wanted in zip(values, expected):
    assert value.dtype == jnp.float32 and value.shape == SHAPE
    assert_close(value, wanted, "float32", WIDTH + VOCAB)
  wanted = reference_gradients(hidden, weight, targets, 0.7, OUTER)
  for gradient, want in zip(gradients, wanted):
    assert_close(gradient, want, "float32", VOCAB + WIDTH)


def test_bfloat16():
  hidden, weight, targets = make("bfloat16")
  values, gradients = both(hidden, weight, targets, OUTER, block_size=16)
  expected = token_logprob_reference(hidden, weight, targets)
  for value, wanted in zip(values, expected):
    # Products of two bfloat16 are exact in float32.
    assert value.dtype == jnp.float32
    assert_close(value, wanted, "float32", WIDTH + VOCAB)
  wanted = reference_gradients(hidden, weight, targets, 1.0, OUTER)
  for gradient, want in zip(gradients, wanted):
    assert gradient.dtype == jnp.bfloat16
    assert_close(gradient, want, "bfloat16", 1)


def test_weights_wider_than_the_states():
  hidden, weight, targets = make("bfloat16")
  wide = weight.astype(jnp.float32)
  values, gradients = both(hidden, wide, targets, OUTER, block_size=16)
  same, _ = both(hidden, weight, targets, OUTER, block_size=16)
  np.testing.assert_array_equal(values, same)
  assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


def test_a_padded_vocabulary():
  hidden, weight, targets = make()
  rest = jnp.full((3, WIDTH), jnp.nan)
  values, gradients = both(
    *(hidden, jnp.concatenate([weight, rest]), targets, OUTER),
    block_size=8,
    valid_vocab=VOCAB,
  )
  plain, wanted = both(hidden, weight, targets, OUTER, block_size=8)
  np.testing.assert_array_equal(values, plain)
  np.testing.assert_array_equal(gradients[0], wanted[0])
  np.testing.assert_array_equal(gradients[1][:VOCAB], wanted[1])
  assert not np.any(gradients[1][VOCAB:])


def test_ignored_and_impossible_targets():
  hidden, weight, targets = make()
  bad = hidden.at[1, 2].set(jnp.nan)
  (value, normalizer), (dhidden, dweight) = both(
    bad, weight, targets, OUTER, block_size=8
  )
  assert value[1, 2] == normalizer[1, 2] == 0 and not np.any(dhidden[1, 2])
  _, (_, wanted) = both(hidden, weight, targets, OUTER, block_size=8)
  np.testing.assert_array_equal(dweight, wanted)
  past = np.full(SHAPE, VOCAB, np.int32)
  assert np.all(token_logprob(hidden, weight, past, block_size=8) == -np.inf)


def test_large_logits_do_not_overflow():
  hidden, weight, targets = make()
  (value, _), gradients = both(
    100 * hidden, 100 * weight, targets, OUTER, block_size=8
  )
  expected, _ = token_logprob_reference(100 * hidden, 100 * weight, targets)
  assert_close(value, expected, "float32", WIDTH)
  assert all(np.all(np.isfinite(g)) for g in gradients)


def test_vmap_and_remat():
  hidden, weight, targets = make()
  run = lambda h, t: jax.checkpoint(
    lambda h: token_logprob(h, weight, t, block_size=8)
  )(h)
  summed = lambda h: jnp.sum(jax.vmap(run)(h, targets))
  found = jax.jit(jax.grad(summed))(hidden)
  ones = np.ones(SHAPE), np.zeros(SHAPE)
  wanted, _ = reference_gradients(hidden, weight, targets, 1.0, ones)
  assert_close(found, wanted, "float32", VOCAB)


def test_sharded_equals_single():
  hidden, weight, targets = make(seed=2)
  hidden, targets = hidden[:2], targets[:2]
  outer = tuple(o[:2] for o in OUTER)
  mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
  put = lambda x, *spec: jax.device_put(
    x, NamedSharding(mesh, PartitionSpec(*spec))
  )
  found = both(
    put(hidden, "data"),
    put(weight),
    put(targets, "data"),
    tuple(put(o, "data") for o in outer),
    block_size=8,
  )
  expected = both(hidden, weight, targets, outer, block_size=8)
  for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert_close(value, np.asarray(wanted), "float32", VOCAB)


def test_logits_are_never_whole():
  tokens, vocab, width, block = 256, 16384 + 5, 8, 512
  of = jax.ShapeDtypeStruct

  def loss(hidden, weight, targets):
    return jnp.sum(token_logprob(hidden, weight, targets, block_size=block))

  compiled = (
    jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    .lower(
      of((tokens, width), jnp.float32),
      of((vocab, width), jnp.float32),
      of((tokens,), jnp.int32),
    )
    .compile()
  )
  temporary = compiled.memory_analysis().temp_size_in_bytes
  blocks, weights = 4 * tokens * block, 4 * vocab * width
  assert temporary < 4 * blocks + 2 * weights < 4 * tokens * vocab / 4


@pytest.mark.parametrize(
  "change, says",
  [
    ({"weight": jnp.zeros((VOCAB, 3))}, "are not"),
    ({"targets": jnp.zeros((3,), jnp.int32)}, "targets are"),
    ({"targets": jnp.zeros(SHAPE)}, "not integers"),
    ({"valid_vocab": VOCAB + 1}, "valid_vocab is 38"),
    ({"valid_vocab": 0}, "valid_vocab is 0"),
    ({"block_size": 0}, "block_size is 0"),
    ({"logit_scale": jnp.ones(())}, "logit_scale is an array"),
  ],
)
def test_bad_arguments_say_what_is_wrong(change, says):
  hidden, weight, targets = make()
  arguments = {"hidden": hidden, "weight": weight, "targets": targets}
  with pytest.raises(ValueError, match=says) as error:
    token_logprob(**(arguments | change))
  assert "\n" not in str(error.value)


def test_only_what_exists():
  with pytest.raises(dispatch.UnsupportedError, match="usable: xla"):
    token_logprob(*make(), implementation="mosaic_gpu")
