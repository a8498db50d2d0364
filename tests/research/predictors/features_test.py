"""What tabular peers are given of a table, and what is told of it."""

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import peers, splits, summary, tables
from research.predictors.cells import Spelling
from research.predictors.number_scale import NumberScale
from research.predictors.tables import Layout


def read(tmp_path, content, **layout):
  path = tmp_path / "a.csv"
  path.write_text(content)
  return tables.read_csv(path, ["acc"], Layout(**layout))


def test_words_are_one_hot_and_gaps_cost_no_column(tmp_path):
  found = read(
    tmp_path,
    "opt,lr,acc\nsgd,0.1,1\nadam,,2\nsgd,inf,3\nNA,1e39,4\nsgd,auto,5\n",
  )
  assert found.feature_names == ["opt = adam", "opt = sgd", "lr", "lr = auto"]
  np.testing.assert_array_equal(
    found.features,
    [
      [0, 1, 0.1, 0],
      [1, 0, np.nan, 0],
      [0, 1, 1e38, 0],
      [0, 0, 1e38, 0],
      [0, 1, np.nan, 1],
    ],
  )


def test_long_cells_take_no_longer_than_their_length():
  number = Spelling().number
  assert number("9" * 200_000) == np.inf and number("9" * 200_000 + "x") is None
  for cell in ("5", "5.", ".5", "-5.25e-3", "+5E2"):
    assert number(cell) == float(cell)
  for cell in (".", "5e", "e5", "5_0", "1.2.3", ""):
    assert number(cell) is None


def test_names_of_rows_are_no_features(tmp_path):
  rows = [f"1234_{i},{i % 2},{i}" for i in range(9)]
  found = read(tmp_path, "\n".join(["id,depth,acc", *rows]))
  assert found.feature_names == ["depth"]
  assert found.notes == ["peers are not given id (9 different words)"]
  assert found.texts[0] == "id: 1234_0, depth: 0"


def mixed(rows=120):
  """A number and a word, of which the word says more."""
  generator = np.random.default_rng(0)
  lr, word = generator.uniform(size=rows), generator.integers(0, 3, rows)
  acc = word + 0.3 * lr
  cells = [f"{'abc'[w]},{x:.3f},{y:.4f}" for w, x, y in zip(word, lr, acc)]
  for row, cell in ((3, ""), (70, "nan"), (71, "inf"), (72, "1e39")):
    first, _, last = cells[row].split(",")
    cells[row] = f"{first},{cell},{last}"
  return "\n".join(["opt,lr,acc", *cells])


@pytest.mark.parametrize("name", ["XGBoost", "MLP"])
def test_peers_take_words_and_gaps(tmp_path, name):
  table = read(tmp_path, mixed())
  parts = splits.split(table, train=0.6, valid=0, seed=0)
  problem = peers.Problem(
    train_texts=[table.texts[i] for i in parts.train],
    train_features=table.features[parts.train],
    train_values=table.values[parts.train, 0],
    test_texts=[table.texts[i] for i in parts.test],
    test_features=table.features[parts.test],
  )
  found = peers.predict(name, problem)
  truth = table.values[parts.test, 0]
  assert np.corrcoef(found, truth)[0, 1] > 0.9


def test_words_beside_features_reach_peers():
  draw = np.random.default_rng(0)
  words = ["fast" if word else "slow" for word in draw.integers(0, 2, 60)]
  numbers = draw.random((60, 1))
  values = numbers[:, 0] + [3.0 * (word == "fast") for word in words]
  found = {}
  for name, texts in (("with", words), ("without", ())):
    problem = peers.Problem(
      train_texts=words[:40],
      train_features=numbers[:40],
      train_values=values[:40],
      test_texts=words[40:],
      test_features=numbers[40:],
      train_words=texts[:40],
      test_words=texts[40:],
    )
    answer = peers.predict("XGBoost", problem, threads=1)
    found[name] = np.abs(answer - values[40:]).mean()
  assert 4 * found["with"] < found["without"]


def test_what_a_library_cannot_take_is_an_error_of_its_peer():
  problem = peers.Problem(
    train_texts=["a", "b", "c"],
    train_features=np.full((3, 1), -1.0),
    train_values=np.array([1.0, 2.0, 3.0]),
    test_texts=["a"],
    test_features=np.ones((1, 1)),
  )
  with pytest.raises(peers.PeerError, match="features that are counts"):
    peers.predict("Gaussian process", problem)
  with pytest.raises(InputError, match="is unknown"):
    peers.predict("LightGBM", problem)


def test_numbers_far_apart_are_logarithms_for_all_of_a_data_set():
  near, far = np.array([1.0, 20.0]), np.array([1.0, 1e6])
  assert not NumberScale.of(near).is_log and NumberScale.of(far).is_log
  zeros = NumberScale.of(np.array([0.0, 4.0, 4e6, np.nan]))
  assert zeros.is_log and zeros.unit == 4.0
  assert not NumberScale.of(np.array([-1.0, 1e6])).is_log
  for values in (near, far, np.array([0.0, 4.0, 4e6])):
    scale = NumberScale.of(values)
    np.testing.assert_allclose(scale.back(scale.forward(values)), values)


def test_the_summary_tells_what_is_learned_from(tmp_path):
  content = mixed() + "\na,0.5,\na,0.5,9\na,0.5,9\n" + "b,0.5,8\n" * 30
  table = read(tmp_path, content)
  parts = splits.split(table, train=0.6, valid=0.1, seed=0)
  lines = summary.lines(table, parts)
  repeated = splits.repeats(table, parts)
  assert repeated > 5
  assert lines[0].startswith("152 rows: 91 for training, 15 for validation")
  assert "1 rows without any target left out" in lines
  assert any(line.startswith("target acc: ") for line in lines)
  assert any(line.startswith("text: opt: ") for line in lines)
  assert "peers: opt (3 words), lr" in lines
  assert lines[-1].startswith(f"warning: {repeated} of 46 test rows")
  # Texts are the groups where no other are named.
  parts = splits.split(table, train=0.6, valid=0.1, seed=0, by_group=True)
  assert not splits.repeats(table, parts)


def test_other_results_among_the_columns_are_told(tmp_path):
  rows = [f"cell {i},{90 + i / 10},{89 + i / 9},{i % 4}" for i in range(20)]
  content = "\n".join(["arch,acc,test_acc,depth", *rows])
  table = read(tmp_path, content)
  lines = summary.lines(table, splits.split(table, train=0.6, valid=0, seed=0))
  told = [line for line in lines if line.startswith("warning")]
  assert len(told) == 1 and "test_acc ranks rows as acc does (1.000)" in told[0]
  table = read(tmp_path, content, leave_out=("test_acc", "arch"))
  assert table.texts[0] == "depth: 0" and table.feature_names == ["depth"]


def test_gaps_among_the_columns_are_told(tmp_path):
  content = "x,word,acc\n" + "1,a,2\n,b,3\nnan,a,4\n5,,6\n" * 8
  table = read(tmp_path, content)
  lines = summary.lines(table, splits.split(table, train=0.6, valid=0, seed=0))
  assert "missing numbers: x 16" in lines
  full = read(tmp_path, "x,acc\n" + "1,2\n2,3\n" * 8)
  lines = summary.lines(full, splits.split(full, train=0.6, valid=0, seed=0))
  assert not any(line.startswith("missing") for line in lines)
