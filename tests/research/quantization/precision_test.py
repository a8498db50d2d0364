"""Searches of precisions: budgets, the exact optimum, and a policy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.errors import InputError
from research.quantization import precision
from research.results import formats as tables
from tests.research.quantization.conftest import random_model

NAMES = "bitmod4", "int3", "int6"


@pytest.fixture(scope="module")
def model():
  return precision.Mixed(*random_model("transformer"), NAMES)


@pytest.fixture(scope="module")
def plan(model):
  return model.plan


def test_decisions_and_their_cost(model, plan, batches):
  config, params = random_model("transformer")
  assert plan.names == ("0.attn", "0.mlp", "1.attn", "1.mlp")
  assert plan.formats == ("int3", "bitmod4", "int6")
  kernels = params["layers"]["mlp"]
  size = sum(one["kernel"][0].size for one in kernels.values())
  assert plan.macs[1] == size
  point = precision.uniform(plan, 4)
  assert plan.cost(point) == plan.budget(4) == plan.macs.sum() * 4 * 16
  # The loss is that of the model, in whatever format.
  found = model.losses((2,) * 4, batches)
  assert found.shape == batches.shape[:2]
  tokens = jnp.asarray(batches[0])
  logits = language_model.forward(config, params, tokens[:, :-1])
  logits -= jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))
  plain = -jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0].mean(1)
  np.testing.assert_allclose(found[0], plain, atol=0.05)
  assert not np.allclose(found, model.losses((2, 2, 2, 0), batches))


def test_points_are_brought_to_a_budget(plan):
  for bits in (3, 3.5, 4, 5, 6):
    budget = plan.budget(bits)
    for point in itertools.product(range(3), repeat=4):
      found = plan.brought(point, budget)
      assert plan.cost(found) <= budget * (1 + 1e-9)
      for at in range(4):
        wider = [*found[:at], found[at] + 1, *found[at + 1 :]]
        assert wider[at] == 3 or plan.cost(wider) > budget
      assert plan.brought(found, budget) == found
  with pytest.raises(InputError, match="needs more throughout"):
    plan.brought((0,) * 4, plan.budget(2))


def test_the_integer_program_is_the_best_of_all(plan):
  rng = np.random.default_rng(0)
  budget = plan.budget(4.2)
  for _ in range(5):
    costs = np.sort(rng.exponential(size=(4, 3)), axis=1)[:, ::-1]
    total = lambda point, costs=costs: costs[range(4), list(point)].sum()
    points = [
      point
      for point in itertools.product(range(3), repeat=4)
      if plan.cost(point) <= budget
    ]
    found = precision.exact(plan, costs, budget)
    assert plan.cost(found) <= budget * (1 + 1e-9)
    assert total(found) == pytest.approx(min(map(total, points)))
    steps = precision.greedy(plan, costs, budget)
    assert plan.cost(steps) <= budget * (1 + 1e-9)
    assert total(steps) >= total(found) - 1e-9
  with pytest.raises(InputError, match="no point is within"):
    precision.exact(plan, costs, plan.budget(2))


def test_searches_find_what_all_points_hold(model, plan, batches):
  """Of 81 points, a policy and a random search at an equal budget."""
  budget = plan.budget(4)
  points = {
    plan.brought(point, budget)
    for point in itertools.product(range(3), repeat=4)
  }
  every = {p: model.losses(p, batches).mean() for p in points}
  best = min(every.values())
  for method in ("random", "reinforce"):
    found = precision.searched(
      model, batches, budget, method, evaluations=60, seed=1
    )
    assert every[found] <= best + 0.3 * (max(every.values()) - best)
  costs = precision.sensitivities(model, batches)
  assert costs.shape == (4, 3) and np.all(costs[:, 2] == 0)
  found = precision.exact(plan, costs, budget)
  row = precision.described(plan, found)
  assert row["bits"] <= 4 + 1e-9 and list(row["formats"]) == list(plan.names)
  common = {"method": "exact", "evaluations": 9, "search_loss": 1.0, **row}
  change = {"metric": "change", "value": 0.1, "low": 0.0, "high": 0.2}
  lines = tables.precision([common | change]).splitlines()
  assert len(lines) == 3 and "+0.1000" in lines[2]


def test_what_is_no_plan_is_one_line(plan):
  for names in (["int4"], ["int4", "razer4"], ["int4", "lloyd4"]):
    with pytest.raises(InputError, match="give two or more of"):
      precision.Mixed(*random_model("transformer"), names)
  with pytest.raises(InputError, match="no format of"):
    precision.uniform(plan, 5)
