"""Many updates of a tiny model in one process: memory and compilations.

    python -m tests.endurance_soak 100000

trains a Transformer of some thousand parameters as `train_lm.py` does, with
evaluations, checkpoints and lines of metrics, and prints what it found as JSON.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from tests.experiments import processes

# Memory of the last fifth beyond that of the second: pages that an allocator
# keeps, and no leak, of which 10^5 updates would make more.
_ROOM = 16 << 20


def row(updates: int) -> dict[str, Any]:
  """Soaks in a process of its own; the row of the result."""
  with tempfile.TemporaryDirectory() as home:
    done = subprocess.run(
      [sys.executable, "-m", "tests.endurance_soak", str(updates)],
      cwd=processes.ROOT,
      env=processes.environment(pathlib.Path(home)) | {"TMPDIR": home},
      capture_output=True,
      text=True,
    )
  if done.returncode:
    raise AssertionError(done.stderr[-3000:])
  found = json.loads(done.stdout.splitlines()[-1])
  faults = []
  if found["grown_mb"] * 1e6 > _ROOM:
    faults.append(f"memory grew by {found['grown_mb']:.1f} MB")
  if found["compiled_later"]:
    faults.append(f"{found['compiled_later']} programs were compiled later")
  return {
    "check": "soak",
    "trainer": "lm",
    "times": updates,
    "faults": len(faults),
    **found,
    "first_faults": faults,
  }


def soak(updates: int, folder: pathlib.Path) -> dict[str, Any]:
  """Trains; programs compiled in the first fifth and later, and memory."""
  import jax

  from models.text import load_text
  from research.core import mesh
  from research.language_model import training
  from research.language_model.options import Options

  text = folder / "text.txt"
  text.write_text(load_text("gutenberg:slice")[:20000], encoding="utf-8")
  workdir = folder / "run"
  compiled = [0]

  def count(event: str, seconds: float, **_: Any) -> None:
    compiled[0] += "backend_compile" in event

  jax.monitoring.register_event_duration_secs_listener(count)
  samples: list[tuple[int, int, int]] = []  # updates, programs, bytes
  ended = threading.Event()

  def watch() -> None:
    while not ended.wait(0.2):
      samples.append((_updates(workdir), compiled[0], _memory()))

  watcher = threading.Thread(target=watch)
  watcher.start()
  began = time.perf_counter()
  try:
    run = training.Run(
      options=Options(
        arch="transformer",
        preset="tiny",
        tokenizer="bytes",
        layers=1,
        d_model=8,
        d_ff=16,
        heads=1,
        kv_heads=1,
        length=8,
        batch=2,
        steps=updates,
        warmup=5,
        eval_every=max(updates // 50, 1),
        eval_windows=2,
        dtype="float32",
      ),
      text=[str(text)],
      workdir=workdir,
      cache=folder / "tokens",
      mesh=mesh.data_mesh(1),
      checkpoint_every=max(updates // 100, 1),
      log_every=10,
      progress=False,
    )
    training.train(run, lambda line: None)
  finally:
    ended.set()
    watcher.join()
  seconds = time.perf_counter() - began
  fifths = [
    [sample for sample in samples if low <= 5 * sample[0] / updates < low + 1]
    for low in range(5)
  ]
  middle = lambda part: sorted(sample[2] for sample in part)[len(part) // 2]
  # Programs of the end, such as those that write the model, are no updates'.
  training_samples = [sample for sample in samples if sample[0] < updates - 10]
  later = training_samples[-1][1] - fifths[1][0][1]
  return {
    "compiled_first": fifths[1][0][1],
    "compiled_later": later,
    "memory_mb": middle(fifths[4]) / 1e6,
    "grown_mb": (middle(fifths[4]) - middle(fifths[1])) / 1e6,
    "updates_per_second": updates / seconds,
    "seconds": seconds,
  }


def _updates(workdir: pathlib.Path) -> int:
  """Updates done, by the last line of metrics."""
  try:
    with (workdir / "metrics.jsonl").open("rb") as stream:
      stream.seek(max(stream.seek(0, os.SEEK_END) - 4096, 0))
      last = stream.read().rstrip(b"\n").splitlines()[-1]
    return json.loads(last)["step"]
  except (OSError, ValueError, IndexError):
    return 0


def _memory() -> int:
  """Bytes of this process that are in memory."""
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  with tempfile.TemporaryDirectory() as name:
    print(json.dumps(soak(int(sys.argv[1]), pathlib.Path(name))))
