"""Accuracies of networks: measured ones from files, and a fit to the others.

A file is a table with a column for each of `NETWORK` (or `d_ff` in the place of
`ratio`) and `valid_accuracy` or `accuracy`, a share of one: CSV, or a result
JSON, whose rows have the same keys; a folder stands for its JSON files. Of rows
that have both, validation accuracy is taken, because networks are chosen by
it. Rows of other tasks and models are left out; those of several seeds are
averaged. No accuracy is ever made up: each point says whether its network's was
measured or predicted, and by what.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models import input_files
from models.errors import InputError, shown
from research.codesign.problem import NETWORK
from research.predictors import reading

Key = tuple[int, ...]
# Text of a network -> predicted accuracies (N,).
Predict = Callable[[list[str]], np.ndarray]
PREDICTORS = ("none", "ridge", "xgboost", "rlm")
# Networks that a fit needs at least.
_LEAST = 6
_FOLDS = 10


@dataclasses.dataclass(frozen=True)
class Accuracies:
  """Of every network that has one.

  Attributes:
    by_network: values of `NETWORK` -> accuracy.
    source: values of `NETWORK` -> "measured", or "predicted by ...".
    error: mean absolute error of the prediction on networks left out of the
      fit; None where nothing was predicted or left out.
    seeds: values of `NETWORK` -> runs that were averaged.
  """

  by_network: Mapping[Key, float]
  source: Mapping[Key, str]
  seeds: Mapping[Key, int]
  error: float | None = None


def read(paths: Sequence[str], task: str) -> Accuracies:
  """Measured accuracies on a task.

  Raises:
    InputError: a file is missing or damaged, an accuracy is not in [0, 1], or
      there is none of this task.
  """
  found: dict[Key, list[float]] = {}
  for path in _files(paths):
    for place, row in _rows(path):
      if str(row.get("task") or row.get("data") or task) != task:
        continue
      if str(row.get("model") or "fabnet").lower() != "fabnet":
        continue
      if "metric" in row and row["metric"] != "accuracy":
        continue
      if "kind" in row and row["kind"] != "measured":
        continue
      key, accuracy = _parsed(row, place)
      found.setdefault(key, []).append(accuracy)
  if not found:
    raise InputError(
      f"--accuracies={','.join(paths)}: no row is of FABNet on {task!r}"
    )
  return Accuracies(
    by_network={key: float(np.mean(own)) for key, own in found.items()},
    source=dict.fromkeys(found, "measured"),
    seeds={key: len(own) for key, own in found.items()},
  )


def completed(
  measured: Accuracies,
  networks: Sequence[Mapping[str, int]],
  predictor: str,
  *,
  seed: int = 0,
  rlm: Predict | None = None,
) -> Accuracies:
  """Measured accuracies, and predicted ones of the other networks.

  Args:
    measured: by `read`.
    networks: of a space.
    predictor: one of `PREDICTORS`; "none" leaves networks without.
    seed: of trees.
    rlm: a regression language model's predictions, for "rlm".

  Raises:
    InputError: too few were measured for a fit.
  """
  if predictor == "none":
    return measured
  if predictor not in PREDICTORS:
    raise InputError(
      f"predictor {predictor!r} is unknown: take one of {', '.join(PREDICTORS)}"
    )
  keys = [tuple(network[name] for name in NETWORK) for network in networks]
  others = [key for key in keys if key not in measured.by_network]
  if not others:
    return measured
  if predictor == "rlm":
    if rlm is None:
      raise InputError("--predictor=rlm: give --rlm, the folder of a model")
    predicted, error = np.asarray(rlm([text(key) for key in others])), None
  else:
    known = list(measured.by_network)
    if len(known) < _LEAST:
      raise InputError(
        f"--predictor={predictor}: {len(known)} networks were measured, and a "
        f"fit needs {_LEAST}: give more --accuracies, or --predictor=none"
      )
    values = np.asarray([measured.by_network[key] for key in known])
    fit = _FITS[predictor]
    predicted = fit(known, values, others, seed)
    error = _left_out(fit, known, values, seed)
  predicted = np.clip(predicted, 0, 1)
  name = f"predicted by {predictor}"
  return Accuracies(
    by_network=dict(zip(others, predicted.tolist())) | measured.by_network,
    source=dict.fromkeys(others, name) | measured.source,
    seeds=measured.seeds,
    error=error,
  )


def text(key: Key) -> str:
  """A network as a row of a CSV is told to a regression language model."""
  return ", ".join(f"{name}: {value}" for name, value in zip(NETWORK, key))


def _files(paths: Sequence[str]) -> list[pathlib.Path]:
  found = []
  for path in map(pathlib.Path, paths):
    path = path.expanduser()
    inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not inside:
      raise InputError(f"--accuracies={path}: there is no JSON file inside")
    found += inside
  return found


def _rows(path: pathlib.Path) -> list[tuple[str, Mapping[str, Any]]]:
  """Rows, and where each stands."""
  if path.suffix != ".json":
    rows = reading.csv_rows(path)
    return [(reading.place(path, row), row) for row in rows]
  advice = "give a result of experiments/train_lra.py, or a CSV"
  with input_files.errors_at(path, advice, "is no result file"):
    rows = json.loads(input_files.read_text(path, advice))["rows"]
    return [(f"{path} row {at}", dict(row)) for at, row in enumerate(rows, 1)]


def _parsed(row: Mapping[str, Any], place: str) -> tuple[Key, float]:
  def number(name: str, kind: type) -> Any:
    value = row.get(name)
    try:
      return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
      raise InputError(
        f"{place}: {name}={shown(value)} is no number"
      ) from error

  columns = "valid_accuracy", "accuracy", "value"
  accuracy = number(next((c for c in columns if c in row), columns[-1]), float)
  if not 0 <= accuracy <= 1:
    raise InputError(f"{place}: accuracy={accuracy} is not between 0 and 1")
  d_model = number("d_model", int)
  ratio = row.get("ratio")
  if ratio in (None, ""):
    d_ff = number("d_ff", int)
    if d_model < 1 or d_ff % d_model:
      raise InputError(
        f"{place}: d_ff={d_ff} is no multiple of d_model={d_model}"
      )
    ratio = d_ff // d_model
  else:
    ratio = number("ratio", int)
  rest = [number(name, int) for name in NETWORK[2:]]
  return (d_model, ratio, *rest), accuracy


def _features(keys: Sequence[Key]) -> np.ndarray:
  """Sizes as logarithms and counts, their squares and their products."""
  found = np.asarray(keys, np.float64)
  found[:, :2] = np.log2(found[:, :2])
  pairs = [
    found[:, a] * found[:, b]
    for a in range(found.shape[1])
    for b in range(a, found.shape[1])
  ]
  return np.column_stack([found, *pairs])


def _ridge(known, values, others, seed) -> np.ndarray:
  """Of standardised features; the strength with the least error left out."""
  del seed
  x, new = _features(known), _features(others)
  mean, spread = x.mean(0), x.std(0)
  spread = np.where(spread > 0, spread, 1.0)
  x, new = (x - mean) / spread, (new - mean) / spread
  center = values.mean()
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  best = None
  for strength in np.logspace(-3, 3, 25):
    share = s**2 / (s**2 + strength)
    fitted = u @ (share * (u.T @ (values - center)))
    # What each residual is when its own row is left out of the fit.
    leverage = (u**2 * share).sum(1) + 1 / len(values)
    left_out = (values - center - fitted) / np.maximum(1 - leverage, 1e-9)
    error = np.mean(left_out**2)
    if best is None or error < best[0]:
      best = error, strength
  weights = vt.T @ (s / (s**2 + best[1]) * (u.T @ (values - center)))
  return center + new @ weights


def _xgboost(known, values, others, seed) -> np.ndarray:
  from research.predictors import peers

  return peers.predict(
    "XGBoost",
    peers.Problem(
      train_texts=[text(key) for key in known],
      train_features=np.asarray(known, np.float64),
      train_values=values,
      test_texts=[text(key) for key in others],
      test_features=np.asarray(others, np.float64),
      seed=seed,
    ),
    threads=1,
  )


_FITS = {"ridge": _ridge, "xgboost": _xgboost}


def _left_out(fit, known, values, seed) -> float:
  """Mean absolute error on networks that a fit has not seen."""
  parts = min(_FOLDS, len(known))
  order = np.random.default_rng(seed).permutation(len(known))
  errors = []
  for part in range(parts):
    out = order[part::parts]
    kept = np.setdiff1d(order, out)
    found = fit(
      [known[at] for at in kept], values[kept], [known[at] for at in out], seed
    )
    errors += np.abs(np.clip(found, 0, 1) - values[out]).tolist()
  return float(np.mean(errors))
