import json

import pytest

from models.errors import InputError
from research.bench import speed_plot


def row(length, each="fwd", op="chunked_attention", **own):
  return {
    "op": op, "shape": f"B1 L{length} H16", "pass": each,
    "implementation": "mosaic_gpu", "ms": 1.0 * length, "peer": "causal",
    "peer_ms": 5.0 * length,
  } | own  # fmt: skip


def write(path, rows):
  path.write_text(json.dumps({"rows": rows, "device": "NVIDIA H200 x1"}))
  return path


def test_a_line_holds_the_times_of_a_pass_by_length(monkeypatch, tmp_path):
  drawn = {}
  monkeypatch.setattr(
    speed_plot.plots,
    "panels_plot",
    lambda path, panels, ylabel, title, **options: drawn.update(panels),
  )
  rows = [row(256), row(64), row(64, peer="window", peer_ms=2.0)]
  # A peer that did not run has no point.
  rows += [row(64, "fwd+bwd"), row(64, "fwd+bwd", peer="window", peer_ms=None)]
  speed_plot.plot(tmp_path / "a.png", write(tmp_path / "a.json", rows), None)
  found = {
    panel: {s.name: (list(s.x), list(s.y), s.role) for s in series}
    for panel, series in drawn.items()
  }
  ours = ([64, 256], [64.0, 256.0], "ours")
  assert found["tokens, fwd"] == {
    "mosaic_gpu": ours,
    "causal": ([64, 256], [320.0, 1280.0], "baseline"),
    "window": ([64], [2.0], "baseline"),
  }
  assert found["tokens, fwd+bwd"]["window"] == ([], [], "baseline")


def test_a_picture_is_written(tmp_path):
  rows = [row(64), row(256)]
  path = tmp_path / "a.png"
  speed_plot.plot(path, write(tmp_path / "a.json", rows), "Title")
  assert path.stat().st_size > 5_000


@pytest.mark.parametrize(
  ("rows", "wrong"),
  [
    ([row(64), row(64, op="ssd")], "its rows are of 2 ops"),
    ([row(64, shape="B1")], "is no result of bench.py's ops"),
    ([{"op": "ssd"}], "is no result of bench.py's ops"),
    ([], "its rows are of 0 ops"),
  ],
)
def test_what_cannot_be_drawn_is_told(tmp_path, rows, wrong):
  source = write(tmp_path / "a.json", rows)
  with pytest.raises(InputError, match=wrong):
    speed_plot.plot(tmp_path / "a.png", source, None)
