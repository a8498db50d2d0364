import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import regression_lm
from models.errors import InputError
from models.numbers import START
from models.regression_lm import Compute
from models.regression_lm_config import ENCODERS, SIZES, RegressionLMConfig
from tests.models import regression_lm_oracle

B, L, S, T = 3, 7, 2, 7
LENGTHS = (7, 4, 1)
# Sums over up to some 50 products in float32, twice or three times in a row.
ROUNDING = {"rtol": 2e-4, "atol": 2e-4}


@functools.cache
def model(encoder, **changes):
  # All encoders feed the same decoder, whose layers compile one by one: what
  # happens between two of them is tested behind the cheaper encoders.
  config = RegressionLMConfig.tiny(
    encoder=encoder,
    encoder_layers=2,
    decoder_layers=2 if encoder in ("transformer", "favor") else 1,
    num_kv_heads=1,
    **changes,
  )
  init = jax.jit(lambda key: regression_lm.init(config, key))
  params = init(jax.random.key(3))
  # Norms that do nothing would hide one that is left out.
  generator = np.random.default_rng(4)
  noise = lambda leaf: generator.normal(size=leaf.shape).astype(np.float32)
  return config, jax.tree.map(lambda leaf: leaf + 0.1 * noise(leaf), params)


def data(seed=0):
  generator = np.random.default_rng(seed)
  text = generator.integers(0, 50, (B, L), dtype=np.int32)
  targets = generator.integers(0, 14, (B, S, T), dtype=np.int32)
  return text, np.asarray(LENGTHS, np.int32), targets


@functools.partial(jax.jit, static_argnames=("config", "compute", "dropout"))
def run(config, params, text, lengths, targets, key=None, **options):
  memory = regression_lm.encode(
    config, params, text, lengths, key=key, **options
  )
  return regression_lm.logits(
    config, params, memory, targets, key=key, **options
  )


def test_agrees_with_plain_loops():
  config, params = model("transformer")
  text, lengths, targets = data()
  found = run(config, params, text, lengths, targets)
  assert found.shape == (B, S, T, 14) and found.dtype == jnp.float32
  for b in range(B):
    for s in range(S):
      oracle = regression_lm_oracle.logits(
        config, params, text[b, : lengths[b]], targets[b, s]
      )
      np.testing.assert_allclose(found[b, s], oracle, **ROUNDING)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_padded_row_is_what_it_is_alone(encoder):
  config, params = model(encoder)
  text, lengths, targets = data()
  garbage = text.copy()
  for b, length in enumerate(lengths):
    # Even ids that there are not: nothing reads them.
    garbage[b, length:] = 10**6
  together = run(config, params, garbage, lengths, targets)
  for b, length in list(enumerate(lengths))[1:]:
    alone = run(
      config,
      params,
      text[b : b + 1, :length],
      lengths[b : b + 1],
      targets[b : b + 1],
    )
    np.testing.assert_allclose(together[b], alone[0], **ROUNDING)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_token_of_the_text_counts(encoder):
  config, params = model(encoder)
  text, lengths, targets = data()
  before = run(config, params, text, lengths, targets)
  for place in range(LENGTHS[1]):
    changed = text.copy()
    changed[1, place] = (changed[1, place] + 1) % 50
    after = run(config, params, changed, lengths, targets)
    moved = np.abs(after - before).max((1, 2, 3))
    assert moved[1] > 1e-3 and moved[0] == moved[2] == 0


@pytest.mark.parametrize("encoder", ["transformer", "mamba2"])
def test_the_encoder_looks_both_ways(encoder):
  """Keys of the first token change with the last, and the other way."""
  config, params = model(encoder)
  text, lengths, _ = data()
  read = jax.jit(
    lambda text: regression_lm.encode(config, params, text, lengths).k[0]
  )
  for changed_place, place in ((0, 6), (6, 0)):
    changed = text.copy()
    changed[0, changed_place] += 1 - 2 * (changed[0, changed_place] == 49)
    moved = read(changed)[0, place] - read(text)[0, place]
    assert np.abs(moved).max() > 1e-4


def test_a_target_token_sees_those_before_it_alone():
  config, params = model("transformer")
  text, lengths, targets = data()
  before = run(config, params, text, lengths, targets)
  for place in range(T):
    changed = targets.copy()
    changed[:, 0, place] = (changed[:, 0, place] + 1) % 14
    moved = np.abs(run(config, params, text, lengths, changed) - before)
    assert (moved[:, 0, : place + 1] == 0).all() and (moved[:, 1] == 0).all()
    if place + 1 < T:
      assert (moved[:, 0, place + 1 :].max((-1, -2)) > 1e-3).all()


