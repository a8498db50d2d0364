"""Where answers are wrong: by words of a row's group, and at zero.

Axis letter: M rows.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from models.errors import InputError
from research.predictors import measures, reading

Row = dict[str, Any]
ALL, ZERO = "all", "truth is 0"
# Parts with fewer rows are left out.
_FEW = 20


def read(path: pathlib.Path) -> list[Row]:
  """The lines that `evaluate.write_answers` wrote; .gz and .xz are unpacked.

  Raises:
    InputError: the file is no such file.
  """
  found = []
  for number, line in enumerate(reading.read_lines(path), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      # Every line has the targets of the first one.
      targets = {*(found[0] if found else row)} - {"row", "group"}
      if not targets or not isinstance(row["group"], str):
        raise ValueError
      for target in targets:
        for value in (row[target]["truth"], row[target]["median"]):
          if not math.isfinite(0 if value is None else float(value)):
            raise ValueError
    except (
      ValueError, LookupError, TypeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
      raise InputError(
        f"{path} line {number}: is no answer of eval_rlm.py --answers"
      ) from error
    found.append(row)
  if not found:
    raise InputError(f"{path}: has no answers")
  return found


def analyse(answers: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Errors of each target, of all rows and of parts of them.

  A part is the rows whose group has a word, such as an operator of a program. A
  row of the result has the median factor between answer and truth in bits,
  |log2|, the share that is wrong by more than 2, and the share of the sum of
  squared differences of ranks, which is what Spearman's correlation lacks to 1.
  Parts overlap. The largest shares come first.

  Args:
    answers: of `read`.
  """
  found = []
  for target in [key for key in answers[0] if key not in ("row", "group")]:
    known = [a for a in answers if a[target]["truth"] is not None]
    truth = np.array([a[target]["truth"] for a in known], float)
    said = np.array([a[target]["median"] for a in known], float)  # None: NaN
    said = measures.without_gaps(said)
    ranks = (stats.rankdata(said) - stats.rankdata(truth)) ** 2
    bits = np.abs(np.log2(np.maximum(said, 1) / np.maximum(truth, 1)))
    groups = [set(a["group"].split()) for a in known]
    parts = {ALL: np.ones(len(known), bool), ZERO: truth == 0}
    for word in sorted(set().union(*groups)):
      parts[word] = np.array([word in group for group in groups])
    lines = [
      {
        "target": target,
        "part": part,
        "tests": int(mask.sum()),
        "median_bits": float(np.median(bits[mask])),
        "beyond_2x": float(np.mean(bits[mask] > 1)),
        "share_of_rank_error": float(ranks[mask].sum() / max(ranks.sum(), 1)),
      }
      for part, mask in parts.items()
      if mask.sum() >= (_FEW if part != ALL else 1)
    ]
    found += sorted(lines, key=lambda line: -line["share_of_rank_error"])
  return found
