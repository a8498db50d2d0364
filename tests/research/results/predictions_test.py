import math

from research.results import predictions


def test_methods_show_means_and_spread_over_seeds():
  shared = {"target": "t", "train": 9, "method": "m", "tests": 5}
  values = {"kendall": (0.4, 0.6), "kendall, minus x": (9, 9)}
  rows = [
    shared | {"metric": metric, "value": value}
    for metric, both in values.items()
    for value in both
  ]
  text = predictions.table(rows)
  assert "0.500 ± 0.141" in text and "9.0" not in text
  assert text.splitlines()[2].split("|")[-2].strip() == "2"
  assert text.endswith("± is the standard deviation between seeds.\n")


def test_a_seed_without_a_number_is_counted_and_makes_no_mean():
  shared = {"target": "t", "train": 9, "method": "m"}
  scores = [shared | {"metric": "crps", "value": v} for v in (1.0, 2.0, 3.0)]
  for gap in (None, math.inf, math.nan):
    wide = [
      shared | {"metric": "interval score of 0.9", "value": v}
      for v in (0.25, gap, 0.5)
    ]
    (line,) = predictions.means_over_seeds(scores + wide)
    assert line["crps"] == 2 and line["crps sd"] == 1 and line["seeds"] == 3
    assert line["interval score of 0.9"] is None
    text = predictions.table(scores + wide)
    assert "2.000 ± 1.000" in text and "not finite (1 of 3)" in text


def test_columns_are_those_that_rows_have():
  row = {"target": "t", "train": 9, "method": "m", "seed": 0, "value": 0.5}
  rows = [row | {"metric": name} for name in ("mae", "kendall, without twins")]
  head = predictions.table(rows).splitlines()[0]
  names = [cell.strip() for cell in head.strip("| ").split("|")]
  assert names[3:] == ["kendall, without twins", "mae", "seeds"]


def test_paired_differences_count_seeds_beyond_their_intervals():
  shared = {"target": "t", "train": 9, "method": "m"}
  rows = [
    shared | {"metric": metric, "value": low + 0.1, "low": low, "high": high}
    for metric, low, high in (
      ("kendall, minus x", 0.1, 0.2),
      ("kendall, minus y", -0.1, 0.3),
      ("mae, minus x, without twins", 0.2, 0.4),
      ("mse, minus x", 0.2, 0.4),
    )
  ]
  lines = predictions.paired(rows).splitlines()
  kendall, mae = (
    [cell.strip() for cell in line.strip("| ").split("|")][3:]
    for line in lines[2:]
  )
  assert kendall == ["kendall", "x (1), y (1)", "+0.1000", "1", "0", "2"]
  between = "+0.3000 [+0.2000, +0.4000]"
  assert mae == ["mae, without twins", "x", between, "0", "1", "1"]


def test_large_errors_do_not_fill_the_page():
  row = {"target": "t", "train": 9, "method": "m", "metric": "mse"}
  text = predictions.table([row | {"value": 1.234e15}])
  assert "1.23e+15" in text and "±" not in text


def test_densities_stand_beside_the_truth():
  rows = [
    {"text": "a", "method": method, "energy_distance": value, "crps_1": 1.0,
     "crps_2": 2.0, "crps_2_given_1": 3.0}
    for method, value in (("regression LM", 0.25), ("true density", 0.0))
  ]  # fmt: skip
  lines = predictions.densities(rows).splitlines()
  assert len(lines) == 3 and "0.2500" in lines[2] and "0.0000" in lines[2]