def test_steps_over_the_cache_are_the_whole_pass():
  config, params = model("transformer")
  text, lengths, targets = data()
  whole = run(config, params, text, lengths, targets)

  @jax.jit
  def stepped(params):
    memory = regression_lm.encode(config, params, text, lengths)
    start = jnp.full((B, S, 1), START, jnp.int32)
    inputs = jnp.concatenate([start, targets[..., :-1]], -1)

    def body(cache, tokens):
      found, cache = regression_lm.step(config, params, memory, tokens, cache)
      return cache, found

    cache = regression_lm.init_cache(config, B, S)
    cache, found = jax.lax.scan(body, cache, jnp.moveaxis(inputs, -1, 0))
    return jnp.moveaxis(found, 0, 2), cache.length

  found, length = stepped(params)
  assert length == T
  np.testing.assert_allclose(found, whole, **ROUNDING)


def test_rows_of_a_text_do_not_see_each_other():
  config, params = model("transformer")
  text, lengths, targets = data()
  together = run(config, params, text, lengths, targets)
  for s in range(S):
    alone = run(config, params, text, lengths, targets[:, s : s + 1])
    np.testing.assert_allclose(together[:, s], alone[:, 0], **ROUNDING)


def test_layers_begin_differently():
  """Layers that begin alike stay alike under some optimizers."""
  config = RegressionLMConfig.tiny(encoder_layers=3, decoder_layers=3)
  params = regression_lm.init(config, jax.random.key(0))
  for side in ("encoder", "decoder"):
    for leaf in jax.tree.leaves(params[side]):
      if leaf.ndim == 3:
        assert np.abs(leaf[0] - leaf[1]).max() > 0.01
        assert np.abs(leaf[1] - leaf[2]).max() > 0.01


@pytest.mark.parametrize("encoder", ["favor", "mamba2"])
def test_every_parameter_has_a_gradient(encoder):
  config, params = model(encoder)
  text, lengths, targets = data()

  @functools.partial(jax.jit, static_argnums=1)
  @jax.grad
  def gradient(params, compute):
    memory = regression_lm.encode(
      config, params, text, lengths, compute=compute
    )
    found = regression_lm.logits(
      config, params, memory, targets, compute=compute
    )
    return -jnp.mean(jax.nn.log_softmax(found)[..., 3])

  plain = gradient(params, Compute())
  for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
    name = jax.tree_util.keystr(path)
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name
  if encoder != "mamba2":
    return
  again = gradient(params, Compute(remat=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    plain,
    again,
  )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_bfloat16_keeps_logits_in_float32(encoder):
  config, params = model(encoder)
  text, lengths, targets = data()
  compute = Compute(dtype="bfloat16")
  memory = jax.eval_shape(
    functools.partial(regression_lm.encode, config, compute=compute),
    params,
    text,
    lengths,
  )
  assert memory.k[0].dtype == jnp.bfloat16
  found = run(config, params, text, lengths, targets, compute=compute)
  exact = run(config, params, text, lengths, targets)
  assert found.dtype == jnp.float32
  # Some ten roundings of 2^-9 in a row, on logits of size 3.
  assert np.sqrt(np.mean((found - exact) ** 2)) < 0.05


def test_dropout_needs_a_key_and_keeps_the_mean():
  config, params = model("transformer")
  text, lengths, targets = data()
  plain = run(config, params, text, lengths, targets)
  off = run(config, params, text, lengths, targets, dropout=0.5)
  np.testing.assert_array_equal(plain, off)
  first, second = (
    run(config, params, text, lengths, targets, jax.random.key(i), dropout=0.3)
    for i in range(2)
  )
  assert np.abs(first - second).mean() > 0.05
  for drop in regression_lm._droppers(jax.random.key(0), 0.3):
    dropped = drop(jnp.ones((100, 100)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.7)}
    # Four standard deviations of the mean of 10,000.
    assert abs(dropped.mean() - 1) < 4 * (0.3 / 0.7) ** 0.5 / 100


def test_named_sizes_have_the_parameters_they_say():
  millions = {"mini": 2, "small": 9, "base": 40, "medium": 118, "large": 294}
  for size, expected in millions.items():
    config = RegressionLMConfig.named(
      size, vocab_size=8192, target_vocab_size=14, target_length=7
    )
    found = regression_lm.num_params(config) / 1e6
    assert abs(found - expected) < 0.5, (size, found)
  assert {"tiny", *millions} == set(SIZES)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"encoder": "rnn"}, "encoder='rnn' is unknown"),
    ({"num_kv_heads": 3}, "no multiple"),
    ({"head_dim": 7}, "is odd"),
    ({"d_model": 0}, "d_model=0 is no positive integer"),
    ({"encoder": "mamba2", "mamba_head_dim": 7}, "does not divide"),
  ],
)
def test_sizes_are_checked(changes, words):
  with pytest.raises(InputError, match=words):
    RegressionLMConfig.tiny(**changes)
  with pytest.raises(InputError, match="size 'huge' is unknown"):
    RegressionLMConfig.named("huge")


def test_parameters_have_the_dtype_asked():
  config = dataclasses.replace(RegressionLMConfig.tiny(), decoder_layers=2)
  params = regression_lm.init(config, jax.random.key(0), "bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype("bfloat16")
  }
  shapes = jax.tree.map(jnp.shape, regression_lm.abstract_params(config))
  assert shapes == jax.tree.map(jnp.shape, params)
