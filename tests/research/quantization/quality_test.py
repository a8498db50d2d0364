import jax
import numpy as np
import pytest

from research.quantization import apply, quality
from research.quantization.recipes import RECIPES
from tests.research.quantization.conftest import logits


@pytest.fixture(scope="module")
def quantized(mamba2, batches):
  return apply.quantize(*mamba2, RECIPES["quamba2_w8a8"], batches)


def scores(model, tokens):
  return np.asarray(jax.nn.log_softmax(logits(*model, tokens)))[:, :-1]


@pytest.mark.parametrize("name", ["float", "quantized"])
def test_decoding_gives_the_probabilities_of_the_whole_pass(
  mamba2, quantized, batches, name
):
  tokens, keep = batches[0], (2, 3, 17)
  own = mamba2 if name == "float" else quantized
  found = quality.read(own, tokens, keep=keep, rows=1)
  whole = scores(own, tokens)
  nll = -np.take_along_axis(whole, tokens[:, 1:, None], -1)[..., 0]
  # States of 8 bits are rounded here alone.
  bound = 1e-3 if name == "float" else 0.2
  np.testing.assert_allclose(found.nll, nll, rtol=1e-3, atol=bound)
  np.testing.assert_allclose(
    found.kept, whole[:1, keep].swapaxes(0, 1), rtol=1e-3, atol=bound
  )
  np.testing.assert_array_equal(found.tokens, tokens)
  # Rows are their own: the state of one does not reach another.
  alone = quality.read(own, tokens[:1])
  np.testing.assert_allclose(alone.nll, found.nll[:1], atol=2e-3)
  assert alone.kept.shape == (0, 0, found.kept.shape[-1])


def test_divergence_of_a_quantized_model_and_of_the_same(
  mamba2, quantized, batches
):
  kept = [
    quality.read(own, batches[0], keep=range(8), rows=2).kept
    for own in (mamba2, quantized)
  ]
  found = np.asarray(quality.divergence(*kept))
  assert found.shape == (8, 2)
  assert 0 < found.mean() < 0.1 and (found > -1e-6).all()
  assert np.abs(quality.divergence(kept[0], kept[0])).max() < 1e-6


def test_draws_depend_on_the_seed_alone(mamba2, batches):
  tokens, free = batches[0][:, :12], np.array([True, False])
  draw = lambda seed: quality.read(
    mamba2, tokens, free=free, prompt=4, seed=seed
  )
  found = draw(0)
  np.testing.assert_array_equal(found.tokens, draw(0).tokens)
  np.testing.assert_array_equal(found.tokens[:, :4], tokens[:, :4])
  np.testing.assert_array_equal(found.tokens[1], tokens[1])
  assert (found.tokens[0] != draw(1).tokens[0]).any()
  # What was drawn is scored as if it had been given.
  again = quality.read(mamba2, found.tokens)
  np.testing.assert_allclose(found.nll, again.nll, atol=1e-5)


def test_draws_follow_the_distribution(mamba2, batches):
  prompt = batches[0][:1, :2]
  many = np.repeat(np.pad(prompt, ((0, 0), (0, 1))), 4096, axis=0)
  found = quality.read(mamba2, many, free=np.ones(4096, bool), prompt=2)
  chances = np.exp(scores(mamba2, many[:1])[0, 1])
  shares = np.bincount(found.tokens[:, 2], minlength=len(chances)) / 4096
  assert np.abs(shares - chances).max() < 5 * np.sqrt(0.25 / 4096)


def test_repetition_is_the_share_of_runs_seen_before():
  rows = np.array([[1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]])
  np.testing.assert_allclose(quality.repetition(rows), [0, 2 / 3])


def test_divergence_near_a_token_is_that_of_the_tokens_before_it():
  assert list(quality.near(16)) == list(range(8, 16))
  assert list(quality.near(4)) == list(range(4))
