import dataclasses
import json
import os
import shutil
import signal
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX import proto

from models.errors import InputError
from research.core import loop, metrics
from research.core.options import RunOptions
from tests.research.core import toy


def _lines(workdir):
  """Lines of metrics.jsonl as text, apart from timing."""
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  return [json.dumps(metrics.without_timing(row)) for row in rows]


def _assert_same_state(a, b):
  a, b = (
    dataclasses.replace(s, key=jax.random.key_data(s.key)) for s in (a, b)
  )
  chex.assert_trees_all_equal(a, b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  return workdir, toy.train(workdir)


def test_a_run_learns_and_writes_its_workdir(undisturbed):
  workdir, last = undisturbed
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(12))
  assert rows[-1]["loss"] < rows[0]["loss"] / 2
  assert all(row["step_seconds"] > 0 for row in rows)
  assert len(rows[0]["noise"]) == 4
  assert last.step == 12
  assert json.loads((workdir / "flags.json").read_text()) == toy.CONFIG
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {
    "4",
    "8",
    "12",
  }
  assert any((workdir / "tensorboard").iterdir())


def test_killed_and_resumed_equals_undisturbed(tmp_path, undisturbed):
  def dies_at_7(step):
    if step == 7:
      raise ConnectionError("lost")
    return toy.batch_at(step)

  with pytest.raises(ConnectionError, match="lost"):
    toy.train(tmp_path, batches=dies_at_7)
  cut = _lines(tmp_path)
  assert 4 < len(cut) < 12
  last = toy.train(tmp_path)
  assert _lines(tmp_path) == _lines(undisturbed[0])
  _assert_same_state(last, undisturbed[1])


def test_killed_before_the_first_checkpoint(tmp_path, undisturbed):
  def dies_at_2(step):
    if step == 2:
      raise ConnectionError("lost")
    return toy.batch_at(step)

  with pytest.raises(ConnectionError):
    toy.train(tmp_path, batches=dies_at_2)
  _assert_same_state(toy.train(tmp_path), undisturbed[1])
  assert _lines(tmp_path) == _lines(undisturbed[0])


def test_a_corrupt_newest_checkpoint_costs_only_time(
  tmp_path, undisturbed, capsys
):
  toy.train(tmp_path)
  newest = tmp_path / "checkpoints" / "12"
  for file in newest.rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  _assert_same_state(toy.train(tmp_path), undisturbed[1])
  assert _lines(tmp_path) == _lines(undisturbed[0])
  told = capsys.readouterr().err
  assert told.count("\n") == 1 and str(newest) in told


def test_a_finished_run_is_returned_as_it_is(tmp_path, undisturbed):
  toy.train(tmp_path)
  before = (tmp_path / "metrics.jsonl").read_bytes()

  def never(step):
    raise AssertionError(f"batch {step} asked")

  _assert_same_state(toy.train(tmp_path, batches=never), undisturbed[1])
  assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
  "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_signals_save_and_leave(tmp_path, undisturbed, number, code):
  before = signal.getsignal(number)

  def batches(step):
    if step == 6:
      os.kill(os.getpid(), number)
    return toy.batch_at(step)

  with pytest.raises(loop.Interrupted, match="the same command goes on") as e:
    toy.train(tmp_path, batches=batches)
  assert e.value.exit_code == code
  assert "\n" not in str(e.value)
  assert signal.getsignal(number) is before
  newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert newest in (6, 7)
  assert len(_lines(tmp_path)) == newest
  _assert_same_state(toy.train(tmp_path), undisturbed[1])
  assert _lines(tmp_path) == _lines(undisturbed[0])


def test_lines_are_on_the_disk_before_the_checkpoint_behind_them(
  tmp_path, monkeypatch
):
  calls = []
  sync, save = metrics.sync, loop.Checkpointer.save

  def synced(workdir):
    calls.append(("lines", len(_lines(workdir))))
    sync(workdir)

  def saved(self, step, state):
    calls.append(("checkpoint", step))
    save(self, step, state)

  monkeypatch.setattr(metrics, "sync", synced)
  monkeypatch.setattr(loop.Checkpointer, "save", saved)
  toy.train(tmp_path)
  assert calls == [
    (what, step) for step in (4, 8, 12) for what in ("lines", "checkpoint")
  ]


def test_a_signal_in_the_last_update_is_kept(tmp_path, undisturbed):
  def batches(step):
    if step == 11:
      os.kill(os.getpid(), signal.SIGTERM)
    return toy.batch_at(step)

  with pytest.raises(loop.Interrupted, match="after step 1[12] of 12") as e:
    toy.train(tmp_path, batches=batches)
  assert e.value.exit_code == 143
  _assert_same_state(toy.train(tmp_path), undisturbed[1])


def test_a_signal_while_the_last_checkpoint_is_saved_is_kept(
  tmp_path, monkeypatch
):
  save = loop.Checkpointer.save

  def save_and_signal(self, step, state):
    save(self, step, state)
    if step == 12:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(loop.Checkpointer, "save", save_and_signal)
  with pytest.raises(loop.Interrupted, match="step 12 of 12") as error:
    toy.train(tmp_path)
  assert error.value.exit_code == 130


@pytest.mark.parametrize(
  "change, words",
  [
    ({"learning_rate": 0.1}, "--learning_rate is 0.1 but .* with 0.05"),
    ({"more": 1}, "--more is 1 but .* with None"),
  ],
)
def test_other_flags_are_refused(tmp_path, change, words):
  toy.train(tmp_path, num_steps=1)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(InputError, match=words + ".*another --workdir"):
    toy.train(tmp_path, flags=toy.CONFIG | change)
  after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  assert after == before


