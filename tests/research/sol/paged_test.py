import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.caches.dense import DenseCache
from research.sol import paged, rollout
from research.sol.actions import ActionTable
from tests.research.sol import toy

TABLE = ActionTable.product("pages", (0.2, 0.5, 1.0), (1.0,), (16,))
SETUP = toy.setup(table=TABLE, keep_sink_and_current=True, shared_pages=True)
START, STEPS = 40, 12
ACTIONS = np.asarray([0, 2, 1, 0, 0, 1, 2, 2, 0, 1, 0, 0], np.int32)


@pytest.fixture(scope="module")
def prefix():
  tokens = jnp.asarray(toy.text(START + 1))[None]
  return SETUP.build_prefix(toy.lm(), tokens, START)


def played(memory, read, actions):
  """Hidden states (STEPS, D) of tokens that are read under actions."""

  def step(memory, now):
    t, token, action = now
    one = lambda x: jnp.full((1, 1), x, jnp.int32)
    hidden, memory = read(memory, one(token), one(action), t)
    return memory, hidden[0, 0]

  tokens = jnp.asarray(toy.text(STEPS, seed=1))
  each = jnp.arange(STEPS, dtype=jnp.int32), tokens, jnp.asarray(actions)
  return jax.lax.scan(step, memory, each)[1]


@jax.jit
def by_masks(prefix, actions):
  model = transformer.bind(SETUP.config, toy.lm())
  starts = jnp.full((1, 1), START, jnp.int32)
  memory = rollout.no_suffix(SETUP.config, (1, 1), STEPS, prefix.k.dtype)
  read = rollout.masked(SETUP, model, prefix, starts)
  return played(memory, read, actions)


@jax.jit
def by_pages(prefix, actions):
  read = paged.forward(SETUP, toy.lm())
  return played(paged.memory(SETUP, prefix, STEPS), read, actions)


@jax.jit
def by_decoding(prefix):
  """By the step of any Transformer, from a cache without pages."""
  step = functools.partial(transformer.read, SETUP.config, toy.lm())
  found = paged.memory(SETUP, prefix, STEPS)
  cache = DenseCache(k=found.cache.k, v=found.cache.v)
  memory = transformer.TransformerState(cache=cache, length=found.length)
  return played(memory, lambda state, token, *_: step(token, state), ACTIONS)


def logits(hidden):
  return np.asarray(transformer.bind(SETUP.config, toy.lm()).logits(hidden))


def test_logits_are_those_of_the_masked_reference(prefix):
  masked = logits(by_masks(prefix, ACTIONS))
  read = logits(by_pages(prefix, ACTIONS))
  # Sums of 52 tokens and of the width in float32, over two layers.
  np.testing.assert_allclose(read, masked, atol=2e-4)
  dense = logits(by_pages(prefix, np.full_like(ACTIONS, 2)))
  differs = np.abs(read - dense).max(-1)
  # The second token was read behind what the first one left, and so on.
  assert (differs > 1e-2).all()


def test_the_dense_action_is_the_dense_step_bit_for_bit(prefix):
  found = by_pages(prefix, np.full_like(ACTIONS, 2))
  np.testing.assert_array_equal(found, by_decoding(prefix))


def test_each_level_gathers_no_more_than_it_keeps(prefix):
  """Of 13 pages 3 and 7; nothing else indexes keys by pages."""
  read = jax.jit(paged.forward(SETUP, toy.lm()))
  memory = paged.memory(SETUP, prefix, STEPS)
  token = jnp.zeros((1, 1), jnp.int32)
  text = read.lower(memory, token, token, 0).as_text()
  c = SETUP.config
  sizes = {
    count
    for count in range(1, 14)
    if f"tensor<1x{c.num_kv_heads}x{count}x{toy.PAGE}x{c.head_dim}xf32>" in text
  }
  assert sizes == {3, 7}


@pytest.mark.parametrize(
  "changes",
  [
    {"shared_pages": False},
    {"keep_sink_and_current": False},
    {"table": toy.TABLE},
    {"table": ActionTable.product("all", (1.0,), (1.0,), (16,))},
  ],
)
def test_other_actions_are_masked(changes):
  given = {"table": TABLE, "keep_sink_and_current": True, "shared_pages": True}
  assert paged.reads_pages(SETUP)
  assert not paged.reads_pages(toy.setup(**(given | changes)))
