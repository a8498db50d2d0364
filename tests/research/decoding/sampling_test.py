import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.decoding import sampling

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


def test_a_temperature_of_hardly_more_than_0_is_greedy():
  keys = jax.random.split(jax.random.key(0), 3)
  logits = 300 * jax.random.normal(jax.random.key(1), (3, 50))
  for temperature in (1e-8, 1e-20, 1e-38, 5e-324):
    options = sampling.Sampling(temperature=temperature, top_p=0.9)
    found = sampling.draw(keys, logits, options)
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_one_key_draws_for_all_rows():
  key, logits = jax.random.key(3), jax.random.normal(jax.random.key(1), (3, 50))
  found = sampling.draw(key, logits, sampling.Sampling())
  expected = jax.random.categorical(key, logits, axis=-1)
  np.testing.assert_array_equal(found, expected)


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
