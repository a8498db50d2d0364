import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, transformer
from models.caches.paged import PageBudget
from models.transformer_config import TransformerConfig
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling

CONFIG = TransformerConfig.tiny(vocab_size=6)
LENGTH = 9


forward = jax.jit(language_model.forward, static_argnums=0)


@pytest.fixture(scope="module")
def params():
  init = jax.jit(transformer.init, static_argnums=0)
  params = init(CONFIG, jax.random.key(0))
  params["embed"]["table"] = 20 * params["embed"]["table"]
  return params


@pytest.fixture(scope="module")
def prompt():
  return jnp.asarray([[1, 2, 3], [4, 5, 0]], jnp.int32)


def draw(
  params, prompt, key=0, temperature=1.0, length=LENGTH, pages=None
):  # fmt: skip
  """Prompts of one length, and `length` tokens behind each; one key for all."""
  sampling = Sampling(temperature=temperature)
  method = Plain(config=CONFIG, sampling=sampling, pages=pages)
  lengths = jnp.full(len(prompt), prompt.shape[1])
  batch, first = loop.begin(
    method,
    params,
    prompt,
    lengths,
    jax.random.key(key),
    cache_size=prompt.shape[1] + length,
  )
  _, rest = loop.advance(method, params, batch, steps=length - 1)
  return np.hstack([prompt, first.tokens[..., 0], rest.tokens[..., 0]])


def test_keys_decide(params, prompt):
  found = draw(params, prompt)
  assert found.shape == (2, 3 + LENGTH) and found.dtype == jnp.int32
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
  found = draw(params, prompt, length=2)

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


def test_tokens_may_read_some_pages_alone(params):
  """All pages are the dense cache; fewer read less, and still draw tokens."""
  prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 40))
  prompt = jnp.asarray(prompt, jnp.int32)
  dense = draw(params, prompt, temperature=1e-4, length=6)
  whole, some = (
    draw(
      params, prompt, temperature=1e-4, length=6,
      pages=PageBudget(keep=keep, page_size=8),
    )
    for keep in (1.0, 0.3)
  )  # fmt: skip
  np.testing.assert_array_equal(whole, dense)
  assert some.shape == dense.shape and some.min() >= 0
