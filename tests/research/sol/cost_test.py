import numpy as np

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


def test_shares_are_of_the_dense_step():
  given = setup(actions.preset("J-2L"), prune="intermediate")
  found = cost.shares_of_dense(given, 520.0, 1000)
  sparse, dense = (
    decode_step.flops_per_token(
      given.config,
      share,
      1.0,
      520,
      page_size=8,
      prune="intermediate",
      policy_params=params,
    )
    for share, params in ((0.1, 1000), (1.0, 0))
  )
  assert found.shape == (8, 2)
  assert found[3, 0] == sparse / dense < found[-1, 0]
  assert found[-1, 0] > 1  # the policy is charged


def test_bits_save_nothing():
  table = actions.ActionTable.product("bits", (0.5,), (0.5,), (5, 8, 16))
  values = cost.shares_of_dense(setup(table), 1024)
  assert values.shape == (3, 2) and np.ptp(values, axis=0).max() == 0
