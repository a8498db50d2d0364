"""Rows of made-up scores, whose costs and differences are known."""

import numpy as np
import pytest

from research.core import intervals
from research.cost.controller import controller_cost
from research.sol import result_rows
from research.sol.comparison import Comparison
from research.sol.cost import StepCosts
from research.sol.result_rows import at_equal_cost
from research.sol.scoring import Score
from tests.research.sol import toy

ASKED = [0.5, 0.7]
OWN = controller_cost(300, products=2)
COSTS = StepCosts(
  setup=toy.setup(), context=28.0, page_union={0.3: 1.5, 1.0: 1.0}
)


def score(nll, keep, share):
  """Four windows of two episodes; `share` of the FLOPs and bytes."""
  noise = np.random.default_rng(0).normal(size=(4, 2))
  tokens = np.full((4, 2), 8.0)
  spent = np.broadcast_to([keep] * 3 + [share] * 2, (4, 2, 5))
  return Score(nll=8.0 * nll + noise, spent=8.0 * spent, tokens=tokens)


def comparison(**changes):
  given = {
    "dense": score(2.0, 1.0, 1.0),
    "policies": {
      "SOL policy": [score(3.0, 0.5, 0.5), score(2.5, 0.7, 0.7)],
      "SOL policy, seed 1": [score(3.1, 0.5, 0.5), score(2.6, 0.7, 0.7)],
    },
    "baselines": {
      "fixed": [score(3.4, 0.5, 0.5), score(2.8, 0.7, 0.7)],
      "surprise": [score(3.3, 0.5, 0.5), score(2.7, 0.7, 0.7)],
    },
    "oracles": {},
    "static": {"half": score(2.2, 0.8, 0.8)},
    "trials": [np.linspace(3, 4, 500)],
    "costs": COSTS,
    "own": {"SOL policy": OWN, "SOL policy, seed 1": OWN},
  }
  return Comparison(**(given | changes))


def rows_of(found):
  made = result_rows.rows(
    found,
    asked=ASKED,
    reads_logits=True,
    common={"model": "toy", "refresh_every": toy.HORIZON, "seeds": [0]},
  )
  return made


@pytest.fixture(scope="module")
def rows():
  return rows_of(comparison())


def pick(rows, method, place=0):
  return [row for row in rows if row["method"] == method][place]


def test_a_policy_is_charged_for_its_network_and_all_for_the_refresh(rows):
  own = COSTS.controller(OWN)
  ours, fixed = pick(rows, "SOL policy"), pick(rows, "fixed")
  assert ours["flops"] == pytest.approx(0.5 + own[0]) and own[0] > 0
  assert ours["bytes"] == pytest.approx(0.5 + own[1])
  assert (fixed["flops"], fixed["bytes"]) == (0.5, 0.5)
  for method, head in (
    ("SOL policy", True),
    ("surprise", True),
    ("fixed", False),
    ("half", False),
  ):
    row, refresh = pick(rows, method), COSTS.refresh(head=head)
    for measure, share in zip(("flops", "bytes"), refresh, strict=True):
      assert row[f"{measure}_with_refresh"] == pytest.approx(
        row[measure] + share
      )
  dense = pick(rows, "dense")
  assert dense["flops"] == dense["flops_with_refresh"] == 1
  assert ours["context"] == 28 and ours["page_union"] == {"0.3": 1.5, "1": 1.0}


def test_differences_at_equal_cost_include_the_network(rows):
  own = COSTS.controller(OWN)[0]
  fixed = pick(rows, "fixed")
  assert fixed["policy_minus_method"] == pytest.approx(3.0 - 3.4)
  # From .5 to .7 the fixed budget's nll falls by .6.
  expected = 3.0 - (3.4 - own / 0.2 * 0.6)
  assert fixed["policy_minus_method_at_flops"][0] == pytest.approx(expected)
  # The dearest policy costs more than the dearest fixed budget: then the
  # dense model is played in turns.
  expected = 2.5 - (2.8 - own / 0.3 * 0.8)
  found = pick(rows, "fixed", 1)["policy_minus_method_at_flops"]
  assert (
    found[0] == pytest.approx(expected) and found[1] <= found[0] <= found[2]
  )
  # With the refresh both cost more than the dense model.
  found = fixed["policy_minus_method_at_flops_with_refresh"]
  assert found[0] == pytest.approx(3.0 - 2.0)


