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
