"""Where answers are wrong."""

import json

import pytest

from models.errors import InputError
from research.regression_lm import error_analysis


@pytest.fixture
def answers(tmp_path):
  """A hundred answers that are right but for those of one operator."""
  path = tmp_path / "answers.jsonl"
  lines = []
  for i in range(100):
    wrong = i % 4 == 0
    truth = 0.0 if i == 1 else 2.0**i
    said = None if i == 2 else truth * (2.0**30 if wrong else 1)
    lines.append(
      {
        "row": i,
        "group": "sort add" if wrong else "add",
        "flops": {"truth": truth, "median": said, "low": said, "high": said},
        "bytes": {"truth": None if i else 1.0, "median": 1.0},
      }
    )
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_the_part_with_the_errors_has_the_rank_error(answers):
  rows = error_analysis.analyse(error_analysis.read(answers))
  by = {(row["target"], row["part"]): row for row in rows}
  assert by["flops", "all"]["tests"] == by["flops", "add"]["tests"] == 100
  assert by["flops", "sort"]["tests"] == 25
  assert by["flops", "sort"]["median_bits"] == 30
  assert by["flops", "sort"]["beyond_2x"] == 1
  assert 0.5 < by["flops", "sort"]["share_of_rank_error"] < 1
  assert by["flops", "all"]["share_of_rank_error"] == pytest.approx(1)
  assert ("flops", "truth is 0") not in by  # one row only
  assert by["bytes", "all"]["tests"] == 1
  assert by["bytes", "all"]["share_of_rank_error"] == 0


@pytest.mark.parametrize(
  "text",
  ["", "no json\n", '{"row": 1, "group": "a"}\n', '{"row": 1, "x": 2}\n',
   '{"group": "a", "x": {"truth": "high", "median": 1}}\n',
   '{"group": "a", "x": {"truth": [], "median": 1}}\n',
   '{"group": "a", "x": {"truth": 1, "median": Infinity}}\n',
   '{"group": "a", "x": {"truth": 1, "median": 1}}\n'
   '{"group": "a", "y": {"truth": 1, "median": 1}}\n'],
)  # fmt: skip
def test_other_files_are_one_line(tmp_path, text):
  path = tmp_path / "x.jsonl"
  path.write_text(text)
  with pytest.raises(InputError, match="answers|no answer"):
    error_analysis.read(path)
