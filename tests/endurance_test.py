"""What `tests.endurance` takes for a fault; tests of scripts kill real runs."""

import random

import pytest

from tests import endurance, endurance_runs


def test_a_run_that_ended_otherwise_is_seen(tmp_path):
  runs = endurance_runs.Runs.__new__(endurance_runs.Runs)
  last = tmp_path / "checkpoints" / "12"
  last.mkdir(parents=True)
  (tmp_path / "checkpoints" / "8").mkdir()
  (last / "manifest.json").write_text('{"content": "abc"}')
  log = tmp_path / "metrics.jsonl"
  log.write_text('{"step": 0, "loss": 1.5, "step_seconds": 2.0}\n')
  (tmp_path / "a.npz").write_bytes(b"123")
  (tmp_path / "report.md").write_text("2 seconds")
  runs.expected = runs.ends(tmp_path)
  assert sorted(runs.expected) == ["a.npz", "checkpoints", "metrics.jsonl"]
  log.write_text('{"step": 0, "loss": 1.5, "step_seconds": 3.0}\n')
  (tmp_path / "report.md").write_text("3 seconds")
  (tmp_path / "checkpoints" / "8.unusable").mkdir()
  assert runs.differs(tmp_path) == []
  log.write_text('{"step": 0, "loss": 1.25, "step_seconds": 3.0}\n')
  (last / "manifest.json").write_text('{"content": "abd"}')
  (tmp_path / "b.npz").write_bytes(b"123")
  assert runs.differs(tmp_path) == ["b.npz", "checkpoints", "metrics.jsonl"]
  # Of what a run was to end with nothing is enough.
  assert runs.differs(tmp_path / "none") == sorted(runs.expected)


class _Fake:
  """Runs whose every start ends as a script says."""

  def __init__(self, home, stops, codes):
    self.home, self._stops, self._codes = home, iter(stops), iter(codes)

  def stop(self, workdir, number, draw):
    return next(self._stops)

  def run(self, workdir, front=None):
    return next(self._codes)

  def differs(self, workdir):
    return []


def test_kills_count_ends_and_faults(tmp_path):
  killed, ended = (-9, "", 1), (0, "", 1)
  for place in range(2):
    (tmp_path / f"kills_{place}").mkdir()
  runs = _Fake(tmp_path, [killed, ended, killed], [(0, "")])
  row = endurance.kills(runs, 3, random.Random(0))
  assert (row["times"], row["ends"], row["faults"]) == (3, 2, 0)
  runs = _Fake(tmp_path, [killed, (1, "Traceback", 1)], [(1, "again")])
  row = endurance.kills(runs, 2, random.Random(0))
  assert row["first_faults"] == ["exit 1: Traceback", "exit 1: again"]


def test_what_is_told_of_damage_is_mended_and_no_fault(tmp_path, monkeypatch):
  mended = []
  monkeypatch.setattr(
    endurance, "damage", lambda workdir, draw: lambda: mended.append(workdir)
  )
  (tmp_path / "half_written_0").mkdir()
  killed, told = (-9, "", 1), (2, "error: it is damaged\n", 1)
  # A run may be killed again before it reads what is damaged.
  runs = _Fake(tmp_path, [killed, killed, told, killed], [told[:2], (0, "")])
  row = endurance.half_written(runs, 4, random.Random(0))
  assert (row["told"], row["faults"], len(mended)) == (2, 0, 2), row
  runs = _Fake(tmp_path, [killed, (2, "Traceback\nx", 1)], [(0, ""), (0, "")])
  (tmp_path / "half_written_0").mkdir()
  assert endurance.half_written(runs, 2, random.Random(0))["faults"] == 1


