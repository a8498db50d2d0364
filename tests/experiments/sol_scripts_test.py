"""Training and evaluation scripts on the shipped model, as a user runs them."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from models.text import load_text
from research.core import metrics
from tests.experiments import scripts
from tests.experiments.processes import run, start

UPDATES = 20
TRAIN = [
  "experiments/train_sol.py",
  "--flagfile=experiments/flagfiles/sol_tiny.flags",
  "--windows=4",
  "--episodes=2",
  "--group_size=4",
  "--width=16",
  "--warm_windows=16",
  f"--updates={UPDATES}",
  "--damage_windows=8",
  "--calibration_windows=4",
  "--checkpoint_every=4",
]
EVAL = [
  "experiments/eval_sol.py",
  "--model=tiny",
  "--episodes=4",
  "--max_windows=3",
  "--calibration_windows=4",
  "--static_candidates=4",
  "--random_pool=2",
  "--asked=0.9,0.95",
  "--thresholds=surprise",
  # One schedule a call, as where memory is short: they share a program.
  "--max_rows=12",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Holds a short text, and the programs that runs compiled."""
  home = tmp_path_factory.mktemp("sol")
  (home / "text.txt").write_text(load_text("gutenberg:slice")[:12000])
  return home


def train_flags(home, workdir):
  return f"--text={home / 'text.txt'}", f"--workdir={workdir}"


def lines_of(workdir):
  path = workdir / "grpo" / "metrics.jsonl"
  return path.read_text().splitlines() if path.exists() else []


def stop(home, workdir, number, after):
  """Trains until GRPO has logged `after` updates, then sends a signal."""
  process = start(home, TRAIN, *train_flags(home, workdir))
  until = time.monotonic() + 300
  while len(lines_of(workdir)) < after and process.poll() is None:
    assert time.monotonic() < until
    time.sleep(0.002)
  process.send_signal(number)
  _, err = process.communicate(timeout=300)
  return process.returncode, err


@pytest.fixture(scope="module")
def undisturbed(home):
  workdir = home / "undisturbed"
  code, out, err = run(home, TRAIN, *train_flags(home, workdir))
  assert code == 0, err
  assert f"policy: {workdir / 'policy'}" in out
  assert "Traceback" not in err and "Warning" not in err
  return workdir


def assert_same(workdir, undisturbed):
  for stage in ("warm_start", "grpo"):
    one, other = (
      [
        metrics.without_timing(row)
        for row in metrics.read_jsonl(run / stage / "metrics.jsonl")
      ]
      for run in (workdir, undisturbed)
    )
    assert one == other and one
  for name in ("policy", "warm_policy"):
    for file in ("policy.safetensors", "policy.json"):
      one, other = (run / name / file for run in (workdir, undisturbed))
      assert one.read_bytes() == other.read_bytes(), (name, file)


def test_a_run_writes_its_workdir(undisturbed):
  assert len(lines_of(undisturbed)) == UPDATES
  rows = metrics.read_jsonl(undisturbed / "grpo" / "metrics.jsonl")
  assert {"loss", "cost", "log_p", "ratio_max", "entropy"} <= rows[0].keys()
  flags = json.loads((undisturbed / "grpo" / "flags.json").read_text())
  assert flags["preset"] == "S40" and flags["updates"] == UPDATES
  assert flags["model"] == "tiny"


def test_stopped_damaged_and_killed_it_ends_the_same(home, undisturbed):
  """Ctrl-C saves; when that is damaged, the checkpoint before it will do."""
  workdir = home / "disturbed"
  code, err = stop(home, workdir, signal.SIGINT, after=6)
  assert code == 130
  assert "the same command goes on" in err.splitlines()[-1]
  assert "Traceback" not in err
  checkpoints = workdir / "grpo" / "checkpoints"
  *_, before, newest = sorted(int(p.name) for p in checkpoints.iterdir())
  # All that was done is saved.
  assert newest == len(lines_of(workdir)) < UPDATES
  files = (checkpoints / str(newest) / "state").rglob("*")
  largest = max((p for p in files if p.is_file()), key=os.path.getsize)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)

  code, err = stop(home, workdir, signal.SIGKILL, after=newest + 3)
  assert code == -signal.SIGKILL
  (warning,) = [s for s in err.splitlines() if s.startswith("warning:")]
  assert str(checkpoints / str(newest)) in warning and "damaged" in warning
  assert f"going on from step {before}" in warning
  assert (checkpoints / f"{newest}.unusable").is_dir()
  assert newest < len(lines_of(workdir)) < UPDATES
  assert not (workdir / "policy").exists()

  code, _, err = run(home, TRAIN, *train_flags(home, workdir))
  assert code == 0, err
  assert_same(workdir, undisturbed)


