import json
import time

import pytest

from research.results.recording import Record


def test_rows_are_written_as_they_come(tmp_path, capsys):
  path, seen = tmp_path / "a" / "result.json", []
  record = Record(str(path), time.perf_counter())

  def made():
    record.say("a table")
    yield {"ms": 1.0}
    seen.append(json.loads(path.read_text()))
    record.note("a peer is left out")
    yield {"ms": 2.0}

  rows = record.rows(made())
  found = json.loads(path.read_text())
  assert rows == found["rows"] == [{"ms": 1.0}, {"ms": 2.0}]
  assert seen[0]["rows"] == rows[:1] and seen[0]["left_out"] == []
  assert (seen[0]["complete"], found["complete"]) == (False, True)
  assert found["left_out"] == ["a peer is left out"]
  assert capsys.readouterr().out == "a table\na peer is left out\n"


def test_a_run_that_fails_leaves_what_it_found(tmp_path):
  path = tmp_path / "result.json"

  def made():
    yield {"ms": 1.0}
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    Record(str(path), time.perf_counter()).rows(made())
  assert json.loads(path.read_text())["complete"] is False


def test_rows_of_work_in_no_order_take_the_place_of_those_before(tmp_path):
  path = tmp_path / "result.json"
  record = Record(str(path), time.perf_counter())
  record.keep([{"ms": 2.0}], complete=False)
  assert json.loads(path.read_text())["complete"] is False
  record.keep([{"ms": 1.0}, {"ms": 2.0}], complete=True)
  found = json.loads(path.read_text())
  assert found["rows"] == [{"ms": 1.0}, {"ms": 2.0}] and found["complete"]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert Record(None, time.perf_counter()).rows([{"a": 1}]) == [{"a": 1}]
  assert list(tmp_path.iterdir()) == []
