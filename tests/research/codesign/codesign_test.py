import json

import numpy as np
import pytest

from models.errors import InputError
from research.codesign import accuracies, claims, picture, problem, study
from research.codesign.problem import NETWORK, Problem
from research.codesign.study import Plan
from research.cost.accelerators import butterfly
from research.lra import architectures
from research.lra.options import Options
from research.results import codesign as tables
from research.search import pareto

BE_120 = (("p_be", (120,)), ("p_bu", (4,)))


def accuracy(key):
  """Smooth in the sizes, so that a fit can find it."""
  d, ratio, fourier, attention = key
  return 0.5 + 0.02 * np.log2(d) + 0.01 * ratio + 0.01 * (fourier + attention)


def rows(networks):
  return [
    dict(network) | {"accuracy": accuracy(tuple(network.values()))}
    for network in networks
  ]


@pytest.fixture(scope="module")
def networks():
  return Problem().networks()


@pytest.fixture(scope="module")
def measured(networks, tmp_path_factory):
  """Of every network, as a CSV."""
  path = tmp_path_factory.mktemp("accuracies") / "text.csv"
  found = rows(networks)
  lines = [",".join(map(str, row.values())) for row in found]
  path.write_text("\n".join([",".join(found[0]), *lines, ""]))
  return accuracies.read([str(path)], "text")


def test_the_published_space_has_180_points(networks):
  """45 networks on four engines of 512 units."""
  points = list(Problem().space())
  assert len(points) == 180 and len(networks) == 45
  columns = Problem().space().columns(points)
  assert set(zip(columns["p_be"].tolist(), columns["p_bu"].tolist())) == {
    (128, 4), (64, 8), (32, 16), (16, 32)
  }  # fmt: skip
  blocks = set(
    zip(
      columns["fourier_layers"].tolist(), columns["attention_layers"].tolist()
    )
  )
  assert blocks == {(1, 0), (2, 0), (1, 1)}


def test_costs_are_those_of_the_cycle_model():
  given = Problem(rules="released")
  space = given.space()
  values = dict(d_model=64, ratio=3, fourier_layers=2, attention_layers=0)
  genome = space.genome(values | {"p_be": 64, "p_bu": 8})
  found = given.costs(space.columns([genome]))
  engine = butterfly.Engine(64, 8, butterfly.MEMORIES["even"])
  # 192 is padded to 256.
  wanted = butterfly.cycles(engine, butterfly.Network(64, 256, 4000, 2))
  assert found["cycles"] == wanted and found["dsp"] == 2048
  np.testing.assert_allclose(found["latency_ms"], wanted / 170_000)


@pytest.mark.parametrize("d, ratio, fourier, attention", [(64, 3, 1, 1)])
def test_parameters_are_those_of_the_model(d, ratio, fourier, attention):
  options = Options(
    task="text", d_model=d, d_ff=d * ratio, layers=fourier + attention,
    attention_layers=attention,
  )  # fmt: skip
  wanted = architectures.block_parameters(architectures.config(options))
  values = zip(NETWORK, (d, ratio, fourier, attention))
  columns = {name: np.array([value]) for name, value in values}
  assert problem.parameters(columns) == wanted == 17152


def test_released_rules_give_attention_away():
  costs = {}
  for rules in butterfly.RULES:
    given = Problem(rules=rules)
    space = given.space()
    for fourier, attention in ((2, 0), (1, 1)):
      values = dict(zip(NETWORK, (64, 1, fourier, attention)))
      genome = space.genome(values | {"p_be": 128, "p_bu": 4})
      found = given.costs(space.columns([genome]))["cycles"]
      costs[rules, attention] = int(found[0])
  assert costs["released", 1] == costs["released", 0]
  assert costs["corrected", 1] > 100 * costs["corrected", 0]


def test_the_large_space_fits_its_device():
  given = Problem("large", device="zynq7045", memory="ddr3", length=1024)
  space = given.space()
  rng = np.random.default_rng(0)
  points = [space.draw(rng) for _ in range(50)]
  found = given.costs(space.columns(points))
  assert found["dsp"].max() <= 900 and found["bram36"].max() <= 545
  has = [space.described(one)["p_head"] > 0 for one in points]
  attends = [space.described(one)["attention_layers"] > 0 for one in points]
  assert has == attends and any(has)


