import jax
import numpy as np
import pytest

from research.quantization import apply, quality
from research.quantization.recipes import RECIPES
from tests.research.quantization.conftest import logits


@pytest.fixture(scope="module")
def quantized(mamba2, batches):
  return apply.quantize(*mamba2, RECIPES["quamba2_w8a8"], batches)


def test_decoding_gives_the_probabilities_of_the_whole_pass(
  mamba2, quantized, batches
):
  tokens = batches[0]
  found = quality.along(mamba2, quantized, tokens)
  scores = np.asarray(jax.nn.log_softmax(logits(*mamba2, tokens)))[:, :-1]
  own = -np.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(found["first"], own, rtol=1e-3, atol=1e-3)
  assert found["kl"].shape == own.shape
  assert 0 < found["kl"].mean() < 0.1 and (found["kl"] > -1e-6).all()
  # Rows are their own: the state of one does not reach another.
  alone = quality.along(mamba2, quantized, tokens[:1])
  np.testing.assert_allclose(alone["second"], found["second"][:1], atol=2e-3)


def test_a_model_does_not_diverge_from_itself(mamba2, batches):
  found = quality.along(mamba2, mamba2, batches[0])
  assert np.abs(found["kl"]).max() < 1e-6
  np.testing.assert_array_equal(found["first"], found["second"])


def test_draws_depend_on_the_seed_alone(mamba2, batches):
  draw = lambda seed: quality.continuation(
    mamba2, batches[0][:, :4], tokens=8, seed=seed
  )
  assert draw(0).shape == (2, 12)
  np.testing.assert_array_equal(draw(0), draw(0))
  np.testing.assert_array_equal(draw(0)[:, :4], batches[0][:, :4])
  assert (draw(0) != draw(1)).any()


def test_repetition_is_the_share_of_runs_seen_before():
  rows = np.array([[1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]])
  np.testing.assert_allclose(quality.repetition(rows), [0, 2 / 3])


def test_divergence_near_a_token_is_that_of_the_tokens_before_it():
  kl = np.arange(40.0)[None]
  assert quality.near({"kl": kl}, 16)[0] == np.mean(np.arange(8, 16))
  assert quality.near({"kl": kl}, 4)[0] == np.mean(np.arange(4))
