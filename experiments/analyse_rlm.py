"""Tells where a regression language model is wrong.

  python experiments/eval_rlm.py --model=runs/rlm/model --path=runs.csv \
    --answers=answers.jsonl
  python experiments/analyse_rlm.py --answers=answers.jsonl

For every target, by words of the rows' groups (for programs, their operators):
how far answers are off, and which part of the rank error is theirs. Seconds.
"""

import pathlib
import time

from absl import flags

import cli
from models.errors import InputError

_ANSWERS = flags.DEFINE_string("answers", None, "file of eval_rlm.py --answers")
_SHOWN = cli.integer("shown", 8, "parts of each target that are printed", 1)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write, all parts")


def main(_) -> None:
  """Analyses; see the module's docstring."""
  began = time.perf_counter()
  if not _ANSWERS.value:
    raise InputError("--answers: give the file that eval_rlm.py wrote")
  cli.check_path(_ANSWERS.value)
  from research.regression_lm import error_analysis

  answers = error_analysis.read(pathlib.Path(_ANSWERS.value))
  rows = error_analysis.analyse(answers)
  shown: dict[str, list] = {}
  for row in rows:
    shown.setdefault(row["target"], []).append(row)
  lines = [row for part in shown.values() for row in part[: _SHOWN.value]]
  cli.show(lines)
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
