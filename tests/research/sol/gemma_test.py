"""Episodes of a model with sliding layers, which needs its begin token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, transformer
from models.transformer_config import TransformerConfig
from research.sol import page_union, rollout
from research.sol.rollout import Play
from tests.research.sol import toy

# The window ends in the midst of a page.
CONFIG = TransformerConfig.tiny_gemma(behind=9)
BEGIN = 3
SETUP = toy.setup(config=CONFIG, keep_sink_and_current=True, begin=BEGIN)


@pytest.fixture(scope="module")
def played():
  """Log-likelihoods (W, R, T) by scan, by block, and by the dense model."""
  lm = transformer.init(CONFIG, jax.random.key(0))
  lm["embed"]["table"] = 20 * lm["embed"]["table"]
  tokens = toy.windows(2)
  starts = jnp.broadcast_to(jnp.asarray(toy.LAYOUT.starts()), (2, 3))
  shape = (*starts.shape, toy.HORIZON)
  some = jax.random.randint(jax.random.key(1), shape, 0, toy.TABLE.size)
  # The first episode is dense.
  actions = some.at[:, 0].set(toy.TABLE.full_index)

  @jax.jit
  def both(lm):
    prefix = SETUP.build_prefix(
      lm, tokens[:, : toy.LAYOUT.prefix + 1], toy.CONTEXT
    )
    arguments = (SETUP, lm, prefix, tokens, starts)
    play = Play(controller=toy.replay_controller(actions))
    scan = rollout.scan(*arguments, play, jax.random.key(0))
    block = rollout.score_block(*arguments, actions)
    read = tokens.at[:, 0].set(BEGIN)
    logits = language_model.forward(CONFIG, lm, read)
    return scan.log_p, block.log_p, jax.nn.log_softmax(logits)

  scan, block, dense = map(np.asarray, both(lm))
  at = np.asarray(starts)[:, :, None] + np.arange(toy.HORIZON)
  rows = np.arange(2)[:, None, None]
  return scan, block, dense[rows, at, np.asarray(tokens)[rows, at + 1]]


def test_scan_equals_block(played):
  scan, block, _ = played
  np.testing.assert_allclose(scan, block, rtol=0, atol=1e-4)


def test_full_actions_are_the_dense_model_with_its_begin_token(played):
  scan, _, dense = played
  np.testing.assert_allclose(scan[:, 0], dense[:, 0], rtol=0, atol=1e-4)
  assert np.abs(scan[:, 1:] - dense[:, 1:]).max() > 1e-2


def test_the_union_is_of_pages_that_layers_see():
  """All pages of a window are read where its budget is all of them."""
  lm = transformer.init(CONFIG, jax.random.key(0))
  windows = np.asarray(toy.windows(2))
  found = page_union.measure(SETUP, lm, windows, first=toy.CONTEXT, batch=2)
  assert found[1.0] == 1
  assert 1 < found[0.3] < 2
