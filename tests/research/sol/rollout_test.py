import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, transformer
from research.sol import rollout
from research.sol.rollout import Controller, Play
from tests.research.sol import toy

WINDOWS, REPEATS = 2, 2


@pytest.fixture(scope="module")
def tokens():
  return toy.windows(WINDOWS)


@pytest.fixture(scope="module")
def starts():
  """Every start of the layout, REPEATS rollouts each, in another order."""
  each = np.repeat(toy.LAYOUT.starts(), REPEATS)
  return jnp.asarray(np.stack([each, each[::-1]]))


@pytest.fixture(scope="module")
def actions(starts):
  shape = (*starts.shape, toy.HORIZON)
  return jax.random.randint(jax.random.key(1), shape, 0, toy.TABLE.size)


def dense_prefix(setup, lm, tokens):
  return setup.build_prefix(lm, tokens[:, : toy.LAYOUT.prefix + 1], toy.CONTEXT)


@functools.partial(jax.jit, static_argnums=0)
def jitted_block(setup, lm, tokens, starts, actions):
  prefix = dense_prefix(setup, lm, tokens)
  return rollout.score_block(
    setup, lm, prefix, tokens, starts, actions, record=True, chunk=20
  )


@functools.partial(jax.jit, static_argnums=0)
def jitted_scan(setup, lm, tokens, starts, actions):
  return rollout.scan(
    setup,
    lm,
    dense_prefix(setup, lm, tokens),
    tokens,
    starts,
    Play(controller=toy.replay_controller(actions)),
    jax.random.key(0),
    record=True,
  )


def block(setup, *arguments):
  return jitted_block(setup, toy.lm(), *arguments)


@pytest.mark.parametrize(
  "sink, prune", [(False, "input"), (True, "intermediate")]
)
def test_scan_equals_block(sink, prune, tokens, starts, actions):
  setup = toy.setup(keep_sink_and_current=sink, prune=prune)
  one = jitted_scan(setup, toy.lm(), tokens, starts, actions)
  other = block(setup, tokens, starts, actions)
  np.testing.assert_array_equal(one.actions, actions)
  np.testing.assert_allclose(one.log_p, other.log_p, rtol=0, atol=1e-4)
  chex.assert_trees_all_close(
    one.observations, other.observations, rtol=1e-4, atol=1e-4
  )


@functools.partial(jax.jit, static_argnums=(0, 5))
def unbroken(setup, lm, tokens, starts, actions, episodes):
  """One scan over episodes on end, and the same as one block."""
  prefix = dense_prefix(setup, lm, tokens)
  play = Play(controller=toy.replay_controller(actions))
  arguments = (setup, lm, prefix, tokens, starts)
  scan = rollout.scan(*arguments, play, jax.random.key(0), episodes=episodes)
  # The controller begins anew, and so plays the same actions again.
  again = jnp.tile(actions, (1, 1, episodes))
  return scan, rollout.score_block(*arguments, again)


def test_episodes_on_end_read_what_actions_left_behind(tokens, starts, actions):
  setup, lm = toy.setup(), toy.lm()
  first = jnp.full_like(starts, toy.CONTEXT)
  one, other = unbroken(setup, lm, tokens, first, actions, 2)
  assert one.log_p.shape == (*starts.shape, 2 * toy.HORIZON)
  np.testing.assert_array_equal(one.actions[..., toy.HORIZON :], actions)
  np.testing.assert_allclose(one.log_p, other.log_p, rtol=0, atol=1e-4)
  apart = [
    jitted_scan(setup, lm, tokens, first + at, actions).log_p
    for at in (0, toy.HORIZON)
  ]
  np.testing.assert_allclose(
    one.log_p[..., : toy.HORIZON], apart[0], rtol=0, atol=1e-4
  )
  assert np.abs(one.log_p[..., toy.HORIZON :] - apart[1]).max() > 1e-2
  full = jnp.full_like(actions, toy.TABLE.full_index)
  dense, _ = unbroken(setup, lm, tokens, first, full, 2)
  refreshed = jitted_scan(setup, lm, tokens, first + toy.HORIZON, full)
  np.testing.assert_allclose(
    dense.log_p[..., toy.HORIZON :], refreshed.log_p, rtol=0, atol=1e-4
  )


