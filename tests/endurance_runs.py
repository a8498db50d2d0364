"""Trainers as `tests.endurance` runs them: start, watch, and compare ends."""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import time

from research.core import metrics
from tests.experiments import processes

KILL, TERM = signal.SIGKILL, signal.SIGTERM
_SECONDS = 600
_TEXT = 12000
# Of files that hold times, or the order in which what is equal was written.
_DIFFER = {"result.json", "report.md", "curves.png", ".lock"}
# Of stderr: progress, as `research.core.progress` prints it, and warnings.
_IN_FRONT = re.compile(r"\w[\w ]*: \d+/\d+  |warning: ")


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A training script with flags that make it short.

  Attributes:
    script: its path and flags; HOME stands for a folder of all its runs.
    text: whether it reads HOME/text.txt.
  """

  script: tuple[str, ...]
  text: bool = False


def _trainer(script: str, flagfile: str, *flags: str, text=False) -> Trainer:
  recipe = f"--flagfile=experiments/flagfiles/{flagfile}.flags"
  return Trainer((f"experiments/{script}.py", recipe, *flags), text)


TRAINERS = {
  "sol": _trainer(
    *("train_sol", "sol_tiny", "--text=HOME/text.txt", "--windows=4"),
    *("--episodes=2", "--group_size=4", "--width=16", "--warm_windows=16"),
    *("--updates=20", "--damage_windows=8", "--calibration_windows=4"),
    "--checkpoint_every=3",
    text=True,
  ),
  "lm": _trainer(
    *("train_lm", "transformer_tiny", "--text=HOME/text.txt"),
    *("--tokenizer=bytes", "--cache=HOME/tokens", "--layers=1"),
    *("--d_model=32", "--d_ff=64", "--length=32", "--batch=32", "--steps=60"),
    *("--warmup=5", "--eval_every=15", "--eval_windows=16"),
    *("--checkpoint_every=4", "--log_every=1"),
    text=True,
  ),
  "lra": _trainer(
    *("train_lra", "lra_tiny", "--attention_layers=0", "--layers=1"),
    *("--length=24", "--examples=512", "--d_model=8", "--d_ff=16"),
    *("--batch=16", "--steps=400", "--warmup=5", "--eval_every=10"),
    *("--seeds=0,1", "--pretrain_share=0.2", "--cache=HOME/lra"),
  ),
  "rlm": _trainer(
    *("train_rlm", "rlm_tiny", "--size=tiny", "--tokenizer=bytes"),
    *("--max_length=160", "--mantissa_digits=2", "--batch=8", "--warmup=1"),
    *("--steps=40", "--eval_every=10", "--early_stopping=0", "--log_every=1"),
    *("--checkpoint_every=4", "--train=60", "--valid=16"),
  ),
  # Of at most 99 updates it logs each, and it saves four times.
  "recall": _trainer(
    *("train_recall", "recall_tiny", "--layers=1", "--d_model=32"),
    *("--d_ff=64", "--batch=256", "--steps=48", "--warmup=5"),
    *("--seeds=0,1", "--test_lengths=32", "--test_texts=64"),
  ),
}


def prepare(home: pathlib.Path) -> None:
  """Writes what trainers read."""
  from models.text import load_text

  text = load_text("gutenberg:slice")[:_TEXT]
  (home / "text.txt").write_text(text, encoding="utf-8")


class Runs:
  """Runs of one trainer.

  Attributes:
    home: folder of everything; programs that runs compiled are kept there.
    seconds: that an undisturbed run takes when all is compiled.
    updating: seconds of its updates and of the checkpoints between them.
    expected: what an undisturbed run ended with.
  """

  def __init__(self, name: str, home: pathlib.Path, twice: bool = True):
    """Runs undisturbed, `twice` to see that nothing else makes a difference."""
    self.home = home
    self._name = name
    began = time.perf_counter()
    first = self.ends(self.finish("undisturbed"))
    if twice:
      began = time.perf_counter()
      again = self.ends(self.finish("again"))
      if differ := different(first, again):
        raise AssertionError(f"two undisturbed runs differ in {differ}")
    self.seconds = time.perf_counter() - began
    self.updating = _updating(self.home / "undisturbed")
    self.expected = first

  def start(
    self, workdir: pathlib.Path, front: str | None = None
  ) -> subprocess.Popen:
    """Starts the run of a folder; modules of `front` are found first."""
    script = TRAINERS[self._name].script
    words = [word.replace("HOME", str(self.home)) for word in script]
    env = processes.environment(self.home)
    if front:
      env["PYTHONPATH"] = f"{front}{os.pathsep}{env['PYTHONPATH']}"
    return subprocess.Popen(
      [sys.executable, *words, f"--workdir={workdir}"],
      cwd=processes.ROOT,
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, workdir: pathlib.Path, front: str | None = None):
    """Runs to the end: exit code and stderr."""
    process = self.start(workdir, front)
    try:
      _, err = process.communicate(timeout=_SECONDS)
    finally:
      process.kill()
    return process.returncode, err

  def finish(self, name: str) -> pathlib.Path:
    """Runs a folder of `home` to its end, which must be a good one."""
    workdir = self.home / name
    code, err = self.run(workdir)
    if code:
      raise AssertionError(f"exit {code}: {err[-2000:]}")
    return workdir

  def stop(
    self, workdir: pathlib.Path, number: int, draw: random.Random
  ) -> tuple[int, str, int]:
    """Sends a signal at a random moment.

    A quarter of the moments are anywhere; the others are behind the first
    update of this start, where a run writes.

    Returns:
      Exit code, stderr, and the lines of metrics when it was sent.
    """
    began, before = time.monotonic(), lines(workdir)
    process = self.start(workdir)
    wait = draw.uniform(0, self.seconds)
    if draw.random() > 0.25:
      while process.poll() is None and lines(workdir) == before:
        if time.monotonic() - began > _SECONDS:
          break
        time.sleep(0.002)
      wait = draw.uniform(0, self.updating)
    try:
      process.wait(wait)
    except subprocess.TimeoutExpired:
      pass
    there = lines(workdir)
    process.send_signal(number)
    try:
      _, err = process.communicate(timeout=_SECONDS)
    finally:
      process.kill()
    return process.returncode, err, there

  def ends(self, workdir: pathlib.Path) -> dict[str, str]:
    """Digests of what a run ended with, by file, without times."""
    found = {}
    for path in sorted(workdir.rglob("*")):
      below = str(path.relative_to(workdir))
      if path.name == "metrics.jsonl":
        rows = map(metrics.without_timing, metrics.read_jsonl(path))
        found[below] = _digest(json.dumps(list(rows)).encode())
      elif path.name == "checkpoints":
        # A run that was stopped keeps others before the last one.
        steps = [int(p.name) for p in path.iterdir() if p.name.isdecimal()]
        last = path / str(max(steps))
        manifest = json.loads((last / "manifest.json").read_text())
        found[below] = f"{last.name} {manifest['content']}"
      elif path.suffix == ".safetensors":
        found[below] = _digest(_tensors(path.read_bytes()))
      elif not _is_apart(path, workdir) and path.is_file():
        found[below] = _digest(path.read_bytes())
    return found

  def differs(self, workdir: pathlib.Path) -> list[str]:
    """Names of files that an undisturbed run ended with otherwise."""
    return different(self.expected, self.ends(workdir))


def different(one: dict[str, str], other: dict[str, str]) -> list[str]:
  """Names that two ends hold differently; what a fault left aside is no end."""
  names = one.keys() | other.keys()
  return sorted(
    name
    for name in names
    if one.get(name) != other.get(name) and ".unusable" not in name
  )


def _updating(workdir: pathlib.Path) -> float:
  """Seconds of updates, twice: checkpoints take about as long, untold.

  Of each stage by the median, since the first update is compiled.
  """
  found = 0.0
  for path in workdir.glob("**/metrics.jsonl"):
    seconds = [row["step_seconds"] for row in metrics.read_jsonl(path)]
    found += 2 * len(seconds) * statistics.median(seconds)
  return found


def lines(workdir: pathlib.Path) -> int:
  """Lines of metrics of a run's stages."""
  found = 0
  for path in workdir.glob("**/metrics.jsonl"):
    found += path.read_bytes().count(b"\n")
  return found


def checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Folders of checkpoints of a run's stages, by the time of their making."""
  found = [
    path
    for path in workdir.glob("**/checkpoints/*")
    if path.name.isdecimal() and path.is_dir()
  ]
  return sorted(found, key=lambda path: (path.stat().st_mtime, int(path.name)))


def is_one_line(err: str) -> bool:
  """Whether a run said what is wrong in a line, behind nothing but progress.

  Warnings of the run, each of one line, may stand in front of it, too.
  """
  said = [line for line in err.splitlines() if line.strip()]
  while said and _IN_FRONT.match(said[0]):
    del said[0]
  return len(said) == 1 and said[0].startswith("error: ")


def _is_apart(path: pathlib.Path, workdir: pathlib.Path) -> bool:
  parts = path.relative_to(workdir).parts
  return (
    path.name in _DIFFER
    or path.suffix == ".png"
    # Orbax writes the time of a checkpoint beside it; its content counts.
    or not {"tensorboard", "checkpoints"}.isdisjoint(parts)
  )


def _tensors(data: bytes) -> bytes:
  """A safetensors file with a sorted header, which the library shuffles."""
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  return json.dumps(header, sort_keys=True).encode() + data[8 + size :]


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()
