"""The one training loop. It knows nothing of any method.

Everything a run does is a function of its flags: `batch_at(step)` is pure and
the state holds the key, so a run that is killed and started again writes the
same numbers as one that was left alone.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp

from research.core import files, processes
from research.core import metrics as metrics_lib
from research.core import workdir as workdir_lib
from research.core.checkpoint import Checkpointer
from research.core.options import RunOptions
from research.core.progress import Progress
from research.core.state import TrainState, all_finite

Tree = Any


class Stopped(Exception):
  """A run ended early: one line, and the exit code for scripts."""

  exit_code = 1


class Interrupted(Stopped):
  """Ctrl-C (exit code 130) or SIGTERM (143) ended the run."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


class Diverged(Stopped):
  """The loss or a parameter is not a finite number; exit code 1."""


@dataclasses.dataclass(frozen=True)
class Hook:
  """Work between steps, such as an evaluation.

  Attributes:
    function: called with the state after an update; the numbers it returns (or
      None) join that step's line of metrics. It must be a pure function of the
      state, and keep no reference to it: the next step takes its memory.
    every: updates between two calls; the last update has a call too.
  """

  function: Callable[[TrainState], Mapping[str, Any] | None]
  every: int


def run(
  step_fn: Callable[..., tuple[TrainState, Mapping[str, Any]]],
  state: TrainState | Callable[[], TrainState],
  batch_at: Callable[[int], Tree],
  options: RunOptions,
  *,
  num_steps: int,
  hooks: Sequence[Hook] = (),
  timing: Callable[[float], Mapping[str, float]] = lambda seconds: {},
  frozen: Tree = None,
) -> TrainState:
  """Trains to `num_steps` updates, from the newest checkpoint if there is one.

  Writes to the workdir: `flags.json`, `metrics.jsonl` (a line for every
  `log_every`-th step, the last, and those with a hook; `step` is the number of
  updates done before it), `tensorboard/` and `checkpoints/`. Lines hold the
  metrics of their own step, not a mean since the line before: a run that goes
  on from the middle could not know that mean. Time is under `step_seconds`,
  which, like all keys of `metrics.TIMING_SUFFIXES`, differs from run to run;
  it is the mean since the line before, hooks and checkpoints not counted.

  Metrics are fetched one step late and the next batch is made by a thread, so
  the device does not wait for the host.

  Args:
    step_fn: `(state, batch, frozen) -> (state, metrics)` from `state.jit_step`.
    state: the state to start from, which stays valid, so that a second copy of
      it is in memory; or a function that makes a state nobody else holds, each
      array in memory of its own.
    batch_at: pure function, step -> batch; called from another thread.
    options: the workdir and how often to write to it.
    num_steps: updates in all, those before a restart included.
    hooks: work between steps.
    timing: `step_seconds` -> more numbers of a line (a rate, a share of the
      device's peak), under keys of `metrics.TIMING_SUFFIXES`.
    frozen: arrays that steps read and do not change.

  Returns:
    The state after `num_steps` updates.

  Raises:
    InputError: another process has the workdir, it belongs to other flags, or
      it cannot be used.
    Interrupted: Ctrl-C or SIGTERM came; a checkpoint was saved, unless Ctrl-C
      came twice.
    Diverged: the metric "loss" or a parameter is NaN or infinite; the last
      checkpoint is from before.
  """
  workdir = pathlib.Path(options.workdir)
  workdir_lib.claim(workdir, options.flags)
  flags = processes.from_writer(
    lambda: files.digest_of_file(workdir / workdir_lib.FLAGS)
  )
  checkpointer = Checkpointer(workdir / "checkpoints", options.keep, flags)
  if callable(state):
    state = state()
  else:
    # A copy, because steps donate: the caller's arrays live on, and arrays that
    # share memory would be donated twice.
    state = jax.tree.map(jnp.copy, state)
  _, state = checkpointer.restore_latest(state) or (None, state)
  start = int(state.step)
  if start >= num_steps:
    return state

  with contextlib.ExitStack() as stack:
    opened = lambda what: stack.enter_context(contextlib.closing(what))
    writes = processes.is_writer()
    log = metrics_lib.MetricsLog(workdir, start) if writes else _NoLog()
    log, bar = (
      opened(log),
      opened(Progress(num_steps, start, enabled=options.progress and writes)),
    )
    pool = stack.enter_context(futures.ThreadPoolExecutor(1))
    signals = stack.enter_context(_caught_signals())
    fetch = _Fetch(log, bar, options, num_steps, timing, checkpointer)

    stops = processes.AnyOf()
    for step, batch in _ahead(pool, batch_at, start, num_steps):
      done = step + 1
      state, metrics = step_fn(state, batch, frozen)
      due = [h for h in hooks if done % h.every == 0 or done == num_steps]
      if due:
        # The step is under way: the wait for it is its own time, not a hook's.
        jax.block_until_ready(metrics)
      with fetch.untimed():
        extra = _run_hooks(due, state)
      fetch.put(step, metrics, extra)
      saves = done == num_steps or done % options.checkpoint_every == 0
      if not (stops(bool(signals)) or saves):
        continue
      fetch.save(step, state)
      if processes.any_of(bool(signals)):
        # After the last update, too: what the caller does next may be long.
        number = signals[0] if signals else signal.SIGTERM
        raise _stopped(f"step {done} of {num_steps}", workdir, number)
  return state


