"""Measured programs as a data set: no duplicates, three splits, one file."""

import gzip
import hashlib
import json
import lzma
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.core import files

Row = Mapping[str, Any]
# Texts of a row.
VIEWS = ("source", "typed", "jaxpr", "stablehlo")
# Programs with one of these are the test of the split "operators": no other
# operator writes what they write.
HELD_OUT = ("conv1d", "conv2d", "top_k", "while_loop")
TRAIN, VALID, TEST = PARTS = ("train", "valid", "test")
SPLITS = ("random", "operators", "sizes")
# Shares of the random test, of validation, and of the largest programs.
_TEST, _VALID, _LARGEST = 0.1, 0.1, 0.15


def column(split: str) -> str:
  """The column with a row's part of a split."""
  return f"split_{split}"


def without_duplicates(rows: Sequence[Row]) -> list[Row]:
  """The first row of each hash of compiled HLO, and of each source."""
  seen: set[str] = set()
  kept = []
  for row in rows:
    if row["hash"] not in seen and row["source"] not in seen:
      kept.append(row)
    seen |= {row["hash"], row["source"]}
  return kept


def total_bytes(row: Row) -> int:
  """What "sizes" goes by: bytes of all arguments and results."""
  return row["argument_bytes"] + row["output_bytes"]


def largest_of_training(rows: Sequence[Row]) -> int:
  """Bytes above which a program is in the test of "sizes"."""
  sizes = sorted(total_bytes(row) for row in rows)
  return sizes[max(int((1 - _LARGEST) * len(sizes)) - 1, 0)]


def with_splits(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Rows with a column for each of `SPLITS`, which says their part.

  "random" takes a tenth for the test; "operators" the programs that use one of
  `HELD_OUT`; "sizes" the largest 15%. A tenth of the others is for validation.
  What is random follows from a program's source alone, so that more programs
  leave it as it is.
  """
  limit = largest_of_training(rows) if rows else 0
  found = []
  for row in rows:
    is_test = {
      "random": _share("random test", row) < _TEST,
      "operators": bool({*HELD_OUT} & {*row["operators"].split()}),
      "sizes": total_bytes(row) > limit,
    }
    parts = {}
    for split in SPLITS:
      is_valid = _share(f"{split} valid", row) < _VALID
      parts[column(split)] = (
        TEST if is_test[split] else VALID if is_valid else TRAIN
      )
    found.append({**row, **parts})
  return found


def _share(purpose: str, row: Row) -> float:
  """A number in [0, 1) that follows from the source."""
  digest = hashlib.sha256(f"{purpose}\n{row['source']}".encode()).digest()
  return int.from_bytes(digest[:6]) / 2**48


def in_share(row: Row, purpose: str, share: float) -> bool:
  """Whether a row is in a share of all that its source alone decides."""
  return _share(purpose, row) < share


_OPENERS: dict[str, Callable] = {
  ".xz": lambda draft: lzma.open(draft, "wt", encoding="utf-8"),
  ".gz": lambda draft: gzip.open(draft, "wt", encoding="utf-8"),
  ".jsonl": lambda draft: open(draft, "w", encoding="utf-8"),
}


def check_name(path: pathlib.Path) -> None:
  """Raises InputError where a file is not named as one that is written."""
  if path.suffix not in _OPENERS:
    raise InputError(
      f"{path}: is not named .jsonl, .jsonl.gz or .jsonl.xz: rename it"
    )


def check_views(names: Sequence[str]) -> None:
  """Raises InputError where a text is none of `VIEWS`."""
  for name in names:
    if name not in VIEWS:
      raise InputError(f"--views={name}: take some of {', '.join(VIEWS)}")


def with_views(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
  """Rows with these of `VIEWS` alone."""
  dropped = {*VIEWS} - {*names}
  return [{k: v for k, v in row.items() if k not in dropped} for row in rows]


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes a row a line, packed as the name says, whole or not at all.

  Raises:
    InputError: the name is of no kind that is known.
  """
  check_name(path)
  with files.whole(path) as draft, _OPENERS[path.suffix](draft) as file:
    for row in rows:
      file.write(json.dumps(row, separators=(",", ":")) + "\n")


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
  """Rank correlation; None of fewer than three or of equal numbers."""
  from scipy import stats

  if len(left) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
    return None
  return float(stats.spearmanr(left, right)[0])


def summary(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
  """What every number is like: a line a number.

  A line has percentiles, and rank correlations with latency and with the
  length of the source: what a model gets for nothing.

  Args:
    rows: of the data set.
    names: of the numbers.
  """
  lengths = [len(row["source"]) for row in rows]
  latency = [row["latency_us"] for row in rows]
  found = []
  for name in names:
    values = [row[name] for row in rows]
    line: dict[str, Any] = {"number": name}
    for q in (0, 5, 25, 50, 75, 95, 100):
      line[f"p{q}"] = float(np.percentile(values, q)) if values else None
    line["spearman_latency"] = spearman(values, latency)
    line["spearman_source_length"] = spearman(values, lengths)
    found.append(line)
  return found


def ceilings(rows: Sequence[Row]) -> dict[str, Any]:
  """Rank correlations of two runs: no predictor has reason to be above them.

  "again" compares the two runs of one process, by split of the test too;
  "process" a share of the programs with another process that compiled anew.
  """
  pairs = lambda part, name: spearman(
    [row["latency_us"] for row in part], [row[name] for row in part]
  )
  found = {"again": pairs(rows, "latency_again_us")}
  for split in SPLITS:
    test = [row for row in rows if row[column(split)] == TEST]
    found[f"again, test of {split}"] = pairs(test, "latency_again_us")
  twice = [row for row in rows if row.get("latency_process_us") is not None]
  return found | {
    "process": pairs(twice, "latency_process_us"),
    "process_programs": len(twice),
  }