def test_divergence_is_that_of_the_dense_models_prediction(
  tokens, starts, actions
):
  """By hand in float64; scan and block alike, with rollouts side by side."""
  setup = toy.setup()
  episodes = jnp.broadcast_to(toy.LAYOUT.starts()[None], (WINDOWS, 3))
  starts = jnp.repeat(episodes, REPEATS, axis=1)

  @jax.jit
  def both(lm):
    prefix = dense_prefix(setup, lm, tokens)
    arguments = (setup, lm, prefix, tokens, starts)
    dense = rollout.dense_hidden(setup, lm, prefix, tokens, episodes)
    play = Play(controller=toy.replay_controller(actions))
    key = jax.random.key(0)
    scan = rollout.scan(*arguments, play, key, record=True, dense=dense)
    return scan, rollout.score_block(
      *arguments, actions, record=True, dense=dense, chunk=20
    )

  one, other = both(toy.lm())
  np.testing.assert_allclose(
    one.divergence, other.divergence, rtol=0, atol=1e-4
  )
  np.testing.assert_array_equal(other.rewards, -other.divergence)
  plain = block(setup, tokens, starts, actions)
  np.testing.assert_allclose(other.log_p, plain.log_p, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(plain.rewards, plain.log_p)

  model = transformer.bind(toy.CONFIG, toy.lm())
  log_softmax = lambda x: np.log(
    np.exp(x - x.max(-1, keepdims=True))
    / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
  )
  dense = np.asarray(language_model.forward(toy.CONFIG, toy.lm(), tokens))
  at = np.asarray(starts)[..., None] + np.arange(toy.HORIZON)
  dense = log_softmax(np.float64(dense)[np.arange(WINDOWS)[:, None, None], at])
  # A step's hidden state is what the next step sees.
  seen = model.logits(other.observations.hidden[:, :, 1:])
  pruned = log_softmax(np.asarray(seen, np.float64))
  dense = dense[:, :, :-1]
  expected = (np.exp(dense) * (dense - pruned)).sum(-1)
  np.testing.assert_allclose(
    other.divergence[:, :, :-1], expected, rtol=0, atol=1e-3
  )


def test_options_and_actions_change_the_prediction(tokens, starts, actions):
  found = [
    block(toy.setup(**changes), tokens, starts, played).log_p
    for changes, played in [
      ({}, actions),
      ({"keep_sink_and_current": True, "prune": "intermediate"}, actions),
      ({}, jnp.full_like(actions, toy.TABLE.full_index)),
    ]
  ]
  for i in range(len(found)):
    for j in range(i):
      assert np.abs(found[i] - found[j]).max() > 1e-2


def test_the_full_action_is_the_dense_model(tokens, starts, actions):
  full = jnp.full_like(actions, toy.TABLE.full_index)
  found = block(toy.setup(), tokens, starts, full)
  logits = language_model.forward(toy.CONFIG, toy.lm(), tokens)
  log_probs = jax.nn.log_softmax(logits)
  at = starts[..., None] + np.arange(toy.HORIZON)[None, None]
  rows = np.arange(WINDOWS)[:, None, None]
  expected = log_probs[rows, at, tokens[rows, at + 1]]
  np.testing.assert_allclose(found.log_p, expected, rtol=0, atol=1e-4)
  # What the controller sees first is the dense model's too.
  first = toy.LAYOUT.starts()[0]
  seen = jax.tree.map(lambda x: np.asarray(x)[0, 0, 0], found.observations)
  p = log_probs[0, first - 1]
  np.testing.assert_allclose(
    seen.scalars[:2],
    [-p[tokens[0, first]], -np.sum(np.exp(p) * p)],
    rtol=1e-4,
  )
  targets = tokens[0, 1 : first + 1]
  mean = -np.mean(np.asarray(log_probs[0])[np.arange(first), targets])
  np.testing.assert_allclose(seen.scalars[3], mean, rtol=1e-4)
  assert seen.previous == toy.TABLE.size and seen.step == 0
  np.testing.assert_array_equal(seen.spent, 0)


def test_spending_and_previous_action_are_of_the_steps_before(
  tokens, starts, actions
):
  seen = block(toy.setup(), tokens, starts, actions).observations
  costs = np.asarray(rollout.action_costs(toy.TABLE))[np.asarray(actions)]
  for t in range(1, toy.HORIZON):
    np.testing.assert_array_equal(seen.previous[..., t], actions[..., t - 1])
    np.testing.assert_allclose(
      seen.spent[:, :, t], costs[:, :, :t].mean(2), rtol=1e-5
    )


def test_a_shared_prefix_equals_a_window_of_its_own(tokens, starts, actions):
  setup = toy.setup()
  together = block(setup, tokens, starts, actions)
  start = toy.CONTEXT
  own = slice(0, REPEATS)  # of window 0, where the first episodes are first

  @jax.jit
  def alone(lm, tokens, starts, actions):
    prefix = setup.build_prefix(lm, tokens[:, : start + 1], start)
    return rollout.score_block(
      setup, lm, prefix, tokens, starts, actions, record=True
    )

  found = alone(
    toy.lm(),
    tokens[:1, : start + toy.HORIZON + 1],
    starts[:1, own],
    actions[:1, own],
  )
  chex.assert_trees_all_close(
    found, jax.tree.map(lambda x: x[:1, own], together), rtol=1e-4, atol=1e-4
  )


def test_later_tokens_do_not_reach_back(tokens, starts, actions):
  """A changed token changes nothing before it, and something after it."""
  changed = tokens.at[:, toy.CONTEXT + 5].add(1) % toy.CONFIG.vocab_size
  here = jnp.full_like(starts, toy.CONTEXT)
  one = block(toy.setup(), tokens, here, actions)
  other = block(toy.setup(), changed, here, actions)
  # Step 4 has the changed token as its target.
  np.testing.assert_array_equal(one.log_p[..., :4], other.log_p[..., :4])
  assert np.all(one.log_p[..., 4] != other.log_p[..., 4])
  one, other = one.observations, other.observations
  for name in ("scalars", "hidden", "drift"):
    a, b = getattr(one, name), getattr(other, name)
    np.testing.assert_array_equal(a[:, :, :5], b[:, :, :5])
    assert np.any(a[:, :, 6] != b[:, :, 6])


def test_a_rollout_is_traced_once(tokens, starts):
  setup = toy.setup()
  calls = []

  def act(params, goal, carry, seen, key):
    calls.append(seen)
    action = jax.random.randint(key, seen.step.shape, 0, toy.TABLE.size)
    return action, carry, goal

  controller = Controller(start=lambda params, goal: (), act=act)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(lm, tokens, starts, goal, key):
    prefix = dense_prefix(setup, lm, tokens)
    play = Play(controller=controller, goal=goal)
    return rollout.scan(setup, lm, prefix, tokens, starts, play, key)

  goal = jnp.zeros(starts.shape)
  first = run(toy.lm(), tokens, starts, goal, jax.random.key(0))
  traced = len(calls)
  # One trace serves all steps: the loop is not unrolled.
  assert traced < toy.HORIZON
  second = run(
    toy.lm(), tokens[::-1], starts[::-1], goal + 1, jax.random.key(1)
  )
  assert len(calls) == traced
  assert np.any(first.actions != second.actions)
  np.testing.assert_array_equal(second.extras, 1)
  assert second.observations is None
