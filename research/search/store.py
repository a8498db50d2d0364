"""Values that are kept in a file, so that no point is evaluated twice.

A search is a function of its seed and the values; one that was interrupted is
started again with the same store, and gets the values of before at once.
Searches by other methods or seeds may share it.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from models import input_files
from models.errors import InputError
from research.core import files
from research.search.running import Evaluate
from research.search.space import Genome


def kept(
  evaluate: Evaluate,
  path: str | os.PathLike[str],
  belongs_to: Any,
  batch: int = 1,
) -> Evaluate:
  """An evaluation that remembers, line by line, what it has evaluated.

  Args:
    evaluate: (N genomes) -> (N, M) values.
    path: of a file of JSON lines, which is made; a line that a kill cut in two
      is dropped.
    belongs_to: all that decides the values, as `files.digest` takes it.
    batch: points that are evaluated before their values are written.

  Raises:
    InputError: the file is damaged, or belongs to something else.
  """
  path, owner = pathlib.Path(path), files.digest(belongs_to)
  known = _read(path, owner)

  def remembered(genomes: list[Genome]) -> np.ndarray:
    new = [one for one in genomes if one not in known]
    for at in range(0, len(new), batch):
      part = new[at : at + batch]
      values = np.asarray(evaluate(part), np.float64)
      values = values.reshape(len(part), -1)
      _append(path, zip(part, values.tolist()))
      known.update(zip(part, values.tolist()))
    return np.asarray([known[one] for one in genomes])

  return remembered


def _append(path, found) -> None:
  lines = [
    json.dumps({"genome": one, "values": [_plain(v) for v in values]})
    for one, values in found
  ]
  with path.open("a", encoding="utf-8") as stream:
    stream.write("".join(f"{line}\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def _plain(value: float) -> float | None:
  """JSON has no infinity."""
  return value if np.isfinite(value) else None


def _read(path: pathlib.Path, owner: str) -> dict[Genome, Sequence[float]]:
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps({"belongs_to": owner}) + "\n")
    return {}
  whole, _, cut = path.read_bytes().rpartition(b"\n")
  if cut:
    files.write_bytes(path, whole + b"\n")
  advice = "remove it, and its points are evaluated again"
  with input_files.errors_at(path, advice):
    first, *lines = [json.loads(line) for line in whole.splitlines()]
    found = {
      tuple(line["genome"]): [
        np.inf if v is None else v for v in line["values"]
      ]  # fmt: skip
      for line in lines
    }
    made_for = first["belongs_to"]
  if made_for != owner:
    raise InputError(
      f"{path}: was made for another space or evaluation: {advice}"
    )
  return found
