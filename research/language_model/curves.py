"""Held-out loss of finished or running runs, over tokens and over time."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.core import metrics, plots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """Evaluations of one run.

  Attributes:
    name: as the legend says it.
    tokens: (N,) read before each evaluation.
    seconds: (N,) spent on updates until then; compilation at the start,
      evaluations and checkpoints not counted.
    loss: (N,) held-out, nats a token.
    tokens_per_second: median over the run's lines.
    mfu: the same of the share of the peak; None where that is not known.
    flags: of the run.
    origin: "device", "commit" and "versions" of a finished run, by its
      `result.json`; else empty.
  """

  name: str
  tokens: np.ndarray
  seconds: np.ndarray
  loss: np.ndarray
  tokens_per_second: float
  mfu: float | None
  flags: dict[str, Any]
  origin: dict[str, Any]


def read(workdir: pathlib.Path, name: str) -> Curve:
  """Reads the metrics of a run of `train_lm.py`.

  Raises:
    InputError: the folder holds none, or no evaluation yet.
  """
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  evaluated = [row for row in rows if row.get("eval_loss") is not None]
  if not evaluated:
    raise InputError(
      f"{workdir}: holds no evaluation of a language model: train there first "
      "with train_lm.py"
    )
  points, seconds, before = [], 0.0, rows[0]["step"]
  # The time of the first line is left out, because it is that of compilation.
  for row in rows[1:] if len(rows) > 1 else rows:
    seconds += row["step_seconds"] * (row["step"] - before)
    before = row["step"]
    if row.get("eval_loss") is not None:
      points.append((row["tokens"], seconds, row["eval_loss"]))
  tokens, times, losses = np.asarray(points, np.float64).T
  steady = rows[1:] or rows
  origin, result = {}, workdir / "result.json"
  if result.exists():
    found = json.loads(result.read_text())
    origin = {key: found[key] for key in ("device", "commit", "versions")}
  shares = [row["mfu"] for row in steady if "mfu" in row]
  return Curve(
    name=name,
    tokens=tokens,
    seconds=times,
    loss=losses,
    tokens_per_second=statistics.median(
      row["tokens_per_second"] for row in steady
    ),
    mfu=statistics.median(shares) if shares else None,
    flags=json.loads((workdir / "flags.json").read_text()),
    origin=origin,
  )


def shared_origin(curves: Sequence[Curve]) -> dict[str, Any]:
  """Where all the runs were made, or nothing where that is not one place.

  Where their commits differ these are named one after the other.
  """
  commits = {curve.origin.get("commit"): None for curve in curves}
  places = [
    {key: value for key, value in curve.origin.items() if key != "commit"}
    for curve in curves
  ]
  if None in commits or any(place != places[0] for place in places):
    return {}
  return places[0] | {"commit": ", ".join(commits)}


def plot(path: pathlib.Path, curves: Sequence[Curve], title: str) -> None:
  """Draws held-out perplexity over tokens and over time."""

  def series(x):
    return [plots.Series(name=c.name, x=x(c), y=np.exp(c.loss)) for c in curves]

  plots.panels_plot(
    path,
    {
      "training tokens (millions)": series(lambda c: c.tokens / 1e6),
      "training time (s)": series(lambda c: c.seconds),
    },
    "held-out perplexity (less is better)",
    title,
    log_y=True,
  )


def rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
  """Rows of a result file: the last evaluation of each run."""
  return [
    {
      "system": "language_model",
      "model": c.name,
      # Only names are kept, because the folder of the files says nothing to
      # others.
      "data": ",".join(
        pathlib.Path(text).name
        for text in c.flags["eval_text"] or c.flags["text"]
      ),
      "method": c.flags["arch"],
      "budget": int(c.tokens[-1]),
      "metric": "perplexity",
      "value": float(np.exp(c.loss[-1])),
      "low": None,
      "high": None,
      "seeds": 1,
      "seconds": float(c.seconds[-1]),
      "tokens_per_second": c.tokens_per_second,
      "mfu": c.mfu,
      "commit": c.origin.get("commit"),
      "tokens_curve": c.tokens.tolist(),
      "seconds_curve": c.seconds.tolist(),
      "loss_curve": c.loss.tolist(),
    }
    for c in curves
  ]
