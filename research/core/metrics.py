"""Numbers of a run: JSON files, the metric log, timing and intervals."""

import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models.errors import InputError
from research.core import files

TIMING_SUFFIXES = ("_seconds", "_per_second", "mfu")


def to_json_value(value: Any) -> Any:
  """Python value of an array or number; NaN and infinities become None."""
  if isinstance(value, Mapping):
    return {str(name): to_json_value(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json_value(item) for item in value]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return to_json_value(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read_jsonl(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Lines of a JSONL file as dicts; [] when there is no such file.

  Raises:
    InputError: a line is no JSON object; names the file and the line.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_text().splitlines()
  rows = [_parse_line(line) for line in lines]
  if None in rows:
    raise InputError(
      f"{path} line {rows.index(None) + 1} is not a JSON object:"
      " mend or remove that line"
    )
  return rows


def without_timing(row: Mapping[str, Any]) -> dict[str, Any]:
  """A line of metrics without the keys that differ from run to run.

  Timing is kept under keys that end in one of `TIMING_SUFFIXES`; all other keys
  are the same in a resumed run and in an undisturbed one.
  """
  return {k: v for k, v in row.items() if not k.endswith(TIMING_SUFFIXES)}


class MetricsLog:
  """Writes `metrics.jsonl` and TensorBoard events of a run.

  On opening, lines of steps >= `first_step` are dropped, and a line that a kill
  cut in two: the run writes them again.

  Args:
    workdir: folder of the run.
    first_step: the step the run starts or goes on from.
  """

  def __init__(self, workdir: str | pathlib.Path, first_step: int):
    # tensorboardX takes most of a second to import; only runs need it.
    import tensorboardX

    workdir = pathlib.Path(workdir)
    path = workdir / "metrics.jsonl"
    if path.exists():
      _truncate(path, first_step)
    self._stream = path.open("a")
    # The writer names its file by the second: a run started again at once
    # would write over the events before it.
    self._events = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"),
      purge_step=first_step,
      filename_suffix=f".{time.time_ns()}",
    )

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line; scalars go to TensorBoard too.

    Args:
      step: number of updates done before the one that `metrics` tells of.
      metrics: name -> number or array; non-finite numbers are written as null.
    """
    row = to_json_value({"step": step, **metrics})
    self._stream.write(json.dumps(row) + "\n")
    self._stream.flush()
    for name, value in row.items():
      if isinstance(value, int | float) and name != "step":
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both files."""
    self._stream.close()
    self._events.close()


class Timer:
  """Context manager: `.seconds` is the wall time spent inside it."""

  def __init__(self):
    self.seconds = 0.0
    self._start = 0.0

  def __enter__(self) -> "Timer":
    self._start = time.perf_counter()
    return self

  def __exit__(self, *_) -> None:
    self.seconds = time.perf_counter() - self._start


class Interval(NamedTuple):
  """A value and the ends of its 95% interval."""

  value: float
  low: float
  high: float


def ratio_bootstrap(
  numerators: Sequence[float] | np.ndarray,
  denominators: Sequence[float] | np.ndarray,
  num_samples: int = 10000,
  seed: int = 0,
) -> Interval:
  """Ratio of two sums over windows, with its 95% percentile bootstrap interval.

  sum(numerators) / sum(denominators), windows drawn with replacement (Efron and
  Tibshirani 1993, chapter 13). A window is the unit of resampling, so tokens of
  one window may depend on each other.

  Args:
    numerators: (W,) such as the summed negative log-likelihood of a window.
    denominators: (W,) such as its number of tokens; >= 0 with a positive sum.
    num_samples: resamples.
    seed: of the resampling.

  Returns:
    The ratio on all windows and the 2.5% and 97.5% quantiles over resamples.

  Raises:
    ValueError: shapes differ, W is 0, or a number is not finite or negative.
  """
  sums = np.stack(
    [np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)],
    axis=-1,
  )
  if sums.ndim != 2 or not len(sums) or not np.isfinite(sums).all():
    raise ValueError(f"need finite (W,) pairs with W > 0, got {sums.shape}")
  if (sums[:, 1] < 0).any() or not sums[:, 1].any():
    raise ValueError("denominators must be >= 0 and not all 0")
  generator = np.random.default_rng(seed)
  windows = len(sums)
  # Draws take some 64 MB at a time, however many windows there are.
  chunk = max(1, min(num_samples, (1 << 22) // windows))
  ratios = []
  for start in range(0, num_samples, chunk):
    size = (min(chunk, num_samples - start), windows)
    drawn = sums[generator.integers(windows, size=size, dtype=np.int32)].sum(1)
    # Resamples that hold empty windows alone are left out.
    drawn = drawn[drawn[:, 1] > 0]
    ratios.append(drawn[:, 0] / drawn[:, 1])
  low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
  top, bottom = sums.sum(0)
  return Interval(float(top / bottom), float(low), float(high))


def paired_bootstrap(
  delta_by_window: Sequence[float] | np.ndarray,
  weights: Sequence[float] | np.ndarray | None = None,
  num_samples: int = 10000,
  seed: int = 0,
) -> Interval:
  """Weighted mean of paired differences, with its 95% bootstrap interval.

  Args:
    delta_by_window: (W,) difference of two methods on each window.
    weights: (W,) such as tokens of each window; None weighs all alike.
    num_samples: resamples.
    seed: of the resampling.

  Returns:
    The mean and the ends of its interval; it unpacks as (mean, low, high).

  Raises:
    ValueError: as `ratio_bootstrap`.
  """
  delta = np.asarray(delta_by_window, np.float64)
  if weights is None:
    weights = np.ones_like(delta)
  weights = np.asarray(weights, np.float64)
  if weights.shape != delta.shape:
    raise ValueError(f"weights {weights.shape} do not fit {delta.shape}")
  return ratio_bootstrap(delta * weights, weights, num_samples, seed)


def _parse_line(line: str) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def _truncate(path: pathlib.Path, first_step: int) -> None:
  """Keeps, byte for byte, the lines of steps before `first_step`."""
  lines = path.read_text().splitlines(keepends=True)
  kept = [
    line
    for line in lines
    if line.endswith("\n")
    and (_parse_line(line) or {}).get("step", first_step) < first_step
  ]
  if kept != lines:
    files.write_text(path, "".join(kept))
