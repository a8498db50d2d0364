"""Finished runs of train_recall.py beside each other."""

import pathlib
from collections.abc import Sequence
from typing import Any

from models import input_files
from models.errors import InputError
from research.core import plots
from research.core.plots import Series
from research.results import files as result_files

Row = dict[str, Any]
_NEEDED = (
  "model",
  "data",
  "value",
  "low",
  "high",
  "length",
  "pairs",
  "seeds",
  "parameters",
  "cache_bytes",
)
_ORIGIN = ("device", "commit", "versions")


def read(folders: Sequence[pathlib.Path]) -> tuple[list[Row], float, Row]:
  """Rows of runs, their seconds, and where they come from.

  Raises:
    InputError: a run is not finished, a file is damaged, or runs are of
      different devices or commits.
  """
  rows, seconds, origins = [], 0.0, []
  for folder in folders:
    path, result = result_files.of_run(folder, "train_recall.py")
    with input_files.errors_at(path, wrong="is no result of train_recall.py"):
      rows += [{**dict.fromkeys(_NEEDED), **row} for row in result["rows"]]
      if any(row[name] is None for row in rows for name in _NEEDED):
        raise KeyError("a row lacks a field")
      seconds += result["seconds"]
      origins.append({name: result[name] for name in _ORIGIN})
  if any(origin != origins[0] for origin in origins):
    raise InputError(
      "--runs: they come from different devices, commits or versions: a result "
      "has one"
    )
  return rows, seconds, origins[0]


def plot(path: pathlib.Path, rows: Sequence[Row], title: str) -> None:
  """Draws shares of right answers over pairs, at the shortest tested length.

  Args:
    path: of the PNG.
    rows: of `read`.
    title: what the picture shows.
  """
  length = min(row["length"] for row in rows)
  task = rows[0]["data"]
  chosen = [r for r in rows if (r["length"], r["data"]) == (length, task)]
  series = []
  for number, name in enumerate(dict.fromkeys(row["model"] for row in chosen)):
    own = [row for row in chosen if row["model"] == name]
    own.sort(key=lambda row: row["pairs"])
    column = lambda key, own=own: [row[key] for row in own]
    series.append(
      Series(
        name=name,
        x=column("pairs"),
        y=column("value"),
        low=column("low"),
        high=column("high"),
        role="baseline" if number else "ours",
      )
    )
  several = all(row["seeds"] > 1 for row in chosen)
  plots.pareto_plot(
    path,
    series,
    f"pairs in a text of {length:,} tokens ({task})",
    "share of right answers (more is better)",
    title,
    subtitle="mean of the seeds with its 95% interval"
    if several
    else "one seed: how far others would be is not known",
  )
