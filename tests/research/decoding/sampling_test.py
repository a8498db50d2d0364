import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.transformer_config import TransformerConfig
from research.decoding import sampling

CONFIG = TransformerConfig.tiny(vocab_size=6)
LENGTH = 9


forward = jax.jit(transformer.forward, static_argnums=0)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """At these sizes it is what the tests wait for."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def params():
  params = transformer.init(CONFIG, jax.random.key(0))
  params["embed"]["table"] = 20 * params["embed"]["table"]
  return params


@pytest.fixture(scope="module")
def prompt():
  return jnp.asarray([[1, 2, 3], [4, 5, 0]], jnp.int32)


def draw(params, prompt, key=0, temperature=1.0):
  return sampling.sample(
    CONFIG, params, prompt, jax.random.key(key), LENGTH, temperature
  )


def test_the_prompt_stands_first_and_keys_decide(params, prompt):
  found = draw(params, prompt)
  assert found.shape == (2, 3 + LENGTH) and found.dtype == jnp.int32
  np.testing.assert_array_equal(found[:, :3], prompt)
  assert found.min() >= 0 and found.max() < CONFIG.vocab_size
  np.testing.assert_array_equal(found, draw(params, prompt))
  assert np.any(found != draw(params, prompt, key=1))


def test_at_a_low_temperature_every_token_is_the_likeliest(params, prompt):
  found = draw(params, prompt, temperature=1e-4)
  logits = forward(CONFIG, params, found)
  best = np.asarray(logits.argmax(-1))
  np.testing.assert_array_equal(found[:, 3:], best[:, 2:-1])


def test_samples_follow_the_models_distribution(params):
  rows = 6000
  prompt = jnp.broadcast_to(jnp.asarray([[1, 2]], jnp.int32), (rows, 2))
  found = sampling.sample(CONFIG, params, prompt, jax.random.key(0), 2)
  found = np.asarray(found)

  def chance(tokens):
    logits = forward(CONFIG, params, jnp.asarray([tokens]))
    return np.asarray(jax.nn.softmax(logits[0, -1]))

  def share(values):
    return np.bincount(values, minlength=CONFIG.vocab_size) / len(values)

  # Five standard deviations of a share.
  close = lambda n: 5 * 0.5 / np.sqrt(n)
  first = share(found[:, 2])
  np.testing.assert_allclose(first, chance([1, 2]), atol=close(rows))
  # The second token is drawn given the first one.
  likely = int(first.argmax())
  given = found[found[:, 2] == likely, 3]
  expected = chance([1, 2, likely])
  np.testing.assert_allclose(share(given), expected, atol=close(len(given)))
  assert np.abs(expected - chance([1, 2])).max() > 2 * close(len(given))


LOGITS = [[1.0, 3.0, 0.5, 2.9, -4.0, 2.0]]


def shares(options, draws=4000):
  keys = jax.random.split(jax.random.key(1), draws)
  logits = jnp.broadcast_to(jnp.asarray(LOGITS), (draws, 6))
  found = sampling.draw(keys, logits, sampling.Sampling(**options))
  assert found.dtype == jnp.int32
  return np.bincount(np.asarray(found), minlength=6) / draws


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 0.3},
    {"top_p": 0.9, "top_k": 3, "temperature": 1.5},
  ],
)
def test_draws_follow_the_truncated_distribution(options):
  scaled = np.asarray(LOGITS[0]) / options.get("temperature", 1.0)
  order = np.argsort(-scaled)[: options.get("top_k", 6)]
  chances = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
  count = np.searchsorted(np.cumsum(chances), options.get("top_p", 1.0)) + 1
  expected = np.zeros(6)
  expected[order[:count]] = chances[:count] / chances[:count].sum()
  found = shares(options)
  assert not found[expected == 0].any()
  # Five standard deviations of a share.
  np.testing.assert_allclose(found, expected, atol=5 * 0.5 / np.sqrt(4000))


def test_equal_logits_do_not_widen_top_k():
  keys = jax.random.split(jax.random.key(0), 200)
  draw = sampling.draw(keys, jnp.zeros((200, 8)), sampling.Sampling(top_k=2))
  assert len(np.unique(draw)) == 2


def test_temperature_0_takes_the_likeliest_and_a_row_its_own_key():
  keys = jax.random.split(jax.random.key(0), 3)
  logits = jax.random.normal(jax.random.key(1), (3, 50))
  greedy = sampling.draw(keys, logits, sampling.Sampling(temperature=0.0))
  np.testing.assert_array_equal(greedy, logits.argmax(-1))
  options = sampling.Sampling(top_p=0.9)
  whole = sampling.draw(keys, logits, options)
  alone = [
    sampling.draw(keys[i : i + 1], logits[i : i + 1], options)[0]
    for i in range(3)
  ]
  np.testing.assert_array_equal(whole, np.asarray(alone))


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.5},
  ],
)
def test_options_out_of_range_are_named(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    sampling.Sampling(**options)