def test_the_front_and_the_chosen_point(measured, tmp_path):
  given, plan = Problem(rules="released"), Plan(least_accuracy=0.65, seeds=1)
  evaluate = problem.evaluation(given, plan.objectives, measured.by_network)
  whole = study.everything(given, plan, evaluate)
  assert len(whole.genomes) == 180 and np.isfinite(whole.values).all()
  found = study.front_rows(given, plan, whole, measured)
  values = np.array([[1 - r["accuracy"], r["latency_ms"]] for r in found])
  assert len(pareto.front(values)) == len(found) > 3
  # The released cycles have one best engine, whatever the network.
  assert {row["p_be"] for row in found} == {128}
  (chosen,) = [row for row in found if row["chosen"]]
  fast_enough = [
    row["latency_ms"] for row in found if row["accuracy"] >= 0.65 - 1e-9
  ]
  assert chosen["latency_ms"] == min(fast_enough)
  assert chosen["accuracy_is"] == "measured"

  searched = study.search_rows(plan, whole, evaluate)
  by = {row["method"]: row for row in searched}
  assert all(0 <= row["regret"] < 0.3 for row in searched)
  assert by["genetic"]["regret"] <= by["random"]["regret"]
  assert by["random"]["points"] == 180

  text = tables.front(found) + tables.searches(searched)
  assert "measured" in text and "100 of 180" in text
  study.write_csv(tmp_path / "front.csv", found)
  lines = (tmp_path / "front.csv").read_text().splitlines()
  assert len(lines) == len(found) + 1 and lines[0].startswith("d_model,ratio")
  picture.plot(tmp_path / "front.png", whole, given, measured)
  assert (tmp_path / "front.png").stat().st_size > 10_000
  none = study.front_rows(given, Plan(least_accuracy=0.9), whole, measured)
  assert not any(row["chosen"] for row in none)


def test_predictions_are_told_from_measurements(networks):
  known = rows(networks[::2])
  keys = [tuple(row[name] for name in NETWORK) for row in known]
  half = accuracies.Accuracies(
    {key: row["accuracy"] for key, row in zip(keys, known)},
    dict.fromkeys(keys, "measured"),
    dict.fromkeys(keys, 1),
  )
  assert accuracies.completed(half, networks, "none") is half
  found = accuracies.completed(half, networks, "ridge")
  assert len(found.by_network) == 45 and found.error < 0.005
  for network in networks:
    key = tuple(network.values())
    wanted = "measured" if key in keys else "predicted by ridge"
    assert found.source[key] == wanted
    assert abs(found.by_network[key] - accuracy(key)) < 0.01
  told = []
  rlm = lambda texts: told.extend(texts) or np.full(len(texts), 0.6)
  found = accuracies.completed(half, networks, "rlm", rlm=rlm)
  assert len(told) == 45 - len(keys) and set(found.by_network.values()) > {0.6}
  assert told[0].startswith("d_model: 64, ratio: 1, fourier_layers: ")


def test_xgboost_is_a_peer_of_the_fit(networks):
  pytest.importorskip("xgboost")
  keys = [tuple(network.values()) for network in networks]
  known = {key: accuracy(key) for key in keys[:40]}
  some = accuracies.Accuracies(known, dict.fromkeys(known, "measured"), {})
  found = accuracies.completed(some, networks, "xgboost")
  assert found.source[keys[44]] == "predicted by xgboost"
  assert abs(found.by_network[keys[44]] - accuracy(keys[44])) < 0.1


def test_a_result_of_training_is_read(tmp_path):
  path = tmp_path / "result.json"
  row = dict(d_model=64, d_ff=192, fourier_layers=2, attention_layers=0)
  row |= dict(model="fabnet", data="text", metric="accuracy")
  path.write_text(
    json.dumps(
      {
        "rows": [
          # Networks are chosen by validation data, not by the test.
          row | {"value": 0.9, "valid_accuracy": 0.6, "seed": 0},
          row | {"value": 0.7, "seed": 1},
          row | {"value": 0.9, "model": "transformer"},
          row | {"value": 0.9, "data": "listops"},
          row | {"value": 0.1, "metric": "seconds"},
        ]
      }
    )
  )
  found = accuracies.read([str(path)], "text")
  assert found.by_network == {(64, 3, 2, 0): pytest.approx(0.65)}
  assert found.seeds == {(64, 3, 2, 0): 2}
  # The search keeps what was measured in its own result, which is read again.
  kept = tmp_path / "kept" / "result.json"
  kept.parent.mkdir()
  rows = study.measured_rows(found) + [{"kind": "search", "method": "random"}]
  kept.write_text(json.dumps({"rows": rows}))
  assert accuracies.read([str(kept.parent)], "text").by_network == {
    (64, 3, 2, 0): pytest.approx(0.65)
  }
  with pytest.raises(InputError, match="no JSON file inside"):
    (tmp_path / "empty").mkdir()
    accuracies.read([str(tmp_path / "empty")], "text")
  with pytest.raises(InputError, match="no row is of FABNet on 'image'"):
    accuracies.read([str(path)], "image")