def test_a_curve_is_read_between_its_points():
  cheap, dear, dense = (score(n, n, n) for n in (3.0, 2.0, 1.0))
  curve = [(0.6, dear), (0.2, cheap), (1.3, cheap)]
  for want, nll in ((0.2, 3.0), (0.3, 2.75), (0.6, 2.0), (0.8, 1.5)):
    assert at_equal_cost(want, curve, dense).mean_nll == pytest.approx(
      at_equal_cost(want, curve[:2], dense).mean_nll
    )
    found = at_equal_cost(want, curve, dense)
    assert found.mean_nll - dense.mean_nll == pytest.approx(nll - 1)
  # A little below the cheapest point the line goes on.
  found = at_equal_cost(0.195, curve, dense)
  assert found.mean_nll - dense.mean_nll == pytest.approx(2 + 0.005 / 0.4)
  assert at_equal_cost(0.1, curve, dense) is None
  assert at_equal_cost(1.7, curve, dense) is dense


def test_intervals_can_be_computed_anew_from_a_row(rows):
  dense, ours, fixed = (
    pick(rows, name) for name in ("dense", "SOL policy", "fixed")
  )
  tokens = dense["window_tokens"]
  delta = (ours["window_nll"] - fixed["window_nll"]) / tokens
  mean, low, high = intervals.paired_mean(delta, tokens)
  assert fixed["policy_minus_method"] == pytest.approx(mean, abs=1e-5)
  assert fixed["policy_minus_method_low"] == pytest.approx(low, abs=1e-5)
  assert fixed["policy_minus_method_high"] == pytest.approx(high, abs=1e-5)
  assert ours["window_nll"].sum() / tokens.sum() == pytest.approx(ours["nll"])


def test_seeds_are_compared_each_at_its_own_net_keep(rows):
  (low, high) = [row for row in rows if row["role"] == "seeds"]
  assert low["method"] == "SOL policy minus fixed" and low["seeds"] == [0, 1]
  np.testing.assert_allclose(low["each"], [3.0 - 3.4, 3.1 - 3.4])
  np.testing.assert_allclose(high["each"], [2.5 - 2.8, 2.6 - 2.8])
  assert low["value"] == pytest.approx(-0.35)
  other = pick(rows, "SOL policy, seed 1")
  assert other["policy_minus_method_at_net_keep"][0] == pytest.approx(-0.1)


def test_seeds_that_spend_too_little_for_a_baseline_are_left_out():
  policies = comparison().policies
  policies["SOL policy, seed 1"] = [score(3.1, 0.4, 0.4), score(2.6, 0.7, 0.7)]
  rows = rows_of(comparison(policies=policies))
  (row,) = [row for row in rows if row["role"] == "seeds"]
  assert row["asked"] == 0.7


def test_without_a_refresh_none_is_charged(rows):
  again = comparison(oracles={}, static={}, trials=[])
  found = rows_of(comparison(without_refresh=again))
  assert [row["method"] for row in found[: len(rows)]] == [
    row["method"] for row in rows
  ]
  unbroken = found[len(rows) :]
  assert {row["refresh_every"] for row in unbroken} == {None}
  assert pick(unbroken, "SOL policy")["flops_with_refresh"] is None
  fixed = pick(unbroken, "fixed")
  assert fixed["policy_minus_method_at_flops"][0] < 0
  assert "policy_minus_method_at_flops_with_refresh" not in fixed
