"""Validation accuracy over updates, and accuracy over cost, as pictures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.core import plots
from research.core.plots import Series


def plot(
  path: str | pathlib.Path,
  runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], Sequence[int]]],
  title: str,
) -> None:
  """Draws the validation accuracy of runs.

  Args:
    path: of the PNG.
    runs: name -> lines of `metrics.jsonl`, and the members that are shown; a
      bar goes from the worst of them to the best.
    title: what the picture shows.
  """
  series = []
  for number, (name, (lines, members)) in enumerate(runs.items()):
    told = [line for line in lines if "valid_accuracy" in line]
    found = np.array([line["valid_accuracy"] for line in told], float)
    found = found[:, list(members)]
    series.append(
      Series(
        name=name,
        x=[line["updates"] for line in told],
        y=found.mean(1),
        low=found.min(1),
        high=found.max(1),
        role="baseline" if number else "ours",
      )
    )
  several = all(len(members) > 1 for _, members in runs.values())
  plots.pareto_plot(
    path,
    series,
    "updates",
    "validation accuracy (more is better)",
    title,
    subtitle="mean of the seeds; bars from the worst to the best"
    if several
    else "one seed: how far others would be is not known",
  )


def accuracy_over_time(
  path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]], title: str
) -> None:
  """Draws test accuracy over the measured time of an update, a point a model.

  Args:
    path: of the PNG.
    rows: of `comparison.rows`; those without a time are left out.
    title: what the picture shows.

  Raises:
    InputError: no row has a time.
  """
  timed = [row for row in rows if row.get("update_ms") is not None]
  if not timed:
    raise InputError(
      "--times: has no row of these runs: name its models as --models"
    )
  series = [
    Series(
      name=row["model"],
      x=[row["update_ms"]],
      y=[row["value"]],
      low=[row["low"]],
      high=[row["high"]],
      role="baseline" if number else "ours",
    )
    for number, row in enumerate(timed)
  ]
  plots.pareto_plot(
    path,
    series,
    f"measured time of an update of {timed[0]['data']} (ms)",
    "test accuracy (more is better)",
    title,
    subtitle="mean of the seeds with its 95% interval",
  )
