import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.sol import grpo, reward
from research.sol.grpo import Objective

GOLDEN = json.loads(
  pathlib.Path(__file__).with_name("golden_grpo.json").read_text()
)
INPUTS = {name: np.asarray(x) for name, x in GOLDEN["inputs"].items()}
EXPECTED = GOLDEN["expected"]
# As in the generator.
LOSS = {
  "clip_low": 0.2,
  "clip_high": 0.28,
  "entropy_coef": 0.05,
  "kl_coef": 0.04,
}


def float32(name):
  return jnp.asarray(INPUTS[name], jnp.float32)


def golden_loss(logits=None, dtype=jnp.float32, rows=slice(None), **options):
  logits = INPUTS["logits"] if logits is None else logits
  chosen = np.asarray(EXPECTED["advantages"]["process center whiten"])
  return grpo.policy_loss(
    jnp.asarray(logits, dtype)[rows],
    jnp.asarray(INPUTS["actions"])[rows],
    jnp.asarray(INPUTS["old_logp"], dtype)[rows],
    jnp.asarray(chosen, dtype)[rows],
    Objective(**(LOSS | options)),
    ref_logp=jnp.asarray(INPUTS["ref_logp"], dtype)[rows],
    mask=jnp.asarray(INPUTS["mask"])[rows],
  )


def sum_and_diagnostics(*args, **options):
  loss, diagnostics = grpo.policy_loss(*args, **options)
  return loss.sum, diagnostics


def test_returns_and_penalty_match_golden():
  returns = reward.returns_to_go(float32("rewards"), 0.85, INPUTS["mask"])
  np.testing.assert_allclose(returns, EXPECTED["returns"], rtol=1e-6)
  mask = np.asarray(INPUTS["mask"], np.float32)[..., None]
  spent = np.sum(float32("spent") * mask, axis=2)
  means = spent / np.maximum(np.sum(mask, axis=2), 1)
  gap = means - float32("targets")[:, None]
  penalty = reward.dead_zone_penalty(gap)
  np.testing.assert_allclose(penalty, EXPECTED["penalty"], rtol=1e-5)


@pytest.mark.parametrize("level", ["process", "outcome"])
@pytest.mark.parametrize("normalise", ["center", "zscore", "leave_one_out"])
@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_match_golden(level, normalise, whiten):
  with jax.enable_x64(True):
    found = jax.jit(
      lambda x: grpo.advantages(
        x,
        level=level,
        normalise=normalise,
        whiten=whiten,
        mask=jnp.asarray(INPUTS["mask"]),
      )
    )(jnp.asarray(EXPECTED["score"]))
  name = f"{level} {normalise}" + (" whiten" if whiten else "")
  np.testing.assert_allclose(
    found, EXPECTED["advantages"][name], rtol=1e-12, atol=1e-12
  )


