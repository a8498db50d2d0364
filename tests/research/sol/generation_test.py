import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.convert import Checkpoint
from models.errors import InputError
from research.sol import artefact, generation, policy, rollout
from research.sol.options import Options
from research.sol.policy import InputStats
from tests.research.sol import toy

STEPS = 10


@pytest.fixture(scope="module")
def checkpoint():
  return Checkpoint(config=toy.CONFIG, params=toy.lm(), name="toy", path=None)


@pytest.fixture(scope="module")
def trained():
  options = Options(
    preset="J-2L",
    page_size=toy.PAGE,
    context=toy.CONTEXT,
    horizon=toy.HORIZON,
    policy="head",
    budget_unit="flops",
    refresh="none",
  ).filled("frugal")
  costs = np.linspace(0.7, 1, 8).astype(np.float32)
  shape = options.method(toy.CONFIG, None, costs.tolist()).policy
  params = policy.init(shape, jax.random.key(0))
  params["linear"]["kernel"] = params["linear"]["kernel"] + 0.3
  damage = 0.2 * toy.damage(shape.table)
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
  actions = np.concatenate([[full] * 2, found.actions[:last]])
  setup = dataclasses.replace(method.setup, horizon=len(actions))
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
    jnp.asarray(np.tile(actions, (len(ends), 1, 1)), jnp.int32),
  )
  log_p = np.asarray(scored.log_p)[:, 0, -1]
  assert log_p[0] >= log_p.max() - 1e-4 and np.ptp(log_p) > 0.01


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
