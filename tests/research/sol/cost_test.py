import numpy as np
import pytest

from models.transformer_config import TransformerConfig
from research.cost import decode_step
from research.sol import actions, cost
from research.sol.rollout import Setup


def setup(table, **options):
  config = TransformerConfig.smollm2_135m()
  return Setup(config=config, table=table, horizon=16, page_size=8, **options)


def test_net_keep():
  table = actions.preset("J-2L")
  expected = [
    (k + r + b / 16) / 3 for k in (0.1, 1) for r in (0.6, 1) for b in (5, 16)
  ]
  np.testing.assert_allclose(cost.net_keep(table), expected)
  assert cost.net_keep(table)[table.full_index] == 1


def step_costs(table, union=1.0, **options):
  given = setup(table, **options)
  union = dict.fromkeys(table.kappa, union) | {1.0: 1.0}
  return cost.StepCosts(setup=given, context=520.0, page_union=union)


def test_shares_are_of_the_dense_step():
  table = actions.preset("J-2L")
  costs = step_costs(table, union=1.4, prune="intermediate")
  found = costs.actions(table)
  options = {"page_size": 8, "prune": "intermediate"}
  arguments = (costs.setup.config, 0.1, 1.0, 520)
  flops = decode_step.flops_per_token(*arguments, **options)
  moved = decode_step.bytes_per_token(*arguments, page_union=1.4, **options)
  dense = (costs.setup.config, 1.0, 1.0, 520)
  assert found.shape == (8, 2)
  assert found[3, 0] == flops / decode_step.flops_per_token(*dense, page_size=8)
  assert found[3, 1] == moved / decode_step.bytes_per_token(*dense, page_size=8)
  np.testing.assert_array_equal(found[table.full_index], 1.0)
  assert found[3, 1] > step_costs(table).actions(table)[3, 1]


def test_the_policy_is_charged_for_its_parameters():
  costs = step_costs(actions.preset("S-FL"))
  flops, moved = costs.policy(10**6)
  # Of 135M parameters; the cache and the attention are the model's alone.
  assert 1 / 160 < moved < 1 / 135 and 1 / 160 < flops < 1 / 135


def test_a_refresh_costs_what_dense_steps_cost():
  """As an outside reading counted it for SmolLM2 at context 512."""
  costs = step_costs(actions.preset("J-FL"))
  flops, moved = costs.refresh(head=False)
  assert flops == pytest.approx(0.814, abs=0.001)
  assert moved == pytest.approx(0.05, abs=0.002)
  flops, moved = costs.refresh(head=True)
  assert flops == pytest.approx(1.0, abs=0.001)
  assert moved == pytest.approx(0.063, abs=0.001)


def test_bits_save_nothing():
  table = actions.ActionTable.product("bits", (0.5,), (0.5,), (5, 8, 16))
  values = step_costs(table).actions(table)
  assert values.shape == (3, 2) and np.ptp(values, axis=0).max() == 0
