"""A model and its peers on one test part: rows of a result file."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from research.core import files, intervals
from research.predictors import calibration, measures, peers
from research.predictors.calibration import Prediction
from research.predictors.number_scale import NumberScale
from research.predictors.splits import Split
from research.predictors.tables import Table

Say = Callable[[str], None]
OURS = "regression LM"
EXPECTED = "regression LM, expected rank"
# The second measurement is no method: it is the ceiling of all of them.
AGAIN = "measured again"


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
  """Point predictions of one objective by several methods.

  Attributes:
    target: its name.
    truth: (M,) finite.
    by_method: method -> (M,); the first is ours.
    draws: (M, S) of ours.
    interval: (M, 2) of ours where it was calibrated, or None.
  """

  target: str
  truth: np.ndarray
  by_method: dict[str, np.ndarray]
  draws: np.ndarray
  interval: np.ndarray | None = None

  def best_peer(self, measure: str) -> str | None:
    """The peer with the best value of a measure; None without peers."""
    names = [n for n in self.by_method if n not in (OURS, EXPECTED, AGAIN)]
    sign = -1 if measure in ("mse", "mae") else 1
    score = lambda name: (
      sign * measures.MEASURES[measure](self.by_method[name], self.truth)
    )
    return max(names, key=score) if names else None


def answers_of_peers(
  table: Table,
  split: Split,
  names: Sequence[str],
  *,
  seed: int = 0,
  kept: pathlib.Path | None = None,
  processes: int = 1,
  say: Say = lambda line: None,
) -> dict[tuple[str, str], np.ndarray]:
  """Trains peers: (target, peer) -> predictions of the test rows with a truth.

  Args:
    table: all rows.
    split: its parts; peers are trained on `train` and `valid` together, since
      the model was given both.
    names: of `peers.NAMES`; of `peers.COST_NAMES`, which predict nothing where
      a compiler counted nothing, or the target is such a count; and of
      `peers.SIZE_NAMES`, which need a table with sizes.
    seed: of the peers.
    kept: folder of answers; those of the same problem are read, others written.
    processes: that share peers, targets and cores among them.
    say: told of a peer that failed; the others stay.

  Raises:
    InputError: a peer is unknown, or its package is not installed.
  """
  peers.asked(names)
  known = np.concatenate([split.train, split.valid])
  counts = lambda by_name: (
    np.array(list(by_name.values())).reshape(-1, len(table)).T
  )
  costs, sizes = counts(table.costs), counts(table.sizes)
  jobs = {}
  for place, target in enumerate(table.targets):
    column = table.values[:, place]
    train = known[np.isfinite(column[known])]
    test = split.test[np.isfinite(column[split.test])]
    problem = peers.Problem(
      train_texts=[table.texts[i] for i in train],
      train_features=table.features[train],
      train_values=column[train],
      test_texts=[table.texts[i] for i in test],
      test_features=table.features[test],
      seed=seed,
      train_words=[table.words[i] for i in train] if table.words else (),
      test_words=[table.words[i] for i in test] if table.words else (),
      train_costs=costs[train],
      test_costs=costs[test],
      train_sizes=sizes[train],
      test_sizes=sizes[test],
      scale=NumberScale.of(column),
    )
    uncounted = not table.costs or target in table.costs
    for name in names:
      if uncounted and name in peers.COST_NAMES:
        continue
      if not table.sizes and name in peers.SIZE_NAMES:
        continue
      jobs[target, name] = problem
  return _answered(jobs, kept, processes, say)


def _answered(jobs, kept, processes, say) -> dict[tuple[str, str], np.ndarray]:
  found = {}

  def take(key, answer):
    try:
      found[key] = answer()
    except peers.PeerError as error:
      say(f"{key[1]} has no answer for {key[0]}: {error}")

  if processes == 1:
    for key, problem in jobs.items():
      take(key, lambda: _kept_answers(kept, *key, problem))  # noqa: B023
    return found
  threads = max((os.cpu_count() or 1) // processes, 1)
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
    futures = {
      key: pool.submit(_kept_answers, kept, *key, problem, threads)
      for key, problem in jobs.items()
    }
    for key, future in futures.items():
      take(key, future.result)
  return found


def _kept_answers(
  kept: pathlib.Path | None, target: str, name: str, problem: peers.Problem,
  threads: int | None = None,
) -> np.ndarray:  # fmt: skip
  predict = lambda: peers.predict(name, problem, threads=threads)
  if kept is None:
    return predict()
  # A folder may keep the answers to several problems.
  words = f"{name} {target} {files.digest(problem)[:16]}"
  path = kept / f"{re.sub(r'[^A-Za-z0-9]+', '_', words)}.npz"
  make = lambda: {"answers": predict()}
  return files.kept(path, [name, problem], make)["answers"]


def predictions(
  table: Table,
  split: Split,
  prediction: Prediction,
  answers: Mapping[tuple[str, str], np.ndarray],
  *,
  expected: np.ndarray | None = None,
) -> list[Predictions]:
  """Gathers ours and the peers', for each objective.

  Args:
    table: all rows.
    split: its parts.
    prediction: ours, for `split.test` in order.
    answers: of `answers_of_peers`.
    expected: (M, O) of `RegressionLM.expected` for `split.test`, or None.
  """
  found = []
  for place, target in enumerate(table.targets):
    column = table.values[:, place]
    there = np.isfinite(column[split.test])
    test = split.test[there]
    by_method = {OURS: measures.without_gaps(prediction.median[there, place])}
    if expected is not None:
      by_method[EXPECTED] = expected[there, place]
    for (other, name), points in answers.items():
      if other == target:
        by_method[name] = points
    if target in table.again:
      by_method[AGAIN] = measures.without_gaps(table.again[target][test])
    draws = prediction.samples[there, :, place]
    interval = None
    if prediction.margins is not None:
      ends = (prediction.low, prediction.high)
      interval = np.stack([end[there, place] for end in ends], axis=1)
    found.append(Predictions(target, column[test], by_method, draws, interval))
  return found


def write_answers(
  path: pathlib.Path, table: Table, split: Split, prediction: Prediction
) -> None:
  """Writes a JSON line a test row: its truth, our median and interval.

  The file appears whole or not at all.

  Args:
    path: of the file.
    table: all rows.
    split: its parts.
    prediction: for `split.test` in order.
  """
  number = lambda value: float(value) if np.isfinite(value) else None
  median, low, high = prediction.median, prediction.low, prediction.high
  with files.whole(path) as draft, open(draft, "w", encoding="utf-8") as file:
    for place, row in enumerate(split.test):
      line: dict[str, Any] = {"row": int(row), "group": table.groups[row]}
      for i, target in enumerate(table.targets):
        said = (table.values[row], median[place], low[place], high[place])
        keys = ("truth", "median", "low", "high")
        line[target] = {k: number(v[i]) for k, v in zip(keys, said)}
      file.write(json.dumps(line) + "\n")


def rows(
  found: Predictions,
  *,
  num_samples: int = 200,
  level: float = 0.9,
  **shared: Any,
) -> list[dict[str, Any]]:
  """Result rows of one objective: every measure of every method.

  For each measure a row also tells the difference of ours to the best peer,
  paired, under `metric` "<measure>, minus <peer>".

  Args:
    found: the predictions.
    num_samples: of the bootstrap.
    level: of the interval whose coverage is told.
    **shared: columns that all rows have.
  """
  shared = {"target": found.target, "tests": len(found.truth)} | shared
  rows = []

  def add(method, metric, interval):
    rows.append(
      shared
      | {"method": method, "metric": metric}
      | dict(zip(("value", "low", "high"), interval))
    )

  for metric, measure in measures.MEASURES.items():
    for method, values in found.by_method.items():
      interval = intervals.bootstrap(
        measure, values, found.truth, num_samples=num_samples
      )
      add(method, metric, interval)
    best = found.best_peer(metric)
    if best is not None:
      for ours in (OURS, EXPECTED):
        if ours not in found.by_method:
          continue
        difference = intervals.paired_difference(
          measure,
          found.by_method[ours],
          found.by_method[best],
          found.truth,
          num_samples=num_samples,
        )
        add(ours, f"{metric}, minus {best}", difference)
  for method, values in found.by_method.items():
    draws = found.draws if method == OURS else values[:, None]
    scores = calibration.crps(draws, found.truth)
    # The CRPS of a point is its absolute error.
    interval = intervals.bootstrap(np.nanmean, scores, num_samples=num_samples)
    add(method, "crps", interval)
  covered = lambda draws, truth: calibration.coverage(draws, truth, level)
  interval = intervals.bootstrap(
    covered, found.draws, found.truth, num_samples=num_samples
  )
  add(OURS, f"coverage of {level:g}", interval)
  ends = [
    calibration.quantile(found.draws, (1 + side * level) / 2)
    for side in (-1, 1)
  ]
  _add_interval_score(add, ends, found.truth, level, num_samples)
  if found.interval is not None:
    inside = lambda ends, truth: float(
      np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
    )
    interval = intervals.bootstrap(
      inside, found.interval, found.truth, num_samples=num_samples
    )
    add(OURS, f"coverage of {level:g}, calibrated", interval)
    _add_interval_score(
      add, found.interval.T, found.truth, level, num_samples, ", calibrated"
    )
  return rows


def _add_interval_score(add, ends, truth, level, num_samples, more="") -> None:
  low, high = ends
  scores = calibration.interval_score(low, high, truth, level)
  interval = intervals.bootstrap(np.nanmean, scores, num_samples=num_samples)
  add(OURS, f"interval score of {level:g}{more}", interval)


def table_lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """One line a method and target, one column a measure, for a report."""
  lines: dict[tuple, dict[str, Any]] = {}
  for row in rows:
    if ", minus" in row["metric"]:
      continue
    key = (row["target"], row.get("train", 0), row["method"])
    line = lines.setdefault(
      key,
      {"target": row["target"], "train": row.get("train"),
       "method": row["method"]},
    )  # fmt: skip
    line[row["metric"]] = row["value"]
  return list(lines.values())
