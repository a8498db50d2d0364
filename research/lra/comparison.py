"""Finished runs beside each other: accuracy of seeds, size, measured time."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from models import input_files
from research.core import intervals, metrics
from research.results import files as result_files

Row = dict[str, Any]

COLUMNS = {
  "data": "task",
  "model": "model",
  "value": "accuracy",
  "low": "low",
  "high": "high",
  "seeds": "seeds",
  "learning_rate": "learning rate",
  "parameters": "parameters",
  "block_parameters": "of blocks",
  "update_ms": "ms an update",
  "sample_ms_1": "ms a sample, batch 1",
  "sample_ms_256": "ms a sample, batch 256",
}
_ORIGIN = ("device", "commit", "versions")


def columns(rows: Sequence[Row]) -> dict[str, str]:
  """Those of `COLUMNS` that some row has."""
  return {
    key: heading
    for key, heading in COLUMNS.items()
    if any(row.get(key) is not None for row in rows)
  }


@dataclasses.dataclass(frozen=True)
class Finished:
  """A run that was tested.

  Attributes:
    name: as tables say it.
    rows: of its `result.json`, a seed each.
    lines: of its `metrics.jsonl`.
    members: of the lines' lists, those at the rate that was tested.
    times: rows of its model in a result of time_lra.py.
    seconds: of the run.
    origin: device, commit and versions of it.
  """

  name: str
  rows: list[Row]
  lines: list[Row]
  members: list[int]
  times: list[Row]
  seconds: float
  origin: Row


def read(
  folders: Sequence[pathlib.Path],
  names: Sequence[str],
  models: Sequence[str],
  times: str | None,
) -> list[Finished]:
  """Reads runs, and their times where a file has them.

  Raises:
    InputError: a run is not finished, or a file is damaged.
  """
  timed = input_files.read_json(times)["rows"] if times else []
  found = []
  for folder, name, model in zip(folders, names, models, strict=True):
    path, result = result_files.of_run(folder, "train_lra.py")
    with input_files.errors_at(path, wrong="is no result of train_lra.py"):
      rows = result["rows"]
      flags = json.loads((folder / "flags.json").read_text())
      rates, seeds = flags["learning_rates"], flags["seeds"]
      first = rates.index(rows[0]["learning_rate"]) * len(seeds)
      task = rows[0]["data"]
      found.append(
        Finished(
          name=name,
          rows=rows,
          lines=metrics.read_jsonl(folder / "metrics.jsonl"),
          members=list(range(first, first + len(seeds))),
          times=[
            row
            for row in timed
            if row["model"] == model and row["data"] == task
          ],
          seconds=result["seconds"],
          origin={key: result[key] for key in _ORIGIN},
        )
      )
  return found


def rows(runs: Sequence[Finished]) -> list[Row]:
  """A row a run: the mean of its seeds and a 95% interval by Student's t.

  With one seed the interval is that of the test's sampling.
  """
  return [_row(run) for run in runs]


def _row(run: Finished) -> Row:
  values = [row["value"] for row in run.rows]
  first, count = run.rows[0], len(values)
  found = intervals.of_mean(values)
  row = first | {"model": run.name, "value": found.value, "seeds": count}
  if count > 1:
    sd = intervals.spread(values)
    row |= {"low": found.low, "high": found.high, "sd": sd}
  row |= {"values": values, "valid_accuracy": statistics.mean(
    row["valid_accuracy"] for row in run.rows
  )}  # fmt: skip
  del row["seed"]
  for timed in run.times:
    row |= {
      key: timed[key] for key in ("multiplications", "operations", "length")
    }
    if timed["pass"] == "update":
      row["update_ms"] = timed["ms"]
    else:
      row[f"sample_ms_{timed['batch']}"] = timed["sample_ms"]
  return row


def origin(runs: Sequence[Finished]) -> Row:
  """Device, commit and versions, where all runs have the same."""
  same = [run.origin == runs[0].origin for run in runs]
  return dict(runs[0].origin) if all(same) else {}