def test_an_evaluation_writes_what_it_found(home, undisturbed):
  workdir = home / "evaluated"
  shutil.copytree(undisturbed, workdir)
  # As if another seed had been trained.
  shutil.copytree(undisturbed / "warm_policy", workdir / "seed1" / "policy")
  text = home / "text.txt"
  copy = home / "results" / "copy.json"
  code, out, err = run(
    home,
    EVAL,
    f"--workdir={workdir}",
    f"--text={text}",
    f"--calibration_text={text}",
    f"--result={copy}",
  )
  assert code == 0, err
  found = json.loads((workdir / "eval.json").read_text())
  keys = {"command", "commit", "device", "versions", "seconds", "rows"}
  assert keys <= found.keys()
  assert json.loads(copy.read_text())["rows"] == found["rows"]
  keys = {"system", "model", "data", "method", "budget", "metric", "value"}
  unbroken = []
  for row in found["rows"]:
    assert keys | {"seeds"} <= row.keys()
    assert row["data"] == "text.txt"
    if row["role"] == "distribution":
      assert row["value"] == sorted(row["value"])
      continue
    if row["role"] == "seeds":
      assert row["low"] <= row["value"] <= row["high"]
      continue
    if row["refresh_every"] is None:
      unbroken.append(row)
      continue
    assert {"low", "high", "flops", "bytes", "kappa", "rho", "bits"} <= set(row)
    assert row["low"] <= row["value"] * 1.000001
    assert row["high"] >= row["value"] * 0.999999
    assert row["tokens"] == found["rows"][0]["tokens"]
  assert {"dense", "SOL policy", "fixed"} <= {row["method"] for row in unbroken}
  by_role = {}
  for row in found["rows"]:
    if row in unbroken:
      continue
    by_role.setdefault(row["role"], {}).setdefault(row["method"], []).append(
      row
    )
  assert by_role["reference"]["dense"][0]["budget"] == pytest.approx(1)
  assert by_role["reference"]["dense"][0]["value"] > 1
  names = {"SOL policy", "SOL policy, seed 1", "warm start only"}
  assert names == set(by_role["ours"])
  assert "SOL policy minus fixed" in by_role["seeds"]
  names = {"fixed", "random", "surprise", "best static"}
  assert names | {"best static by FLOPs"} <= set(by_role["baseline"])
  assert "counterfactual regression" in by_role["baseline"]
  assert "true gains of 2 schedules" in by_role["oracle"]
  assert "TEAL variant, 60% of the channels" in by_role["static"]
  policy = by_role["ours"]["SOL policy"]
  assert [row["asked"] for row in policy] == [0.9, 0.95]
  # Baselines are matched to what the policy spent.
  for one, other in zip(policy, by_role["baseline"]["fixed"], strict=True):
    # The pattern also runs over tokens that another window scores.
    assert other["budget"] == pytest.approx(one["budget"], abs=0.01)
  picture = (workdir / "pareto.png").read_bytes()
  assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
  report = (workdir / "report.md").read_text()
  assert "pareto.png" in report and "SOL policy" in report
  assert "| surprise" in report and "| surprise" in out
  for title in ("At equal cost", "Over training seeds", "Without a refresh"):
    assert f"## {title}" in report


def mistaken(script, *arguments):
  """Runs a script that ends before it computes, in this process."""
  path, *given = script
  return scripts.run(Path(path).stem, *given, *arguments)


@pytest.mark.parametrize(
  "script, arguments, says",
  [
    (TRAIN, ("--preset=S41",), ("S41", "J-2L", "S40")),
    (TRAIN, ("--context=30",), ("context=30", "page size 4")),
    (TRAIN, ("--num_seeds=0",), ("num_seeds",)),
    (TRAIN, ("--mode=fast",), ("mode", "frugal", "published")),
    (TRAIN, ("--text=samples:x",), ("samples:SEED:N",)),
    (TRAIN, ("--text=none.txt",), ("none.txt",)),
    (EVAL, ("--workdir=none",), ("none", "train_sol.py")),
  ],
)
def test_a_mistake_is_one_line_and_exit_2(home, script, arguments, says):
  given = f"--workdir={home / 'mistake'}", f"--text={home / 'text.txt'}"
  code, _, err = mistaken(script, *given, *arguments)
  assert code == 2, err
  (line,) = [s for s in err.splitlines() if s.startswith("error: ")]
  assert "Traceback" not in err
  for part in says:
    assert part in line
  assert not (home / "mistake").exists()


def test_a_workdir_takes_no_other_flags(home, undisturbed):
  before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
  # Here are eight devices, which four windows are too few for.
  flags = (*train_flags(home, undisturbed), "--mesh=data:1", "--gamma=0.5")
  code, _, err = mistaken(TRAIN, *flags)
  assert code == 2
  (line,) = [s for s in err.splitlines() if s.startswith("error: ")]
  assert "--gamma is 0.5" in line and "--workdir" in line
  after = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
  assert after == before
