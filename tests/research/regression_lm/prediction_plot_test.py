"""Predictions against truth, as a picture."""

import numpy as np
import pytest

from research.regression_lm import prediction_plot
from research.regression_lm.evaluate import OURS, Predictions


def predictions(target, truth, **peers):
  rng = np.random.default_rng(0)
  draws = truth[:, None] * rng.uniform(0.8, 1.2, (len(truth), 16))
  ours = np.median(draws, axis=1)
  return Predictions(
    target=target, truth=truth, by_method={OURS: ours, **peers}, draws=draws
  )


@pytest.mark.parametrize("peers", [{}, {"XGBoost": 1.0}])
def test_targets_and_peers_have_panels(tmp_path, peers, monkeypatch):
  figures = []
  monkeypatch.setattr(
    prediction_plot.plots, "save", lambda figure, path: figures.append(figure)
  )
  truth = np.geomspace(0.1, 100, 700)
  narrow = np.linspace(-1, 1, 700)
  found = [
    predictions(name, values, **{peer: values + 1 for peer in peers})
    for name, values in (("ms", truth), ("gain", narrow))
  ]
  prediction_plot.plot(tmp_path / "a.png", found)
  shown = [axis for axis in figures[0].axes if axis.get_visible()]
  assert len(shown) == 2 * (1 + len(peers))
  assert [axis.get_xscale() for axis in shown[:: 1 + len(peers)]] == [
    "log",
    "linear",
  ]
  assert shown[0].get_title(loc="left").startswith(f"{OURS}: Spearman ")
  assert len(shown[0].collections[-1].get_offsets()) == 600


def test_the_folder_of_a_picture_is_made(tmp_path):
  path = tmp_path / "new" / "a.png"
  prediction_plot.plot(path, [predictions("ms", np.geomspace(1, 2, 9))])
  assert path.read_bytes().startswith(b"\x89PNG")


def test_an_interval_without_bounds_leaves_the_points_visible(monkeypatch):
  figures = []
  monkeypatch.setattr(
    prediction_plot.plots, "save", lambda figure, path: figures.append(figure)
  )
  wide = predictions("ms", np.geomspace(0.1, 100, 50))
  wide.draws[:2, 0], wide.draws[:2, 1:4] = 0.0, np.inf
  prediction_plot.plot("a.png", [wide])
  low, high = figures[0].axes[0].get_ylim()
  assert 0.05 < low < 0.1 and 100 < high < 200