def test_gdpo_matches_golden():
  found = grpo.gdpo_advantages(
    float32("streams"),
    float32("stream_weights"),
    mask=jnp.asarray(INPUTS["mask"]),
  )
  np.testing.assert_allclose(found, EXPECTED["gdpo"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dual", [False, True])
def test_loss_and_diagnostics_match_golden(dual):
  expected = GOLDEN["losses"]["dual" if dual else "plain"]
  with jax.enable_x64(True):
    loss, found = jax.jit(
      lambda x: golden_loss(x, x.dtype, dual_clip=3.0 if dual else None)
    )(jnp.asarray(INPUTS["logits"]))
    np.testing.assert_allclose(loss.sum, expected["sum"], rtol=1e-12)
    assert loss.denominator == expected["denominator"]
    assert found.keys() == expected["diagnostics"].keys()
    for name, value in expected["diagnostics"].items():
      np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


def test_float32_is_close_to_golden():
  loss, _ = golden_loss(dual_clip=3.0)
  expected = GOLDEN["losses"]["dual"]
  np.testing.assert_allclose(loss.sum, expected["sum"], rtol=2e-6)


def test_golden_reaches_every_branch():
  plain, dual = GOLDEN["losses"]["plain"], GOLDEN["losses"]["dual"]
  assert 0 < plain["diagnostics"]["clip_share"] < 1
  assert plain["diagnostics"]["ratio_max"] == pytest.approx(np.exp(20))
  assert plain["sum"] > 1e8 and abs(dual["sum"]) < 100


def test_gradient_against_finite_differences():
  with jax.enable_x64(True):
    logits = jnp.asarray(INPUTS["logits"])
    value = jax.jit(
      lambda x: golden_loss(x, jnp.float64, dual_clip=3.0)[0].mean()
    )
    gradient = jax.grad(value)(logits)
    rng = np.random.default_rng(0)
    for _ in range(5):
      direction = rng.normal(size=logits.shape)
      ends = [value(logits + s * 1e-6 * direction) for s in (1, -1)]
      quotient = (ends[0] - ends[1]) / 2e-6
      np.testing.assert_allclose(
        jnp.vdot(gradient, jnp.asarray(direction)), quotient, rtol=1e-7
      )


def test_accumulation_over_batches_is_exact():
  whole, _ = golden_loss(dual_clip=3.0)
  parts = [golden_loss(rows=slice(b, b + 1), dual_clip=3.0)[0] for b in (0, 1)]
  total = jax.tree.map(lambda *x: sum(x), *parts)
  assert parts[0].denominator != parts[1].denominator
  np.testing.assert_allclose(total.mean(), whole.mean(), rtol=1e-6)


def test_on_policy_gradient_is_reinforce():
  logits = float32("logits")
  actions = jnp.asarray(INPUTS["actions"])

  def picked(x):
    log_probs = jax.nn.log_softmax(x)
    return jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]

  advantage = float32("rewards")
  found = jax.grad(
    lambda x: grpo.policy_loss(
      x, actions, picked(logits), advantage, Objective(entropy_coef=0.0)
    )[0].mean()
  )(logits)
  expected = jax.grad(lambda x: -jnp.mean(picked(x) * advantage))(logits)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_clipped_steps_have_no_gradient():
  logits = float32("logits")
  actions = jnp.asarray(INPUTS["actions"])
  logp = jnp.take_along_axis(
    jax.nn.log_softmax(logits), actions[..., None], axis=-1
  )[..., 0]
  for shift, sign in ((-0.5, 1.0), (0.5, -1.0)):
    gradient, diagnostics = jax.grad(
      lambda x, old, a: sum_and_diagnostics(
        x, actions, old, a, Objective(entropy_coef=0.0)
      ),
      has_aux=True,
    )(logits, logp + shift, jnp.full(actions.shape, sign))
    np.testing.assert_array_equal(gradient, 0.0)
    assert diagnostics["clip_share"] == 1.0


def test_masked_and_forbidden_numbers_do_no_harm():
  logits = float32("logits").at[..., 0].set(-jnp.inf)
  actions = jnp.maximum(jnp.asarray(INPUTS["actions"]), 1).at[0, 0, 0].set(0)
  mask = jnp.ones(actions.shape, bool).at[0, 0, 0].set(False)
  old_logp = float32("old_logp").at[0, 0, 0].set(-jnp.inf)
  advantage = float32("rewards").at[0, 0, 0].set(jnp.nan)
  (total, diagnostics), gradient = jax.value_and_grad(
    lambda x: sum_and_diagnostics(
      x,
      actions,
      old_logp,
      advantage,
      Objective(kl_coef=0.1),
      mask=mask,
      ref_logp=old_logp,
    ),
    has_aux=True,
  )(logits)
  assert jnp.isfinite(total)
  assert jnp.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[0, 0, 0], 0.0)
  assert all(jnp.isfinite(x) for x in diagnostics.values())


def test_everything_masked_is_zero():
  loss, diagnostics = grpo.policy_loss(
    float32("logits"),
    jnp.asarray(INPUTS["actions"]),
    float32("old_logp"),
    float32("rewards"),
    Objective(),
    mask=jnp.zeros((2, 4, 3), bool),
  )
  assert loss.sum == 0 and loss.denominator == 0 and loss.mean() == 0
  assert diagnostics["advantage_nonzero"] == 0
  advantage = grpo.advantages(float32("rewards"), mask=jnp.zeros((2, 4, 3)))
  np.testing.assert_array_equal(advantage, 0.0)


def test_equal_returns_give_no_advantage():
  returns = jnp.full((3, 16, 4), -2.7)
  for normalise in ("center", "zscore", "leave_one_out"):
    found = grpo.advantages(returns, normalise=normalise, whiten=False)
    np.testing.assert_array_equal(found, 0.0)


