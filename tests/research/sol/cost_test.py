import dataclasses
import json

import numpy as np
import pytest

from models.errors import InputError
from models.transformer_config import TransformerConfig
from research.cost import decode_step
from research.cost.controller import controller_cost
from research.sol import actions, cost, profile
from research.sol.rollout import Setup
from tests.research.sol import toy


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
  found = controller_cost(10**6, products=1)
  flops, moved = costs.controller(found)
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


def test_a_budget_holds_the_policy_and_the_refresh():
  costs = step_costs(actions.preset("KR-FL"))
  found = controller_cost(1000, products=2, table=130, every=4)
  assert found.launches == 1
  assert found.flops == 2 * (1000 + 3 * 130) / 4
  assert found.bytes == 2 * (1000 + 4 * 130) / 4
  own = costs.controller(found)
  for at, unit in enumerate(("flops", "bytes")):
    alone = costs.overhead(unit, found, refreshed=False, head=True)
    assert alone == pytest.approx(own[at])
    with_replay = costs.overhead(unit, found, refreshed=True, head=True)
    replay = costs.refresh(head=True)[at]
    assert with_replay - alone == pytest.approx(replay)
  cached = controller_cost(1000, products=2, cached=64)
  assert cached.flops == 2 * 1064 and cached.bytes == 2 * 1064
  assert cached.launches == 4
  assert controller_cost(1000, products=2, bits=8).bytes == 1000


def test_measured_times_are_shares_of_the_dense_step(tmp_path):
  path = tmp_path / "times.json"
  levels = [
    {"op": "level", "axis": axis, "level": level, "ms": ms}
    for axis, level, ms in (
      ("kappa", 0.3, 8.0),
      ("kappa", 1.0, 10.0),
      ("rho", 0.5, 6.0),
      ("rho", 1.0, 10.0),
      ("bits", 16.0, 10.0),
    )
  ]
  dense = {
    "op": "dense",
    "device": "some",
    "ms": 10.0,
    "launch_ms": 0.1,
    "replay_ms": 32.0,
    "replayed": 16,
  }
  path.write_text(json.dumps({"rows": [dense, *levels]}))
  table = actions.ActionTable.product("some", (0.3, 1.0), (0.5, 1.0), (16,))
  costs = dataclasses.replace(step_costs(table), profile=profile.read(path))
  np.testing.assert_allclose(costs.of_unit(table, "ms"), [0.4, 0.8, 0.6, 1.0])
  found = controller_cost(1000, products=2)
  own = costs.overhead("ms", found, refreshed=False, head=True)
  assert own == pytest.approx(3 * 0.1 / 10 + costs.controller(found)[1])
  replayed = costs.overhead("ms", found, refreshed=True, head=True)
  assert replayed - own == pytest.approx(32 / 16 / 10)
  other = actions.ActionTable.product("more", (0.7,), (0.5,), (16,))
  with pytest.raises(InputError, match="no kappa=0.7"):
    costs.profile.shares(other)
  path.write_text("{}")
  with pytest.raises(InputError, match="is no profile"):
    profile.read(path)
  with pytest.raises(InputError, match="is missing"):
    profile.read(tmp_path / "none.json")


def test_what_is_measured_here_can_be_read(tmp_path):
  rows = profile.measure(
    toy.setup(), toy.lm(), context=toy.CONTEXT, windows=1, repeats=1
  )
  path = tmp_path / "times.json"
  path.write_text(json.dumps({"rows": rows}))
  found = profile.read(path)
  assert found.replayed == toy.HORIZON and found.device == rows[0]["device"]
  assert min(found.dense, found.launch, found.replay) > 0
  shares = found.shares(toy.TABLE)
  assert shares[toy.TABLE.full_index] == 1 and (shares >= 0).all()


def test_bits_save_nothing():
  table = actions.ActionTable.product("bits", (0.5,), (0.5,), (5, 8, 16))
  values = step_costs(table).actions(table)
  assert values.shape == (3, 2) and np.ptp(values, axis=0).max() == 0
