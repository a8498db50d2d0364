import json

import pytest

from models.errors import InputError
from research.quantization import picture


def row(idea, size, value, **own):
  return {
    "metric": "decoding_ratio", "idea": idea, "bytes": size * 10**6,
    "budget": 0.5, "value": value, "low": value - 0.1, "high": value + 0.1,
    "model": "Mamba-2", "data": "books/test.txt",
  } | own  # fmt: skip


def test_a_recipe_that_its_own_idea_beats_is_left_out(monkeypatch, tmp_path):
  drawn = {}
  monkeypatch.setattr(
    picture.plots,
    "pareto_plot",
    lambda path, series, *labels, subtitle, log_y: drawn.update(
      {s.name: list(zip(s.x, s.y)) for s in series}, log_y=log_y
    ),
  )
  rows = [
    row("Quamba2", 75, 1.01), row("Quamba2", 48, 1.02),
    row("Quamba2", 48, 1.05), row("Quamba2", 60, 1.03),
    # What another idea loses says nothing about this one.
    row("naive", 75, 1.6), row("naive", 58, 1.4),
    row("naive", 40, 9.0, seed=0), row("naive", 40, 9.0, metric="accuracy"),
  ]  # fmt: skip
  path = tmp_path / "result.json"
  path.write_text(json.dumps({"rows": rows}))
  picture.plot_result(tmp_path / "a.png", path)
  assert drawn == {
    "Quamba2": [(48, 1.02), (75, 1.01)],
    "naive": [(58, 1.4)],
    "log_y": False,
  }


@pytest.mark.parametrize("rows", ([], [row("naive", 58, 1.4, metric="ratio")]))
def test_a_result_of_nothing_decoded_has_no_picture(tmp_path, rows):
  path = tmp_path / "result.json"
  path.write_text(json.dumps({"rows": rows}))
  with pytest.raises(InputError, match="nothing in it was decoded"):
    picture.plot_result(tmp_path / "a.png", path)
