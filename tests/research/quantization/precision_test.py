"""Searches of precisions: budgets, the exact optimum, and a policy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.errors import InputError
from research.quantization import apply, precision, structure
from research.quantization.recipes import Recipe
from research.results import formats as tables
from tests.research.quantization.conftest import CONFIGS, random_model

NAMES = "bitmod4", "int3", "int6"


@pytest.fixture(scope="module")
def model():
  return precision.Mixed(*random_model("transformer"), NAMES)


@pytest.fixture(scope="module")
def plan(model):
  return model.plan


@pytest.fixture(scope="module")
def even():
  """Ten decisions, as the shipped model has; formats of about equal steps."""
  return precision.Plan(
    names=tuple(map(str, range(10))),
    formats=("bitmod3", "bitmod4", "int6", "int8"),
    bits=np.asarray([[3.3, 4.3, 6.5, 8.5], [3.2, 4.2, 6.3, 8.3]] * 5),
    macs=np.asarray([16384.0, 28672.0] * 5),
    input_bits=16,
  )


def test_decisions_and_their_cost(model, plan, batches):
  config, params = random_model("transformer")
  assert plan.names == ("0.attn", "0.mlp", "1.attn", "1.mlp")
  assert plan.formats == ("int3", "bitmod4", "int6")
  kernels = params["layers"]["mlp"]
  size = sum(one["kernel"][0].size for one in kernels.values())
  assert plan.macs[1] == size
  # Bits are all that is kept of the kernels of a layer.
  for place, name in enumerate(plan.formats):
    kept = quantized(name)["layers"]["mlp"].values()
    nbytes = sum(one["kernel"].nbytes for one in kept) / config.num_layers
    assert plan.bits[1, place] == pytest.approx(8 * nbytes / size)
  assert np.all(plan.bits > [3, 4, 6])
  point = precision.uniform(plan, "bitmod4")
  assert plan.cost(point) == pytest.approx(plan.macs @ plan.bits[:, 1] * 16)
  # The loss is that of the model, in whatever format.
  found = model.losses((2,) * 4, batches)
  assert found.shape == batches.shape[:2]
  np.testing.assert_allclose(found[0], plain(params, batches[0]), atol=0.05)


def test_a_mix_is_the_model_that_is_put_together_by_leaves(
  model, plan, batches
):
  genome = 2, 0, 1, 2
  rounded = [
    jax.tree.map(np.asarray, jax.jit(apply.as_arrays)(quantized(name)))
    for name in plan.formats
  ]
  mixed = random_model("transformer")[1]
  for part, own in (("attn", genome[::2]), ("mlp", genome[1::2])):
    mixed = structure.put(
      mixed,
      ("layers", part),
      jax.tree.map(
        lambda *leaves, own=own: np.stack(
          [leaves[place][number] for number, place in enumerate(own)]
        ),
        *(one["layers"][part] for one in rounded),
      ),
    )
  found = model.losses(genome, batches)
  for one, batch in zip(found, batches):
    np.testing.assert_allclose(one, plain(mixed, batch), rtol=1e-5)
  # Another decision is another model by far more than that.
  other = model.losses((2, 0, 1, 1), batches)
  assert np.abs(other - found).max() > 1e-3


@functools.cache
def quantized(name):
  """The model with kernels in a format."""
  recipe = Recipe(method="nearest", text=name, kernels=name)
  return apply.quantize(*random_model("transformer"), recipe, None)[1]


@jax.jit
def plain(params, batch):
  """Nats a token of each row (B,) of a batch (B, T)."""
  config = CONFIGS["transformer"]
  logits = language_model.forward(config, params, batch[:, :-1])
  logits -= jax.nn.logsumexp(logits, -1, keepdims=True)
  return -jnp.take_along_axis(logits, batch[:, 1:, None], -1)[..., 0].mean(1)


def test_points_are_brought_to_a_budget(plan):
  low, high = plan.cost((0,) * 4), plan.cost((2,) * 4)
  for share in (0, 0.2, 0.4, 0.7, 1):
    budget = low + share * (high - low)
    for point in itertools.product(range(3), repeat=4):
      found = plan.brought(point, budget)
      assert plan.cost(found) <= budget * (1 + 1e-9)
      for at in range(4):
        wider = [*found[:at], found[at] + 1, *found[at + 1 :]]
        assert wider[at] == 3 or plan.cost(wider) > budget
      assert plan.brought(found, budget) == found
  with pytest.raises(InputError, match="need more throughout"):
    plan.brought((0,) * 4, low / 2)


def test_points_stay_spread_where_they_are_brought(even):
  """Of random genomes few become uniform, and most become points apart."""
  rng = np.random.default_rng(0)
  uniform = precision.uniform(even, "bitmod4")
  budget = even.cost(uniform)
  found = [
    even.brought(tuple(map(int, point)), budget)
    for point in rng.integers(4, size=(500, 10))
  ]
  assert max(map(even.cost, found)) <= budget * (1 + 1e-9)
  assert found.count(uniform) <= 5
  assert len(set(found)) >= 400
  # Each format stays in use, in 2% of the decisions or more.
  assert np.bincount(np.ravel(found), minlength=4).min() >= 100


def test_formats_may_be_equal(even):
  """Two formats of 4 bits, beside one of 8."""
  bits = np.repeat([[4.25, 4.25, 8.5]], 10, axis=0)
  plan = dataclasses.replace(
    even, formats=("nf4", "sf4", "int8"), bits=bits, macs=np.arange(1.0, 11)
  )
  rng = np.random.default_rng(0)
  costs = rng.normal(size=(10, 3)) * [1, 1, 0]
  narrow = plan.cost((0,) * 10)
  # Equal formats are told apart by what they cost alone, and both are found.
  best = tuple(map(int, costs[:, :2].argmin(1)))
  assert precision.exact(plan, costs, narrow) == best
  assert precision.greedy(plan, costs, narrow) == best
  found = [plan.brought((2,) * 10, narrow), plan.brought((0,) * 10, narrow)]
  assert set(found[0]) == {0, 1} and set(found[1]) == {0}
  # With room the steps take what single decisions gain, as the optimum does.
  steps = precision.greedy(plan, costs, 1.5 * narrow)
  total = lambda point: costs[range(10), list(point)].sum()
  optimum = total(precision.exact(plan, costs, 1.5 * narrow))
  assert plan.cost(steps) <= 1.5 * narrow * (1 + 1e-9)
  assert optimum - 1e-9 <= total(steps) <= 0.8 * optimum


def test_the_integer_program_is_the_best_of_all(plan):
  rng = np.random.default_rng(0)
  budget = 1.05 * plan.cost(precision.uniform(plan, "bitmod4"))
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
    precision.exact(plan, costs, budget / 2)
  with pytest.raises(InputError, match="need more throughout"):
    precision.greedy(plan, costs, budget / 2)


def test_searches_find_what_all_points_hold(model, plan, batches):
  """Of 81 points, a policy and a random search at an equal budget."""
  budget = plan.cost(precision.uniform(plan, "bitmod4"))
  points = {
    plan.brought(point, budget)
    for point in itertools.product(range(3), repeat=4)
  }
  every = {p: model.losses(p, batches).mean() for p in points}
  best = min(every.values())
  for method in ("random", "reinforce"):
    found, count = precision.searched(
      model, batches, budget, method, evaluations=60, seed=1
    )
    # Losses are those of points, fewer than the genomes that led to them.
    assert 1 < count <= min(len(points), 60)
    assert every[found] <= best + 0.3 * (max(every.values()) - best)
  costs = precision.sensitivities(model, batches)
  assert costs.shape == (4, 3) and np.all(costs[:, 2] == 0)
  found = precision.exact(plan, costs, budget)
  row = precision.described(plan, found)
  assert row["bits"] <= budget / plan.macs.sum() / 16 + 1e-9
  assert list(row["formats"]) == list(plan.names)
  common = {"method": "exact", "evaluations": 9, "search_loss": 1.0, **row}
  change = {"metric": "change", "value": 0.1, "low": 0.0, "high": 0.2}
  lines = tables.precision([common | change]).splitlines()
  assert len(lines) == 3 and "+0.1000 [+0.0000, +0.2000]" in lines[2]


def test_the_interval_of_seeds_is_students():
  """Of 3 seeds: 4.303 standard deviations / sqrt(3), whatever windows say."""
  rows = [
    {
      "method": "random",
      "metric": "change",
      "seed": seed,
      "evaluations": count,
      "bits": 4.25,
      "search_loss": 5.0,
      "value": value,
      "low": value - 1,
      "high": value + 1,
    }
    for seed, (count, value) in enumerate([(90, -0.1), (94, 0.0), (95, 0.1)])
  ]
  line = tables.precision(rows).splitlines()[2]
  assert "+0.0000 [-0.2484, +0.2484]" in line
  assert [cell.strip() for cell in line.split("|")][2:4] == ["3", "93"]


def test_what_is_no_plan_is_one_line(plan):
  for names in (["int4"], ["int4", "razer4"], ["int4", "lloyd4"]):
    with pytest.raises(InputError, match="give two or more of"):
      precision.Mixed(*random_model("transformer"), names)
  with pytest.raises(InputError, match="uniform=nf4: give one of int3"):
    precision.uniform(plan, "nf4")