def test_advantages_carry_no_gradient():
  gradient = jax.grad(lambda x: jnp.sum(jnp.square(grpo.advantages(x))))(
    float32("rewards")
  )
  np.testing.assert_array_equal(gradient, 0.0)


def test_unknown_switches_are_named():
  with pytest.raises(ValueError, match="level='token'"):
    grpo.advantages(float32("rewards"), level="token")
  with pytest.raises(ValueError, match="normalise='rank'"):
    grpo.advantages(float32("rewards"), normalise="rank")
  with pytest.raises(ValueError, match="dual_clip"):
    golden_loss(dual_clip=0.5)
  with pytest.raises(ValueError, match="needs ref_logp"):
    grpo.policy_loss(
      float32("logits"),
      jnp.asarray(INPUTS["actions"]),
      float32("old_logp"),
      float32("rewards"),
      Objective(kl_coef=0.1),
    )


def test_a_group_is_dead_where_nothing_differs():
  returns = jnp.zeros((3, 2, 4)).at[:, 0].add(1.0)
  returns = returns.at[0, :, 1].set(5.0)
  actions = jnp.zeros((3, 2, 4), jnp.int32).at[:, 1].set(1)
  actions = actions.at[1, :, 2].set(3)
  live = np.asarray(grpo.live_groups(returns, actions))
  dead = np.zeros((3, 2, 4), bool)
  dead[0, :, 1] = True  # equal rewards
  dead[1, :, 2] = True  # the same action
  np.testing.assert_array_equal(live, ~dead)
  assert grpo.live_groups(returns, actions, drop=False).all()
  # Of an episode's return a group is dead or alive as a whole.
  actions = actions.at[2].set(0)
  whole = np.asarray(grpo.live_groups(returns, actions, level="outcome"))
  np.testing.assert_array_equal(whole[:, 0, 0], [True, True, False])


def test_dead_groups_are_in_no_denominator():
  """The loss and the whitening are those of the live groups alone."""
  generator = np.random.default_rng(0)
  returns = jnp.asarray(generator.normal(size=(4, 3, 2)), jnp.float32)
  actions = jnp.asarray(np.tile(np.arange(3)[None, :, None], (4, 1, 2)))
  actions = actions.at[2:].set(0)
  logits = jnp.asarray(generator.normal(size=(4, 3, 2, 5)), jnp.float32)
  old = jax.nn.log_softmax(logits)
  old = jnp.take_along_axis(old, actions[..., None], -1)[..., 0]
  goal = grpo.Objective(entropy_coef=0.1)

  def loss_of(rows, mask):
    own = grpo.advantages(returns[:rows], mask=mask)
    loss, _ = grpo.policy_loss(
      logits[:rows] * 1.1, actions[:rows], old[:rows], own, goal, mask=mask
    )
    return float(loss.mean()), float(loss.denominator)

  live = grpo.live_groups(returns, actions)
  assert live.sum() == 2 * 3 * 2
  found, alone = loss_of(4, live), loss_of(2, None)
  assert found[1] == alone[1] == 12
  assert found[0] == pytest.approx(alone[0], rel=1e-5)
  assert found[0] != pytest.approx(loss_of(4, None)[0], rel=1e-3)
  # With nothing alive there is nothing to learn, and no division by zero.
  assert loss_of(4, jnp.zeros((4, 3, 2), bool)) == (0.0, 0.0)


def test_the_episodes_that_vary_the_most_are_taken():
  scale = jnp.asarray([1.0, 4.0, 2.0, 3.0])[:, None, None]
  noise = np.random.default_rng(1).normal(size=(1, 3, 2))
  returns = scale * jnp.asarray(noise, jnp.float32)
  actions = jnp.asarray(np.tile(np.arange(3)[None, :, None], (4, 1, 2)))
  for share, expected in ((0.5, [0, 1, 0, 1]), (0.1, [0, 1, 0, 0])):
    live = grpo.live_groups(returns, actions, share=share)
    np.testing.assert_array_equal(live[:, 0, 0], np.array(expected, bool))
  assert grpo.live_groups(returns, actions, share=1.0).all()