@pytest.mark.parametrize(
  "text, words",
  [
    ("d_model,ratio\n64,1\n", "line 2: accuracy|line 2: value=None"),
    ("{", "no row|heading|line"),
    (
      "d_model,ratio,fourier_layers,attention_layers,accuracy\n64,1,2,0,1.5\n",
      "line 2: accuracy=1.5 is not between 0 and 1",
    ),
    (
      "d_model,d_ff,fourier_layers,attention_layers,accuracy\n64,96,2,0,.5\n",
      "d_ff=96 is no multiple of d_model=64",
    ),
    (
      "d_model,ratio,fourier_layers,attention_layers,accuracy\nx,1,2,0,.5\n",
      "line 2: d_model='x' is no number",
    ),
  ],
)
def test_wrong_tables_are_named(tmp_path, text, words):
  path = tmp_path / "a.csv"
  path.write_text(text)
  with pytest.raises(InputError, match=words):
    accuracies.read([str(path)], "text")


def test_wrong_results_are_named(tmp_path):
  path = tmp_path / "a.json"
  for text in ("[]", "{", '{"rows": 3}', '{"rows": [3]}'):
    path.write_text(text)
    with pytest.raises(InputError, match="is no result file"):
      accuracies.read([str(path)], "text")


@pytest.mark.parametrize(
  "given, words",
  [
    (Problem("foo"), "space 'foo' is unknown: take one of published, large"),
    (Problem(device="foo"), "device 'foo' is unknown"),
    (Problem(memory="foo"), "memory 'foo'"),
    (Problem(rules="foo"), "rules 'foo'"),
    (Problem(length=0), "length=0"),
    (Problem(device="zynq7045"), "2048 DSPs, and XC7Z045 has 900"),
    (Problem(device="zynq7045", only=BE_120), "1920 DSPs"),
    (Problem(only=(("p_bu", (3,)),)), "p_bu=.*3.*: give powers of two"),
    (Problem(only=(("p_be", (0,)),)), "p_be=.*0"),
    (Problem(only=(("d_model", (65,)),)), "hidden=.65.: 2 heads do not divide"),
    (Problem(only=(("p_head", (1,)),)), "p_head: 'published' has no such dec"),
    (Problem(only=(("fourier_layers", (9,)),)), "no network and engine of 'pu"),
  ],
)
def test_problems_that_cannot_be_are_named(given, words):
  with pytest.raises(InputError, match=words):
    given.space()


def test_some_values_of_decisions_only():
  only = problem.only(["p_be=20:10", "p_bu=4", "d_model=768"])
  assert only == (("p_be", (20, 10)), ("p_bu", (4,)), ("d_model", (768,)))
  points = list(Problem(device="zynq7045", only=only).space())
  assert len(points) == 18
  with pytest.raises(InputError, match="such as p_be=120"):
    problem.only(["120x4"])


def test_plans_that_cannot_be_are_named(networks):
  for plan, words in (
    (Plan(objectives=("foo",)), "objective 'foo' is unknown"),
    (Plan(objectives=("dsp", "dsp")), "each once"),
    (Plan(methods=("foo",)), "method 'foo' is unknown"),
    (Plan(objectives=("dsp",), least_accuracy=0.5), "needs the objective"),
  ):
    with pytest.raises(InputError, match=words):
      study.check(plan)
  with pytest.raises(InputError, match="needs accuracies"):
    problem.evaluation(Problem(), ("error",), None)
  few = accuracies.Accuracies(
    {(1, 1, 1, 1): 0.5}, {(1, 1, 1, 1): "measured"}, {}
  )
  with pytest.raises(InputError, match="1 networks were measured, and a fit"):
    accuracies.completed(few, networks, "ridge")
  with pytest.raises(InputError, match="predictor 'foo' is unknown"):
    accuracies.completed(few, networks, "foo")
  evaluate = problem.evaluation(Problem(), ("error", "dsp"), few.by_network)
  plan = Plan(objectives=("error", "dsp"))
  whole = study.everything(Problem(), plan, evaluate)
  with pytest.raises(InputError, match="no network of the space has an accur"):
    study.front_rows(Problem(), plan, whole, few)


def test_claims_are_computed_from_the_cycle_model():
  found = claims.rows()
  by = {(row["claim"], row["size"], row["length"]): row for row in found}
  row = by["latency (ms), VCU128, 120 x 4", "Base", 1024]
  assert row["released"] == pytest.approx(10.40866, abs=1e-5)
  assert row["corrected"] > row["released"]
  # Of two figures of energy one was not what its speed means.
  row = by["times less energy than the CPU", "Large", 1024]
  assert row["published"] == 6083 and row["released"] == pytest.approx(
    6804, rel=1e-3
  )
  row = by["times faster than dense BERT", "Base", 1024]
  assert row["published"] == pytest.approx(56.14, abs=0.01)
  assert 20 < row["corrected"] < row["published"]
  text = tables.claims(found)
  assert "ms that the GPU took, if so: 21.8, 28.8" in text