def test_workdirs_of_others_are_refused(tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(InputError, match="--workdir .*file"):
    toy.train(tmp_path / "file")
  (tmp_path / "metrics.jsonl").write_text("mine")
  with pytest.raises(InputError, match="no flags.json"):
    toy.train(tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == "mine"
  (tmp_path / "w").mkdir()
  (tmp_path / "w" / "flags.json").write_text("{")
  with pytest.raises(InputError, match="flags.json: is damaged"):
    toy.train(tmp_path / "w")


def test_a_bad_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
  def batches(step):
    batch = toy.batch_at(step)
    return batch | {"y": batch["y"] * (np.nan if step == 7 else 1)}

  words = "loss is nan at step 7.*checkpoint of step 4 is kept"
  with pytest.raises(loop.Diverged, match=words) as error:
    toy.train(tmp_path, batches=batches)
  assert error.value.exit_code == 1
  assert "\n" not in str(error.value)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
  rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert rows[-1]["step"] == 7 and rows[-1]["loss"] is None


def test_checkpoints_of_another_run_are_found_out(tmp_path):
  toy.train(tmp_path / "a", num_steps=4)
  toy.train(tmp_path / "b", num_steps=4, flags=toy.CONFIG | {"seed": 4})
  shutil.rmtree(tmp_path / "b/checkpoints")
  shutil.copytree(tmp_path / "a/checkpoints", tmp_path / "b/checkpoints")
  with pytest.raises(InputError, match=r"4: is of a run with other flags"):
    toy.train(tmp_path / "b", flags=toy.CONFIG | {"seed": 4})


def test_bad_parameters_are_never_saved(tmp_path):
  tx, first = toy.initial_state()
  step = toy.make_step(tx, 1)

  def breaks_at_4(state, batch, frozen):
    state, numbers = step(state, batch, frozen)
    if state.step == 4:
      bad = state.params | {"b": jnp.float32(jnp.inf)}
      state = dataclasses.replace(state, params=bad)
    return state, numbers

  words = "a parameter is not finite.*there is no checkpoint yet"
  with pytest.raises(loop.Diverged, match=words):
    loop.run(
      breaks_at_4,
      first,
      toy.batch_at,
      RunOptions(workdir=tmp_path, checkpoint_every=4, progress=False),
      num_steps=12,
    )
  assert not (tmp_path / "checkpoints").exists()


def test_hooks_and_checkpoints_are_no_time_of_steps(tmp_path):
  def slow(state):
    time.sleep(0.5)
    return {"seen": int(state.step)}

  toy.train(tmp_path / "first", num_steps=1)
  began = time.perf_counter()
  toy.train(
    tmp_path / "second",
    hooks=[loop.Hook(slow, 3)],
    checkpoint_every=1,
    timing=lambda seconds: {"rate_per_second": 1 / seconds},
  )
  whole = time.perf_counter() - began
  rows = metrics.read_jsonl(tmp_path / "second" / "metrics.jsonl")
  assert [row["step"] for row in rows if "seen" in row] == [2, 5, 8, 11]
  assert sum(row["step_seconds"] for row in rows) < whole - 4 * 0.5
  for row in rows:
    assert row["rate_per_second"] == pytest.approx(1 / row["step_seconds"])
  assert metrics.without_timing(rows[0]).keys() == {
    "step",
    "loss",
    "average",
    "noise",
  }


def test_lines_come_at_log_steps_hooks_and_the_end(tmp_path):
  seen = []

  def evaluate(state):
    seen.append(int(state.step))
    return {"valid_loss": jnp.sum(state.params["w"])}

  toy.train(tmp_path, log_every=5, hooks=[loop.Hook(evaluate, every=4)])
  rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
  assert seen == [4, 8, 12]
  assert [row["step"] for row in rows] == [0, 3, 5, 7, 10, 11]
  assert [row["step"] for row in rows if "valid_loss" in row] == [3, 7, 11]


def test_the_state_given_stays_valid_and_frozen_arrays_are_used(tmp_path):
  tx, first = toy.initial_state()
  shared = dataclasses.replace(first, extras={"average": first.params["b"]})
  last = loop.run(
    toy.make_step(tx, 1),
    shared,
    toy.batch_at,
    RunOptions(workdir=tmp_path, progress=False),
    num_steps=2,
    frozen={"scale": jnp.float32(0)},
  )
  assert last.extras["average"] == 0
  np.testing.assert_array_equal(shared.params["w"], np.zeros(4))


def test_a_state_that_is_made_for_the_run_is_not_copied(tmp_path):
  tx, first = toy.initial_state()
  donated = []

  def make():
    made = jax.tree.map(jnp.copy, first)
    donated.append(made.params["w"])
    return made

  options = RunOptions(workdir=tmp_path, progress=False)
  loop.run(toy.make_step(tx, 1), make, toy.batch_at, options, num_steps=1)
  assert len(donated) == 1 and donated[0].is_deleted()


def test_progress_goes_to_stderr(tmp_path, capsys):
  toy.train(tmp_path, progress=True)
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("train: 12/12  loss ")


def test_tensorboard_hides_what_is_written_again(tmp_path):
  def dies_at_7(step):
    if step == 7:
      raise ConnectionError
    return toy.batch_at(step)

  with pytest.raises(ConnectionError):
    toy.train(tmp_path, batches=dies_at_7)
  toy.train(tmp_path)
  starts = []
  for file in sorted((tmp_path / "tensorboard").iterdir()):
    for event in _events(file.read_bytes()):
      if event.HasField("session_log"):
        starts.append(event.step)
  assert sorted(starts) == [0, 4]


def _events(data):
  """Records of an event file: length, its checksum, bytes, their checksum."""
  while data:
    length = int.from_bytes(data[:8], "little")
    yield proto.event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]
