from research.results import regression_lm as result_tables


def test_methods_show_means_and_spread_over_seeds():
  shared = {"target": "t", "train": 9, "method": "m", "tests": 5}
  values = {"kendall": (0.4, 0.6), "kendall, minus x": (9, 9)}
  rows = [
    shared | {"metric": metric, "value": value}
    for metric, both in values.items()
    for value in both
  ]
  text = result_tables.methods(rows)
  assert "0.500 ± 0.141" in text and "9.0" not in text
  assert text.splitlines()[2].split("|")[-2].strip() == "2"


def test_large_errors_do_not_fill_the_page():
  row = {"target": "t", "train": 9, "method": "m", "metric": "mse"}
  assert "1.23e+15" in result_tables.methods([row | {"value": 1.234e15}])


def test_densities_stand_beside_the_truth():
  rows = [
    {"text": "a", "method": method, "energy_distance": value, "crps_1": 1.0,
     "crps_2": 2.0, "crps_2_given_1": 3.0}
    for method, value in (("regression LM", 0.25), ("true density", 0.0))
  ]  # fmt: skip
  lines = result_tables.densities(rows).splitlines()
  assert len(lines) == 3 and "0.2500" in lines[2] and "0.0000" in lines[2]


def test_speed_is_set_against_the_peer_of_a_like_setting():
  shared = {"work": "update", "model": "m", "shape": "B1"}
  rows = [
    shared | {"system": "regress-lm", "dtype": "float32", "setting": "tf32",
     "seconds": 3.0, "examples_per_second": 1.0, "compiled": False},
    shared | {"system": "frugax", "dtype": "float32", "setting": "tf32",
     "seconds": 2.0, "examples_per_second": 1.5, "share": 0.5},
  ]  # fmt: skip
  lines = result_tables.speed(rows).splitlines()
  assert "tf32, not compiled" in lines[2] and "1.5" in lines[2].split("|")[-2]
  assert "50.0%" in lines[3]
