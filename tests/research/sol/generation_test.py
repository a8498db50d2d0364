import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.convert import Checkpoint
from models.errors import InputError
from research.sol import actions, artefact, generation, paged, policy, rollout
from research.sol.options import Options
from research.sol.policy import InputStats
from tests.research.sol import toy

STEPS = 10


@pytest.fixture(scope="module")
def checkpoint():
  return Checkpoint(config=toy.CONFIG, params=toy.lm(), name="toy", path=None)


def policy_of(preset):
  options = Options(
    preset=preset,
    page_size=toy.PAGE,
    context=toy.CONTEXT,
    horizon=toy.HORIZON,
    policy="head",
    budget_unit="flops",
    refresh="none",
    shared_pages=True,
  ).filled("frugal")
  table = actions.preset(preset)
  costs = np.linspace(0.7, 1, table.size).astype(np.float32)
  shape = options.method(toy.CONFIG, None, costs.tolist()).policy
  params = policy.init(shape, jax.random.key(0))
  params["linear"]["kernel"] = params["linear"]["kernel"] + 0.3
  damage = 0.2 * toy.damage(table)
  return artefact.Artefact(
    options=options,
    mode="frugal",
    model="toy",
    params=params,
    stats=InputStats.identity(toy.CONFIG.d_model, damage),
    prices=np.geomspace(0.1, 30, 5).astype(np.float32),
    spent=np.linspace(1.0, 0.75, 5).astype(np.float32),
    scalar_stats=np.ones((2, 9), np.float32),
    coefficients=np.zeros((10, 3), np.float32),
    action_costs=costs,
  )


@pytest.fixture(scope="module")
def trained():
  return policy_of("J-2L")


def continued(trained, checkpoint, length=19, **changes):
  given = {"budget": 0.85, "max_tokens": STEPS} | changes
  budget = given.pop("budget")
  prompt = toy.text(length, seed=4)
  return generation.continue_text(trained, checkpoint, prompt, budget, **given)


@pytest.fixture(scope="module")
def found(trained, checkpoint):
  return continued(trained, checkpoint)


def test_drawn_tokens_are_the_likeliest_under_their_actions(
  trained, checkpoint, found
):
  """As a block scores them whose schedule is fixed in advance."""
  prompt, last = toy.text(19, seed=4), 7
  method = trained.options.method(toy.CONFIG, None)
  # 16 tokens fill pages; two more are read densely.
  tokens = np.concatenate([prompt, found.tokens[:last]])
  full = method.setup.table.full_index
  schedule = np.concatenate([[full] * 2, found.actions[:last]])
  setup = dataclasses.replace(method.setup, horizon=len(schedule))
  rivals = np.arange(5, dtype=np.int32) * 7
  ends = np.concatenate([found.tokens[last - 1 : last], rivals])
  rows = np.tile(tokens, (len(ends), 1)).astype(np.int32)
  rows[:, -1] = ends
  prefix = setup.build_prefix(checkpoint.params, jnp.asarray(rows[:, :17]), 16)
  scored = rollout.score_block(
    setup,
    checkpoint.params,
    prefix,
    jnp.asarray(rows),
    jnp.full((len(ends), 1), 16, jnp.int32),
    jnp.asarray(np.tile(schedule, (len(ends), 1, 1)), jnp.int32),
  )
  log_p = np.asarray(scored.log_p)[:, 0, -1]
  assert log_p[0] >= log_p.max() - 1e-4 and np.ptp(log_p) > 0.01


def test_pages_that_are_left_out_are_not_read(checkpoint, monkeypatch):
  """The text is that of a model that computes and masks them."""
  policy = policy_of("K10")
  told = {"length": 43, "budget": 0.8, "dense_below": 48}
  found = continued(policy, checkpoint, **told)
  assert found.skipped
  assert str(found).endswith("what was left out was not read")
  # Contexts of 43 to 48 tokens are read whole, those behind them are not.
  full = policy.options.method(toy.CONFIG, None).setup.table.full_index
  assert (found.actions[:6] == full).all()
  assert (found.actions[6:] != full).any() and found.spent[0] < 1
  monkeypatch.setattr(paged, "reads_pages", lambda setup: False)
  masked = continued(policy, checkpoint, **told)
  assert not masked.skipped
  np.testing.assert_array_equal(found.tokens, masked.tokens)
  np.testing.assert_array_equal(found.actions, masked.actions)


def test_what_was_spent_has_the_policys_own_cost(trained, found):
  assert found.tokens.shape == found.actions.shape == (STEPS,)
  alone = trained.action_costs[found.actions].mean()
  assert alone < found.cost < alone + 0.2
  assert "in flops a token" in str(found)
  assert len(np.unique(found.actions)) > 1


def test_what_does_not_fit_is_told(trained, checkpoint):
  for changes, says in (
    ({"budget": 0.5}, "the policy spends 0.750 to 1.000"),
    ({"length": 4}, "give over 4"),
    ({"max_tokens": 1000}, "longer than the model reads"),
  ):
    with pytest.raises(InputError, match=says):
      continued(trained, checkpoint, **changes)
  with pytest.raises(InputError, match="trained on toy, not on other"):
    other = dataclasses.replace(checkpoint, name="other")
    continued(trained, other)
