import matplotlib.image
import numpy as np
import pytest

from research.core import plots


def _read(path):
  """(H, W, 3) picture as floats in [0, 1]."""
  return matplotlib.image.imread(path)[..., :3]


def _has_colour(picture, rgb, pixels):
  distance = np.abs(picture - np.array(rgb) / 255).max(-1)
  return (distance < 0.02).sum() >= pixels


def test_the_pareto_plot_shows_every_role(tmp_path):
  x = [0.4, 0.8, 0.6]
  series = [
    plots.Series("ours", x, [3.0, 1, 2], [2.8, 0.9, 1.8], [3.2, 1.1, 2.2], r)
    if r == "ours"
    else plots.Series(r, x, [4.0, 2, 3], role=r)
    for r in plots.ROLES
  ]
  series.append(plots.Series("full", [1.0], [0.5], role="reference"))
  plots.pareto_plot(
    tmp_path / "p.png", series, "cost", "loss", "Title", subtitle="sub"
  )
  picture = _read(tmp_path / "p.png")
  assert picture.shape[1] == 1120
  assert _has_colour(picture, (0xD5, 0x5E, 0x00), 1000)
  assert _has_colour(picture, (0x00, 0x72, 0xB2), 300)
  assert _has_colour(picture, (0x2B, 0x2B, 0x2B), 300)
  assert 0.02 < (picture.min(-1) < 0.9).mean() < 0.3


def test_curves_show_scalars_and_leave_out_time(tmp_path):
  rows = [
    {"step": i, "loss": 1 / (i + 1), "gap": None if i == 3 else i, "v": [1, 2]}
    | {"step_seconds": 0.1}
    for i in range(30)
  ]
  plots.curves_plot(tmp_path / "c.png", rows)
  plots.curves_plot(tmp_path / "same.png", rows, keys=["loss", "gap"])
  plots.curves_plot(tmp_path / "one.png", rows, keys=["loss"])
  picture = _read(tmp_path / "c.png")
  np.testing.assert_array_equal(picture, _read(tmp_path / "same.png"))
  assert picture.shape[1] == 1120
  assert _has_colour(picture, (0x00, 0x72, 0xB2), 500)
  assert _read(tmp_path / "one.png").shape[1] == 1120


def test_panels_show_the_same_methods_over_several_costs(tmp_path):
  over = lambda scale: [
    plots.Series(name, [scale, 2 * scale], [30.0, 20.0]) for name in "ab"
  ]
  plots.panels_plot(
    tmp_path / "p.png",
    {"tokens": over(1.0), "seconds": over(9.0)},
    "loss",
    "Title",
    log_y=True,
  )
  picture = _read(tmp_path / "p.png")
  assert picture.shape[1] == 1120
  half = picture.shape[1] // 2
  for part in (picture[:, :half], picture[:, half:]):
    assert _has_colour(part, (0x00, 0x9E, 0x73), 200)
  for panels in ({}, {"tokens": over(1.0), "seconds": over(9.0)[:1]}):
    with pytest.raises(ValueError, match="same methods"):
      plots.panels_plot(tmp_path / "no.png", panels, "loss", "Title")
  assert not (tmp_path / "no.png").exists()


def test_bad_series_are_refused(tmp_path):
  path = tmp_path / "p.png"
  for bad in (
    plots.Series("a", [1.0], [1.0], role="best"),
    plots.Series("a", [1.0], [1.0, 2.0]),
    plots.Series("a", [], []),
    plots.Series("a", [1.0], [1.0], low=[0.5]),
  ):
    with pytest.raises(ValueError, match="a"):
      plots.pareto_plot(path, [bad], "x", "y", "t")
  with pytest.raises(ValueError, match="no scalar"):
    plots.curves_plot(path, [])
  assert not path.exists()