@pytest.mark.parametrize(
  "done, newest, faults", [(7, 7, 0), (7, 4, 1), (12, 12, 1)]
)
def test_sigterm_must_save_what_was_done(
  tmp_path, monkeypatch, done, newest, faults
):
  workdir = tmp_path / "sigterm_0"
  (workdir / "checkpoints" / str(newest)).mkdir(parents=True)
  lines = [f'{{"step": {step}}}\n' for step in range(done)]
  (workdir / "metrics.jsonl").write_text("".join(lines))
  # Six lines when the signal was sent; none before the start.
  counts = iter([0, done])
  monkeypatch.setattr(endurance_runs, "lines", lambda folder: next(counts))
  runs = _Fake(tmp_path, [(143, "the same command goes on", 6)], [(0, "")])
  row = endurance.sigterm(runs, 1, random.Random(0))
  assert (row["saved"], row["faults"]) == (1, faults), row


@pytest.mark.parametrize(
  "err, one",
  [
    ("error: x is damaged\n", True),
    ("train: 5/60  loss 1.2  00:01 left\nerror: x\n", True),
    ("train: 5/60  00:01 left\n\nwarning: x is kept\nerror: x\n", True),
    ("", False),
    ("train: 5/60  00:01 left\n", False),
    ("error: x\nerror: y\n", False),
    ("error: x\ntrain: 5/60  00:01 left\n", False),
    ("W1130 12:00:00 a.py:1] careful\nerror: x\n", False),
    ("Traceback (most recent call last):\n  a\nOSError: x\n", False),
    ("OSError: x\n", False),
  ],
)
def test_one_line_is_one(err, one):
  assert endurance_runs.is_one_line(err) is one


@pytest.mark.parametrize(
  "says, faults",
  [
    ("/x/full_0/run: no space is left: make room", 0),
    ("/x/full_0/run/a: No space left on device", 0),
    ("/x/full_0/run: is damaged", 2),
  ],
)
def test_a_full_disk_is_told(tmp_path, monkeypatch, says, faults):
  (tmp_path / "undisturbed").mkdir()
  monkeypatch.setattr(endurance, "_mount", lambda disk, options: None)
  monkeypatch.setattr(endurance.subprocess, "run", lambda *a, **k: None)
  monkeypatch.setattr(endurance, "_finish", lambda runs, workdir: [])
  runs = _Fake(tmp_path, [], 2 * [(2, f"error: {says}\n")])
  row = endurance.disk_full(runs, 1, random.Random(0))
  assert (row["refused"], row["faults"]) == (2, faults), row


def test_damage_can_be_mended(tmp_path):
  state = tmp_path / "run" / "checkpoints" / "4" / "state"
  state.mkdir(parents=True)
  (state / "a").write_bytes(b"0123456789")
  log = tmp_path / "run" / "metrics.jsonl"
  log.write_text('{"step": 3}\n{"step": 4}\n')
  files = [state / "a", log]
  before = [path.read_bytes() for path in files]
  seen = set()
  for seed in range(12):
    mend = endurance.damage(tmp_path / "run", random.Random(seed))
    now = [path.read_bytes() for path in files]
    changed = [i for i in range(2) if now[i] != before[i]]
    assert len(changed) <= 1
    seen |= set(changed)
    # A log keeps its whole lines.
    assert now[1].startswith(b'{"step": 3}\n')
    mend()
    assert [path.read_bytes() for path in files] == before
  assert seen == {0, 1}
  # What a checkpoint stands behind, no crash takes.
  log.write_text('{"step": 2}\n{"step": 3}\n')
  for seed in range(12):
    endurance.damage(tmp_path / "run", random.Random(seed))
    assert log.read_text() == '{"step": 2}\n{"step": 3}\n'
    (state / "a").write_bytes(b"0123456789")
  assert endurance.damage(tmp_path / "none", random.Random(0)) is None


def test_a_safetensors_file_is_the_same_in_any_order_of_its_header():
  def file(header):
    return len(header).to_bytes(8, "little") + header + b"numbers"

  one = endurance_runs._tensors(file(b'{"a": 1, "b": 2}'))
  assert one == endurance_runs._tensors(file(b'{"b": 2, "a": 1}'))
  assert one != endurance_runs._tensors(file(b'{"b": 2, "a": 3}'))
