import json

import numpy as np
import pytest

from models.errors import InputError
from research.search import (
  METHODS,
  Exhaustive,
  Genetic,
  Product,
  Random,
  Regularised,
  Reinforce,
  Spread,
  Subsets,
  Weighted,
  named,
  pareto,
  run,
  store,
)

SPACE = Product({name: tuple(range(5)) for name in "abcde"})
NAMES = ("error", "cost")


def evaluate(genomes):
  """Two objectives that pull apart, with one interaction."""
  at = np.asarray(genomes, float)
  cost = at.sum(1) + (at[:, 0] * at[:, 1] > 8)
  error = ((at - np.array([4, 3, 4, 2, 4])) ** 2).sum(1) + at[:, 2] % 2
  return np.stack([error, cost], 1)


@pytest.fixture(scope="module")
def everything():
  return run(SPACE, evaluate, Exhaustive(), objectives=NAMES)


def test_the_exhaustive_search_takes_every_point_once(everything):
  assert everything.genomes == list(SPACE) and len(SPACE) == 5**5
  assert everything.complete
  row = everything.rows([7])[0]
  assert row == {"a": 0, "b": 0, "c": 0, "d": 1, "e": 2} | dict(
    zip(NAMES, evaluate([(0, 0, 0, 1, 2)])[0])
  )


def regret(found, everything):
  reference = everything.values.max(0) + 1
  return pareto.regret(found.values, everything.values, reference)


@pytest.mark.parametrize("name", METHODS)
def test_a_search_is_its_seed_and_ends_with_its_budget(name):
  method = named(name)
  one = run(SPACE, evaluate, method, budget=150, objectives=NAMES)
  again = run(SPACE, evaluate, method, budget=150, objectives=NAMES)
  assert len(one.genomes) == len(set(one.genomes)) == 150
  assert one.genomes == again.genomes
  np.testing.assert_array_equal(one.values, evaluate(one.genomes))
  if name != "exhaustive":
    other = run(SPACE, evaluate, method, budget=150, seed=1, objectives=NAMES)
    assert other.genomes != one.genomes


def test_learning_methods_have_less_regret_than_chance(everything):
  """Of one tenth of the space, mean of eight seeds."""

  def mean(method):
    return np.mean([
      regret(run(SPACE, evaluate, method, budget=312, seed=seed,
                 objectives=NAMES), everything)
      for seed in range(8)
    ])  # fmt: skip

  chance = mean(Random())
  assert chance > 0.03
  assert mean(Genetic(population=32)) < chance / 4
  assert mean(Regularised()) < chance / 2
  assert mean(Reinforce()) < chance * 0.7


def test_evolution_reaches_the_best_of_one_objective(everything):
  """With limits: the least error among the points that cost at most 9."""
  limited = Weighted((1.0, 0.0), (np.inf, 9.0))
  best = everything.values[everything.best(limited)]
  feasible = everything.values[everything.values[:, 1] <= 9]
  assert best[0] == feasible[:, 0].min() and best[1] <= 9
  for method in (Regularised(), Genetic()):
    found = run(SPACE, evaluate, method, budget=700, preference=limited,
                objectives=NAMES)  # fmt: skip
    assert found.values[found.best(limited)][0] == best[0], method


def test_a_policy_comes_near_the_best_of_one_objective(everything):
  """Nearer than chance with the same budget, over four seeds."""
  limited = Weighted((1.0, 0.0), (np.inf, 9.0))
  best = everything.values[everything.best(limited)][0]

  def distance(method, seed):
    found = run(SPACE, evaluate, method, budget=300, preference=limited,
                seed=seed, objectives=NAMES)  # fmt: skip
    return found.values[found.best(limited)][0] - best

  ours, chance = (
    np.mean([distance(method, seed) for seed in range(4)])
    for method in (Reinforce(), Random())
  )
  assert ours <= 2 and ours < chance


def test_the_whole_space_is_found_and_the_search_ends():
  small = Product({"a": (1, 2), "b": ("x", "y", "z")})
  values = lambda genomes: np.asarray(genomes, float)
  for method in (Random(), Regularised(), Genetic(), Reinforce()):
    found = run(small, values, method, objectives=NAMES)
    assert len(found.genomes) == 6 and found.complete


def test_points_that_are_not_feasible_are_never_evaluated():
  feasible = lambda columns: columns["a"] + columns["b"] <= 3
  space = Product({"a": (0, 1, 2, 4), "b": (0, 1, 2, 4)}, feasible)
  points = list(space)
  assert len(points) == 8 and len(space) == 16
  for method in (Random(), Regularised(4, 2), Genetic(), Reinforce()):
    found = run(space, lambda g: np.asarray(g, float).sum(1), method, seed=3)
    assert set(found.genomes) == set(points)
    # It cannot know that there are no more.
    assert not found.complete
  none = Product({"a": (1, 2)}, lambda columns: columns["a"] > 2)
  with pytest.raises(InputError, match="no|none of 10000 points"):
    run(none, evaluate, Random())


# What the search of Quamba2's mixed precision found before it was this one.
@pytest.mark.parametrize(
  "seed, wanted",
  [
    (0, (0, 5, 11, 16, 22, 23)),
    (1, (0, 1, 5, 11, 16, 20)),
    (2, (0, 5, 16, 17, 22, 23)),
  ],
)
def test_the_genetic_search_is_that_of_mixed_precision(seed, wanted):
  def loss(one):
    pairs = sum((i * j) % 5 for i in one for j in one if i < j)
    return sum((7 * i * i + 3 * i) % 23 for i in one) + pairs

  found = run(
    Subsets(24, 6),
    lambda genomes: np.array([float(loss(one)) for one in genomes]),
    Genetic(population=40, rounds=5, mutations=10, crossings=10),
    seed=seed,
    preference=Weighted(),
  )
  assert found.genomes[found.best(Weighted())] == wanted
  assert len(found.genomes) <= 140


