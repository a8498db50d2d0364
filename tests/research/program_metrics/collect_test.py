import multiprocessing
import os
import time

import pytest

from models.errors import InputError
from research.program_metrics import collect, dataset, grammar, measure, worker
from research.program_metrics.collect import CHUNK, Plan

TIMING = measure.Timing(repeats=2, burst=1e-5)
# The cheapest to compile of the first two chunks.
ONLY = (2, 4, CHUNK + 2)


def plan(**more):
  return Plan(
    **{"seed": 0, "count": 32, "workers": 1, "timing": TIMING, "only": ONLY}
    | more
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("collect") / "programs"


@pytest.fixture(scope="module")
def rows(folder):
  return collect.collect(plan(), folder)


def test_rows_have_texts_numbers_and_the_machine(rows):
  assert [row["index"] for row in rows] == [*ONLY]
  for row in rows:
    assert row["source"] == grammar.program(0, row["index"]).source
    for view in dataset.VIEWS:
      assert row[view]
    for name in (*measure.COUNTS, "latency_us", "latency_again_us"):
      assert row[name] >= 0
    assert row["latency_us"] > 0 and row["backend"] == "cpu"
    assert row["jax"] and row["jaxlib"] and row["device"]
    assert row["xla_flags"] == os.environ.get("XLA_FLAGS", "")


def test_what_is_done_is_read_and_the_rest_is_measured(folder, rows):
  first, second = sorted(folder.glob("0*.json"))
  before = first.stat().st_mtime_ns
  second.unlink()
  again = collect.collect(plan(), folder)
  assert first.stat().st_mtime_ns == before and second.exists()
  assert again[:2] == rows[:2]
  assert again[2]["hash"] == rows[2]["hash"]
  assert again[2]["latency_us"] != rows[2]["latency_us"]


def test_what_takes_too_long_is_left_out_with_its_reason(tmp_path):
  found = collect.collect(plan(limit=1e-3, only=(2,)), tmp_path / "a")
  assert found == [{"index": 2, "failure": "took more than 0.001 s"}]


def test_where_time_runs_out_the_set_is_what_was_begun(tmp_path, monkeypatch):
  monkeypatch.setattr(collect, "_Process", Fake)
  over = plan(count=48, only=None, seconds=0.0)
  first = [{"index": i} for i in range(CHUNK)]
  collect.collect(plan(count=CHUNK, only=None), tmp_path)
  assert collect.collect(over, tmp_path) == first
  # A chunk behind one that is missing does not count.
  (tmp_path / "000002.json").write_text('[{"index": 32}]')
  assert collect.collect(over, tmp_path) == first
  rest = collect.collect(plan(count=48, only=None), tmp_path)
  assert [row["index"] for row in rest] == list(range(33))


class Fake:
  """A worker that dies at once, at a program, or does what it is told."""

  fates: list[str] = []

  def __init__(self, plan, core):
    self.core, self.since = core, time.monotonic()
    self.is_ready, self.chunk, self.failed = False, [], []
    self.program = None
    self.pipe, self._other = multiprocessing.Pipe()
    self._fate = self.fates.pop(0) if self.fates else "lives"
    if self._fate == "dies at once":
      self._other.close()
    else:
      self._other.send((worker.HEADER, {"backend": "cpu"}))

  def give(self, chunk, failed):
    self.chunk, self.failed = chunk, failed
    left = [i for i in chunk if i not in {row["index"] for row in failed}]
    if self._fate == "dies":
      self._other.send((worker.BEGIN, left[0]))
      self._other.close()
    else:
      self._other.send((worker.DONE, [{"index": i} for i in left]))

  def stop(self):
    self.pipe.close()


def test_a_program_that_ends_its_process_is_left_out(tmp_path, monkeypatch):
  monkeypatch.setattr(collect, "_Process", Fake)
  monkeypatch.setattr(Fake, "fates", ["dies at once", "dies", "dies"])
  ended = [{"index": i, "failure": "the process ended"} for i in (2, 4)]
  found = collect.collect(plan(), tmp_path)
  assert found == [*ended, {"index": CHUNK + 2}]


def test_processes_that_never_start_are_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(collect, "_Process", Fake)
  monkeypatch.setattr(Fake, "fates", ["dies at once"] * 20)
  with pytest.raises(InputError, match="end before they measure anything"):
    collect.collect(plan(), tmp_path)


def test_chunks_do_not_change_with_the_count():
  chunks = plan(count=20, only=None).chunks()
  assert chunks == plan(count=100, only=None).chunks()[:2]
  assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK]
  assert plan().chunks() == [[2, 4], [CHUNK + 2]]


def test_mistakes_are_one_line(tmp_path):
  with pytest.raises(InputError, match="each needs its own"):
    collect.collect(plan(workers=len(os.sched_getaffinity(0)) + 1), tmp_path)
  (tmp_path / "000000.json").write_text("[{")
  (tmp_path / "000001.json").write_text("[]")
  with pytest.raises(InputError, match="000000.json: is damaged: remove it"):
    collect.collect(plan(), tmp_path)
