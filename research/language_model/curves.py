"""Held-out loss of finished or running runs, over tokens and over time."""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models import input_files
from models.errors import InputError
from research.core import intervals, metrics, plots


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
  advice = "train there anew"
  with input_files.errors_at(workdir / "metrics.jsonl", advice):
    measured = _measured(rows)
  origin, path = {}, workdir / "result.json"
  if path.exists():
    result = input_files.read_kept(path, advice=advice)
    with input_files.errors_at(path, advice):
      origin = {key: result[key] for key in ("device", "commit", "versions")}
  return Curve(
    name=name,
    flags=input_files.read_kept(workdir / "flags.json", advice=advice),
    origin=origin,
    **measured,
  )


def _measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What the lines of a run tell of it, as fields of `Curve`."""
  points, seconds, before = [], 0.0, rows[0]["step"]
  # The time of the first line is left out, because it is that of compilation.
  for row in rows[1:] if len(rows) > 1 else rows:
    seconds += row["step_seconds"] * (row["step"] - before)
    before = row["step"]
    if row.get("eval_loss") is not None:
      points.append((row["tokens"], seconds, row["eval_loss"]))
  tokens, times, losses = np.asarray(points, np.float64).T
  steady = rows[1:] or rows
  speeds = [row["tokens_per_second"] for row in steady]
  shares = [row["mfu"] for row in steady if "mfu" in row]
  return {
    "tokens": tokens,
    "seconds": times,
    "loss": losses,
    "tokens_per_second": statistics.median(speeds),
    "mfu": statistics.median(shares) if shares else None,
  }


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


def by_name(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
  """The runs of each name, which are seeds of one run.

  Raises:
    InputError: runs of one name differ in more than their seed.
  """
  found = {}
  for curve in curves:
    found.setdefault(curve.name, []).append(curve)
  for name, seeds in found.items():
    if len({curve.flags.get("seed") for curve in seeds}) != len(seeds):
      raise InputError(f"--names: {name!r} names two runs of one seed")
    for curve in seeds:
      differs = _differing(seeds[0], curve)
      if differs:
        raise InputError(
          f"--names: runs named {name!r} differ in {', '.join(differs)}: give "
          "them names of their own"
        )
  return found


def _differing(one: Curve, other: Curve) -> list[str]:
  """What two runs do not share: flags but the seed, and their evaluations."""
  both = sorted((one.flags | other.flags).keys() - {"seed"})
  found = [k for k in both if one.flags.get(k) != other.flags.get(k)]
  same = np.array_equal(one.tokens, other.tokens)
  return found if same else [*found, "the tokens read at their evaluations"]


def plot(
  path: pathlib.Path, curves: Sequence[Curve], title: str, times: bool = True
) -> None:
  """Draws held-out perplexity over tokens and, with `times`, over time.

  Runs of one name are seeds, whose mean is drawn.
  """

  def series(x):
    return [
      plots.Series(
        name=name,
        x=np.mean([x(c) for c in seeds], axis=0),
        y=np.mean([np.exp(c.loss) for c in seeds], axis=0),
      )
      for name, seeds in by_name(curves).items()
    ]

  panels = {"training tokens (millions)": series(lambda c: c.tokens / 1e6)}
  if times:
    panels["training time (s)"] = series(lambda c: c.seconds)
  plots.panels_plot(
    path,
    panels,
    "held-out perplexity (less is better)",
    title,
    log_y=True,
  )


def rows(curves: Sequence[Curve], times: bool = True) -> list[dict[str, Any]]:
  """Rows of a result file: the last evaluation, one row a name.

  Args:
    curves: of the runs; those of one name are seeds.
    times: whether rows hold times, which are of no use where other work shared
      the device.
  """
  return [_row(name, seeds, times) for name, seeds in by_name(curves).items()]


def _row(name: str, seeds: Sequence[Curve], times: bool) -> dict[str, Any]:
  first = seeds[0]
  found = [float(np.exp(c.loss[-1])) for c in seeds]
  mean = lambda values: float(np.mean(values)) if times else None
  shares = [c.mfu for c in seeds if c.mfu is not None]
  return {
    "system": "language_model",
    "model": name,
    # Only names are kept, because the folder of the files says nothing to
    # others.
    "data": ",".join(
      pathlib.Path(text).name
      for text in first.flags["eval_text"] or first.flags["text"]
    ),
    "method": first.flags["arch"],
    "budget": int(first.tokens[-1]),
    "metric": "perplexity",
    "value": statistics.mean(found),
    "low": min(found) if found[1:] else None,
    "high": max(found) if found[1:] else None,
    "sd": intervals.spread(found) if found[1:] else None,
    "seeds": len(seeds),
    "values": dict(zip([str(c.flags.get("seed")) for c in seeds], found)),
    "seconds": mean([c.seconds[-1] for c in seeds]),
    "tokens_per_second": mean([c.tokens_per_second for c in seeds]),
    "mfu": mean(shares) if shares else None,
    "commit": ", ".join({str(c.origin.get("commit")): None for c in seeds}),
    "tokens_curve": first.tokens.tolist(),
    "seconds_curve": first.seconds.tolist() if times else None,
    "loss_curves": [c.loss.tolist() for c in seeds],
  }