def test_sets_keep_their_size():
  rng = np.random.default_rng(0)
  space = Subsets(5, 3)
  assert len(list(space)) == len(space) == 10
  one, two = space.draw(rng), space.draw(rng)
  for child in (space.mutated(one, rng), space.crossed(one, two, rng)):
    assert len(set(child)) == 3 and child == tuple(sorted(child))
  assert len(set(space.mutated(one, rng)) & set(one)) == 2
  whole = Subsets(2, 2)
  assert whole.mutated((0, 1), rng) == (0, 1)
  with pytest.raises(InputError, match="no set of 3 among 2"):
    Subsets(2, 3)


class Stopped(Exception):
  pass


@pytest.mark.parametrize("method", [Regularised(8, 4), Reinforce(4)])
def test_an_interrupted_search_goes_on_and_ends_the_same(method, tmp_path):
  path, asked = tmp_path / "values.jsonl", []

  def until(most):
    def stopping(genomes):
      if len(asked) + len(genomes) > most:
        raise Stopped
      asked.extend(genomes)
      return evaluate(genomes)

    return stopping

  def search(most):
    kept = store.kept(until(most), path, {"space": "a"})
    return run(SPACE, kept, method, budget=60, objectives=NAMES)

  with pytest.raises(Stopped):
    search(25)
  # A kill cuts the last line in two.
  with path.open("ab") as stream:
    stream.write(b'{"genome": [1, 2')
  found = search(1000)
  assert len(asked) == len(set(asked)) == 60
  whole = run(SPACE, evaluate, method, budget=60, objectives=NAMES)
  assert found.genomes == whole.genomes
  np.testing.assert_array_equal(found.values, whole.values)
  with pytest.raises(InputError, match="another space or evaluation"):
    store.kept(evaluate, path, {"space": "b"})


def test_a_store_keeps_infinity_and_names_damage(tmp_path):
  path = tmp_path / "deep" / "values.jsonl"
  kept = store.kept(lambda g: np.array([[np.inf, 1.5]]), path, 1)
  assert kept([(0, 1)]).tolist() == [[np.inf, 1.5]]
  again = store.kept(evaluate, path, 1)
  assert again([(0, 1)]).tolist() == [[np.inf, 1.5]]
  lines = path.read_text().splitlines()
  path.write_text("\n".join([lines[0], json.dumps({"genome": 3}), ""]))
  with pytest.raises(InputError, match="is damaged: remove it"):
    store.kept(evaluate, path, 1)


def test_progress_is_told():
  told = []
  run(SPACE, evaluate, Random(16), budget=40, objectives=NAMES,
      advance=told.append)  # fmt: skip
  assert sum(told) == 40 and max(told) <= 16


def test_mistakes_are_named():
  with pytest.raises(InputError, match="method 'foo' is unknown: take one of"):
    named("foo")
  with pytest.raises(InputError, match="depth: random has no such option"):
    named("random", depth=3)
  with pytest.raises(InputError, match="a=.*each once"):
    Product({"a": (1, 1)})
  with pytest.raises(InputError, match="at least one decision"):
    Product({})
  with pytest.raises(InputError, match="a=7: the space has"):
    SPACE.genome(dict.fromkeys("abcde", 7))
  with pytest.raises(InputError, match="reinforce: needs a space of decisions"):
    run(Subsets(4, 2), evaluate, Reinforce())
  with pytest.raises(InputError, match="budget=0"):
    run(SPACE, evaluate, Random(), budget=0)
  with pytest.raises(InputError, match="'a': .* is NaN"):
    run(SPACE, lambda g: np.full(len(g), np.nan), Random(), budget=3)
  with pytest.raises(InputError, match="16 points for 1 objectives"):
    run(SPACE, evaluate, Random(), budget=30)
  with pytest.raises(InputError, match="weights=.*each of 2"):
    run(SPACE, evaluate, Regularised(), budget=60, objectives=NAMES,
        preference=Weighted((1.0, 1.0, 1.0)))  # fmt: skip


def test_what_cannot_be_is_never_the_best():
  """Among many infinite values, which have no distance from each other."""
  values = np.array([[np.inf, y] for y in range(5)] + [[1.0, 1.0], [2.0, 0.0]])
  space = Product({"a": tuple(range(7))})
  find = lambda values: run(
    space,
    lambda genomes: values[[one[0] for one in genomes]],
    Random(),
    objectives=("x", "y"),
  )
  found = find(values)
  for preference in (Spread(), Weighted((1.0, 1.0))):
    best = found.values[found.best(preference)]
    assert np.isfinite(best).all()
  with pytest.raises(InputError, match="no point"):
    find(values + [np.inf, 0]).best(Spread())


@pytest.mark.parametrize("population, rounds", [(5, 0), (1, 3)])
def test_a_genetic_search_of_few_points_ends(population, rounds):
  found = run(
    Subsets(8, 3),
    lambda genomes: np.array([float(sum(one)) for one in genomes]),
    Genetic(population=population, rounds=rounds),
  )
  assert found.genomes and found.complete
  assert len(found.genomes) <= Genetic(population, rounds).evaluations


def test_a_fan_of_weights_covers_every_objective():
  fan = [aim.weights for aim in Spread(aims=8).fan(3)]
  assert len(fan) == 10 and len(set(fan)) == 10
  assert {weights.index(max(weights)) for weights in fan} == {0, 1, 2}
  assert SPACE.genome(SPACE.described((1, 2, 3, 4, 0))) == (1, 2, 3, 4, 0)
