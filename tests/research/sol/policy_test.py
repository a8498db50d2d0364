import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import module, transformer
from models.transformer_config import TransformerConfig
from research.cost import decode_step
from research.sol import (
  actions,
  cost,
  damage,
  light_policy,
  observation,
  policy,
)
from research.sol.observation import Observation
from research.sol.policy import InputStats, PolicyConfig
from tests.research.sol import toy

TABLE = actions.preset("J-3L")
WINDOWS, ROLLOUTS, HORIZON, WIDTH = 2, 3, 6, 10
HEADS = ("gain", "published")


def config(head, **changes):
  settings = {
    "table": TABLE,
    "lm_width": WIDTH,
    "horizon": HORIZON,
    "head": head,
    "width": 16,
    "num_heads": 2,
    "temperature": 0.7,
  }
  return PolicyConfig(**(settings | changes))


def noisy_params(shape):
  """No weight is zero, as some are at the start."""
  params = policy.init(shape, jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  generator = np.random.default_rng(1)
  leaves = [
    leaf + jnp.asarray(0.1 * generator.normal(size=leaf.shape), jnp.float32)
    for leaf in leaves
  ]
  return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module")
def seen():
  generator = np.random.default_rng(0)
  shape = (WINDOWS, ROLLOUTS, HORIZON)
  make = lambda *tail: jnp.asarray(
    generator.normal(size=(*shape, *tail)), jnp.float32
  )
  previous = generator.integers(0, TABLE.size, shape).astype(np.int32)
  previous[..., 0] = TABLE.size
  steps = np.broadcast_to(np.arange(HORIZON, dtype=np.int32), shape)
  return Observation(
    hidden=make(WIDTH),
    embed=make(WIDTH),
    scalars=make(len(observation.SCALARS)),
    drift=make(),
    previous=jnp.asarray(previous),
    spent=jnp.abs(make(3)),
    step=jnp.asarray(steps),
  )


def damage_of():
  return toy.damage(TABLE) * jnp.array([[0.4, 0.9, 0.2]])


def at_step(seen, t):
  return jax.tree.map(lambda x: x[:, :, t], seen)


def goal_of(shape, seed=0):
  generator = np.random.default_rng(seed)
  size = (WINDOWS, ROLLOUTS, shape.goal_size)
  return jnp.asarray(generator.uniform(0.3, 1, size), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def run_whole(shape, params, seen, goal):
  return policy.bind(shape, params)(seen, goal, damage_of())


@pytest.mark.parametrize("head", HEADS)
def test_step_by_step_equals_whole_episodes(head, seen):
  shape = config(head)
  params, goal = noisy_params(shape), goal_of(shape)
  whole, _ = run_whole(shape, params, seen, goal)
  assert whole.shape == (WINDOWS, ROLLOUTS, HORIZON, TABLE.size)

  @jax.jit
  def step(params, seen, goal, cache):
    return policy.bind(shape, params).step(seen, goal, damage_of(), cache)

  cache, _ = policy.controller(shape, greedy=True).start(None, goal)
  for t in range(HORIZON):
    now = at_step(seen, t)
    logits, cache = step(params, now, goal, cache)
    np.testing.assert_allclose(logits, whole[:, :, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_a_step_sees_the_past_and_not_the_future(head, seen):
  shape = config(head)
  params, goal = noisy_params(shape), goal_of(shape)
  later = dataclasses.replace(seen, hidden=seen.hidden.at[:, :, 3].add(1.0))
  one, _ = run_whole(shape, params, seen, goal)
  other, _ = run_whole(shape, params, later, goal)
  changed = np.abs(one - other).max((0, 1, 3))
  np.testing.assert_array_equal(changed[:3], 0)
  assert (changed[3:] > 1e-4).all()


@pytest.mark.parametrize("head", HEADS)
def test_every_input_is_used(head, seen):
  shape = config(head)
  params, goal = noisy_params(shape), goal_of(shape)
  base, _ = run_whole(shape, params, seen, goal)
  for name in ("hidden", "embed", "scalars", "spent"):
    other = dataclasses.replace(seen, **{name: getattr(seen, name) + 0.5})
    assert np.any(run_whole(shape, params, other, goal)[0] != base), name
  # The drift is for a baseline alone.
  other = dataclasses.replace(seen, drift=seen.drift + 1)
  np.testing.assert_array_equal(run_whole(shape, params, other, goal)[0], base)
  # Nothing was spent before the first step, whatever stands there.
  other = dataclasses.replace(seen, spent=seen.spent.at[:, :, 0].add(1.0))
  np.testing.assert_array_equal(run_whole(shape, params, other, goal)[0], base)


def test_the_published_policy_is_blind_to_surprise(seen):
  shape = config("published", surprise=False)
  params, goal = noisy_params(shape), goal_of(shape)
  other = dataclasses.replace(seen, scalars=seen.scalars + 1)
  one, sensitivity = run_whole(shape, params, seen, goal)
  np.testing.assert_array_equal(run_whole(shape, params, other, goal)[0], one)
  assert sensitivity is None


def test_gains_are_damage_times_sensitivity_and_logits_their_value(seen):
  shape = config("gain")
  params, goal = noisy_params(shape), goal_of(shape)
  logits, sensitivity = run_whole(shape, params, seen, goal)
  assert sensitivity.min() > np.exp(-3) and sensitivity.max() < np.exp(3)
  assert np.ptp(sensitivity, axis=(0, 1, 2)).min() > 0.1
  # Own step and later tokens.
  gains = -(np.float64(sensitivity) + 0.25) @ np.float64(damage_of()).T
  np.testing.assert_allclose(
    damage.gains(sensitivity, damage_of()), gains, rtol=1e-4, atol=1e-6
  )
  value = gains / np.asarray(goal)[:, :, None] - cost.net_keep(TABLE)
  np.testing.assert_allclose(logits, value / 0.7, rtol=1e-4, atol=1e-4)


def test_a_new_gain_head_is_the_best_static_action(seen):
  shape = config("gain")
  params, goal = policy.init(shape, jax.random.key(0)), goal_of(shape)
  logits, sensitivity = run_whole(shape, params, seen, goal)
  np.testing.assert_allclose(sensitivity, 1, atol=1e-6)
  mean = -1.25 * np.asarray(damage_of()).sum(1)
  value = mean - np.asarray(goal) * cost.net_keep(TABLE)
  best = np.broadcast_to(value.argmax(-1)[..., None], logits.shape[:-1])
  np.testing.assert_array_equal(logits.argmax(-1), best)
  assert len(np.unique(best)) > 1


def test_a_stray_input_cannot_decide_alone(seen):
  shape = config("gain")
  params, goal = noisy_params(shape), goal_of(shape)
  far = dataclasses.replace(seen, scalars=1e4 * seen.scalars)
  logits, sensitivity = run_whole(shape, params, far, goal)
  assert np.isfinite(logits).all()
  assert (sensitivity <= np.exp(3) * 1.0001).all() and (sensitivity > 0).all()


def test_a_higher_price_never_spends_more_at_the_same_gains(seen):
  shape = config("gain")
  model = policy.bind(shape, noisy_params(shape))
  costs = np.float64(cost.net_keep(TABLE))
  generator = np.random.default_rng(2)
  size = (*seen.step.shape, 16)
  x = jnp.asarray(generator.normal(size=size), jnp.float32)
  mean, best = [], []
  for price in (1e-3, 0.03, 0.1, 0.5, 2.0, 1000.0):
    goal = jnp.full((*seen.step.shape, 1), price)
    logits, _ = model.heads(x, seen, goal, damage_of())
    mean.append(np.float64(jax.nn.softmax(logits)) @ costs)
    best.append(costs[logits.argmax(-1)])
  # Neither the sampled actions in the mean nor the best one.
  assert (np.diff(mean, axis=0) < 0).all()
  assert (np.diff(best, axis=0) <= 0).all()
  np.testing.assert_allclose(best[0], 1)
  np.testing.assert_allclose(best[-1], costs.min())


@pytest.mark.parametrize("greedy", [True, False])
def test_the_controller_acts_as_the_policy_says(greedy, seen):
  shape = config("gain")
  params, goal = noisy_params(shape), goal_of(shape)
  stats = InputStats.measure(seen, damage_of())
  whole, _ = run_whole(shape, params, stats.apply(seen), goal)
  log_probs = np.asarray(jax.nn.log_softmax(whole))
  controller = policy.controller(shape, greedy=greedy)
  assert controller is policy.controller(shape, greedy=greedy)
  act = jax.jit(controller.act)
  carry = controller.start(None, goal)
  taken = []
  for t in range(HORIZON):
    now = at_step(seen, t)
    key = jax.random.key(t)
    action, carry, log_p = act((params, stats), goal, carry, now, key)
    assert action.dtype == jnp.int32
    expected = np.take_along_axis(
      log_probs[:, :, t], np.asarray(action)[..., None], -1
    )
    np.testing.assert_allclose(log_p, expected[..., 0], rtol=1e-4, atol=1e-3)
    taken.append(action)
  best = whole.argmax(-1)
  assert np.all(best == np.stack(taken, 2)) == greedy


def test_standardised_inputs_have_mean_0_and_deviation_1(seen):
  found = InputStats.measure(seen, damage_of()).apply(seen)
  for name in ("hidden", "embed", "scalars"):
    values = np.asarray(getattr(found, name))
    values = values.reshape(-1, values.shape[-1])
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-3)
  untouched = InputStats.identity(WIDTH, damage_of()).apply(seen)
  chex.assert_trees_all_equal(untouched, seen)


def test_the_published_size():
  """Some 6.2 million on Llama-3.2-1B; that has a value head of 0.3 to 0.5."""
  lm = TransformerConfig.llama3_2_1b()
  shape = PolicyConfig(
    table=actions.preset("J-FL"),
    lm_width=lm.d_model,
    horizon=16,
    head="published",
    surprise=False,
  )
  params = jax.eval_shape(lambda: policy.init(shape, jax.random.key(0)))
  linear = lambda a, b: a * b + b
  expected = (
    linear(8, 64)
    + 1561 * 32
    + linear(2 * 2048 + 64 + 32, 512)
    + 16 * 512
    + linear(512, 3 * 512)
    + linear(512, 512)
    + linear(512, 2048)
    + linear(2048, 512)
    + linear(512, 1560)
    + linear(3, 32)
    + linear(32, 1560)
    + 2 * (64 + 3 * 512)
  )
  assert module.num_params(params) == expected
  assert 0.004 < expected / transformer.num_params(lm) < 0.0055


LIGHT = {
  "scalars": {"kind": "scalars"},
  "head": {"kind": "head", "rank": 3},
  "embed": {"kind": "head", "rank": 3, "source": "embed"},
}


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_policy_steps_as_it_reads_episodes(name, seen):
  shape = config("gain", **LIGHT[name])
  params, goal = noisy_params(shape), goal_of(shape)
  stats = InputStats.measure(seen, damage_of())
  whole, sensitivity = run_whole(shape, params, stats.apply(seen), goal)
  assert whole.shape == (WINDOWS, ROLLOUTS, HORIZON, TABLE.size)
  assert np.ptp(sensitivity, axis=(0, 1, 2)).min() > 0.1
  controller = policy.controller(shape, greedy=True)
  act, carry = jax.jit(controller.act), controller.start(None, goal)
  for t in range(HORIZON):
    now = at_step(seen, t)
    action, carry, _ = act((params, stats), goal, carry, now, None)
    np.testing.assert_array_equal(action, whole[:, :, t].argmax(-1))


def test_a_light_policy_sees_what_it_says(seen):
  blind = {
    "scalars": ("hidden", "embed"),
    "head": ("embed",),
    "embed": ("hidden",),
  }
  for name, unseen in blind.items():
    shape = config("gain", **LIGHT[name])
    params, goal = noisy_params(shape), goal_of(shape)
    base, _ = run_whole(shape, params, seen, goal)
    for field in ("hidden", "embed", "scalars"):
      other = dataclasses.replace(seen, **{field: getattr(seen, field) + 0.5})
      found, _ = run_whole(shape, params, other, goal)
      assert np.array_equal(found, base) == (field in unseen), (name, field)


def test_a_new_light_policy_is_the_best_static_action(seen):
  shape = config("gain", kind="head")
  params, goal = policy.init(shape, jax.random.key(0)), goal_of(shape)
  _, sensitivity = run_whole(shape, params, seen, goal)
  np.testing.assert_allclose(sensitivity, 1, atol=1e-6)


def test_a_decision_holds_until_the_next(seen):
  shape = config("gain", kind="scalars", hold=3)
  params, goal = noisy_params(shape), goal_of(shape)
  stats = InputStats.identity(WIDTH, damage_of())
  whole, _ = run_whole(shape, params, seen, goal)
  controller = policy.controller(shape, greedy=True)
  carry = controller.start(None, goal)
  for t in range(HORIZON):
    now = at_step(seen, t)
    action, carry, _ = controller.act((params, stats), goal, carry, now, None)
    expected = whole[:, :, t - t % 3].argmax(-1)
    np.testing.assert_array_equal(action, expected)


def test_rounded_weights_are_integers_of_a_scale_a_column():
  params = noisy_params(config("gain", kind="head"))
  assert light_policy.rounded(params, 16) is params
  found = light_policy.rounded(params, 8)
  for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(found)):
    old, new = np.float64(old), np.float64(new)
    scale = np.abs(old).max(0 if old.ndim > 1 else None) / 127
    np.testing.assert_allclose(new / scale, np.round(new / scale), atol=1e-3)
    assert (np.abs(new - old) <= 0.501 * scale).all()


def test_light_policies_are_below_a_thousandth_of_a_step():
  """The large one is not; on SmolLM2 at a context of 768."""
  lm = TransformerConfig.smollm2_135m()
  table = actions.preset("KR-FL")
  step = {"kappa": 1.0, "rho": 1.0, "context": 768, "page_size": 8}
  moved = decode_step.bytes_per_token(lm, **step)
  shares = {}
  for kind in ("scalars", "head", "large"):
    shape = PolicyConfig(
      table=table, lm_width=lm.d_model, horizon=16, kind=kind, width=256
    )
    params = jax.eval_shape(lambda s=shape: policy.init(s, jax.random.key(0)))
    own = shape.own_cost(module.num_params(params))
    shares[kind] = float(own.bytes / moved)
    halved = dataclasses.replace(shape, hold=4, weight_bits=8)
    later = halved.own_cost(module.num_params(params))
    if kind != "large":
      assert later.launches == own.launches / 4
      assert later.bytes < own.bytes / 4 < 2 * later.bytes
      assert later.flops == own.flops / 4
  assert shares["scalars"] < shares["head"] < 0.0001 < 0.007 < shares["large"]


def test_costs_of_another_unit_are_stretched_to_the_width_of_net_keep():
  spent = tuple(np.linspace(0.7, 1.0, TABLE.size).tolist())
  shape = config("gain", action_costs=spent)
  np.testing.assert_allclose(shape.spent, spent, rtol=1e-6)
  width = np.ptp(cost.net_keep(TABLE))
  assert np.ptp(shape.costs) == pytest.approx(width, rel=1e-5)
  np.testing.assert_allclose(
    shape.costs / shape.spent, shape.costs[0] / 0.7, rtol=1e-5
  )


def test_1560_actions_take_3_outputs():
  shape = PolicyConfig(
    table=actions.preset("J-FL"), lm_width=32, horizon=16, width=8
  )
  params = jax.eval_shape(lambda: policy.init(shape, jax.random.key(0)))
  assert params["head"]["kernel"].shape == (8, 3)
  assert params["shortcut"]["kernel"].shape == (9, 3)