def _stopped(after: str, workdir: pathlib.Path, number: int) -> Interrupted:
  return Interrupted(
    f"stopped after {after}, saved in {workdir}: the same command goes on",
    128 + number,
  )


def _ahead(
  pool: futures.Executor, batch_at: Callable[[int], Tree], start: int, end: int
) -> Iterator[tuple[int, Tree]]:
  """Steps and their batches, the next of which a thread makes meanwhile."""
  coming = pool.submit(batch_at, start)
  for step in range(start, end):
    batch = coming.result()
    if step + 1 < end:
      coming = pool.submit(batch_at, step + 1)
    yield step, batch


class _NoLog:
  """In the place of a log, for processes that write none."""

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes nothing."""

  def close(self) -> None:
    """Closes nothing."""


class _Fetch:
  """Holds the newest metrics back until the step after them is under way."""

  def __init__(self, log, bar, options, num_steps, timing, checkpointer):
    self._log = log
    self._bar = bar
    self._options = options
    self._num_steps = num_steps
    self._timing = timing
    self._checkpointer = checkpointer
    self._held = None
    self._logged_at = time.perf_counter()
    self._steps_since = 0

  def put(self, step: int, metrics: Mapping, extra: Mapping) -> None:
    before, self._held = self._held, (step, metrics, extra)
    if before is not None:
      self._handle(*before)

  def flush(self) -> None:
    if self._held is not None:
      self._handle(*self._held)
    self._held = None

  def save(self, step: int, state: TrainState) -> None:
    """Writes what is held back, and then a checkpoint behind `step`."""
    self.flush()
    with self.untimed():
      metrics_lib.sync(self._options.workdir)
      # A finite loss does not say that the update after it was finite too.
      if not all_finite(state.params):
        raise _diverged("a parameter is not finite", step, self._checkpointer)
      self._checkpointer.save(step + 1, state)

  @contextlib.contextmanager
  def untimed(self) -> Iterator[None]:
    """Time spent inside is not counted as that of steps."""
    began = time.perf_counter()
    yield
    self._logged_at += time.perf_counter() - began

  def _handle(self, step: int, metrics: Mapping, extra: Mapping) -> None:
    metrics = jax.device_get(dict(metrics))
    self._steps_since += 1
    loss = metrics.get("loss")
    diverged = loss is not None and not math.isfinite(loss)
    last = step + 1 == self._num_steps
    if diverged or last or extra or step % self._options.log_every == 0:
      now = time.perf_counter()
      seconds = (now - self._logged_at) / self._steps_since
      timed = {"step_seconds": seconds, **self._timing(seconds)}
      self._log.write(step, {**metrics, **extra, **timed})
      self._logged_at, self._steps_since = now, 0
    if diverged:
      raise _diverged(f"the loss is {float(loss)}", step, self._checkpointer)
    names = [name for name in self._options.shown if name in metrics]
    shown = {name: metrics[name] for name in names}
    self._bar.update(step + 1, shown)


def _diverged(what: str, step: int, checkpointer: Checkpointer) -> Diverged:
  steps = checkpointer.steps()
  kept = (
    f"the checkpoint of step {steps[-1]} is kept"
    if steps
    else "there is no checkpoint yet"
  )
  return Diverged(
    f"{what} at step {step}: lower the learning rate and give another"
    f" --workdir ({kept})"
  )


def _run_hooks(hooks: Sequence[Hook], state: TrainState) -> dict[str, Any]:
  """Numbers of all `hooks` after an update."""
  numbers = {}
  for hook in hooks:
    numbers.update(hook.function(state) or {})
  return numbers


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
  """Collects Ctrl-C and SIGTERM in a list, so that a step is never cut.

  A second signal leaves at once. One that comes when the last step has been
  saved still ends the run. Only the main thread can do this; elsewhere signals
  act as usual.
  """
  caught: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield caught
    return

  def handler(number: int, _) -> None:
    if caught:
      raise Interrupted(
        "left at once: the same command goes on from the last checkpoint",
        128 + number,
      )
    caught.append(number)
    print("\nsaving after this step; once more leaves now", file=sys.stderr)

  names = (signal.SIGINT, signal.SIGTERM)
  before = {name: signal.signal(name, handler) for name in names}
  try:
    yield caught
  finally:
    for name, previous in before.items():
      signal.signal(name, previous)
  if caught:
    raise Interrupted(
      "stopped after the last step: the same command goes on", 128 + caught[0]
    )
