"""Peers of `transfer` on the same rows, and the ridge over source numbers."""

from collections.abc import Callable, Sequence

import numpy as np

from models.errors import InputError
from research.predictors import peers
from research.predictors.number_scale import NumberScale
from research.predictors.text_forms import Facts
from research.regression_lm.transfer import setup as transfer_setup
from research.regression_lm.transfer.names import PER_SOURCE, WITH_SOURCES
from research.regression_lm.transfer.setup import (
  Found,
  Setup,
  Split,
  Task,
  source_rows,
)


def predict(
  name: str, setup: Setup, facts: Facts, task: Task, split: Split, size: int,
  seed: int,
) -> Found:  # fmt: skip
  """Predictions of a peer for one target.

  Args:
    name: one of `names.PEERS`, not of `PER_SOURCE`. `WITH_SOURCES` is given the
      numbers of the sources beside the features.
    setup: the comparison.
    facts: all rows.
    task: the target.
    split: rows.
    size: examples.
    seed: of what is random.

  Raises:
    InputError: the peer is unknown, or there are no such sources.
  """
  features = None
  values = facts.column(task.column)
  if name == WITH_SOURCES:
    if not setup.sources or setup.source_rows:
      raise InputError(f"peer {name!r} needs sources that are known of all")
    columns = [facts.column(source.column) for source in setup.sources]
    if np.isnan(np.stack(columns)[:, split.known]).all():
      raise InputError(
        f"peer {name!r}: the sources are of other rows: take 'XGBoost per "
        "source + ridge'"
      )
    own = facts.features[task.form]
    features = np.concatenate([own, np.stack(columns, axis=1)], axis=1)
    name = "XGBoost"
  examples = split.known[:size]
  told = lambda known, asked: _one(
    name, facts, task, known, values, asked, seed, features
  )
  held = held_out(
    transfer_setup.folds(setup, size, seed),
    lambda rest, fold: told(examples[rest], examples[fold]),
  )
  return Found.of_points(told(examples, split.test), held)


def held_out(
  folds: Sequence[np.ndarray],
  predict_fold: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray | None:
  """What each example is said to be by the others; None without folds.

  Args:
    folds: places of the examples.
    predict_fold: takes the places of the others and of a fold, and predicts it.
  """
  if not folds:
    return None
  places = np.concatenate(folds)
  said = [predict_fold(np.setdiff1d(places, fold), fold) for fold in folds]
  return np.concatenate(said)[np.argsort(places)]


def said_of_sources(
  name: str, setup: Setup, facts: Facts, split: Split, asked: np.ndarray,
  seed: int,
) -> np.ndarray:  # fmt: skip
  """What a peer says of rows (R,), one model a source: (R, sources).

  Args:
    name: of `PER_SOURCE`.
    setup: the comparison.
    facts: all rows.
    split: rows.
    asked: (R,) rows.
    seed: of what is random.

  Raises:
    InputError: there are no sources.
  """
  if not setup.sources:
    raise InputError(f"peer {name!r} needs --sources")
  rows = source_rows(setup, facts, split)
  said = []
  for source in setup.sources:
    column = facts.column(source.column)
    own = rows[np.isfinite(column[rows])]
    if PER_SOURCE[name] == "ridge":
      x = facts.features[source.form]
      said.append(ridge(x[own], column[own], x[asked]))
    else:
      said.append(
        _one(PER_SOURCE[name], facts, source, own, column, asked, seed)
      )
  return np.stack(said, axis=1)


def _one(
  name, facts, task, train, values, test, seed, features=None
) -> np.ndarray:
  texts = facts.forms[task.form]
  features = facts.features[task.form] if features is None else features
  written = lambda rows: [" ; ".join(texts[i]) for i in rows]
  problem = peers.Problem(
    train_texts=written(train),
    train_features=features[train],
    train_values=values[train],
    test_texts=written(test),
    test_features=features[test],
    seed=seed,
    scale=NumberScale.of(values),
  )
  return peers.predict(name, problem)


def _filled(x: np.ndarray, known: np.ndarray) -> np.ndarray:
  """The features with the means of known ones in gaps, 0 where all are gaps."""
  there = np.isfinite(known)
  mean = np.where(there, known, 0).sum(0) / np.maximum(there.sum(0), 1)
  return np.where(np.isfinite(x), x, mean)


def ridge(
  train: np.ndarray, values: np.ndarray, test: np.ndarray
) -> np.ndarray:
  """Ridge regression whose strength has the least leave-one-out error.

  Args:
    train: (N, F).
    values: (N,).
    test: (M, F).

  Returns:
    (M,).
  """
  train, test = _filled(train, train), _filled(test, train)
  mean, spread = train.mean(0), train.std(0) + 1e-12
  x, z = (train - mean) / spread, (test - mean) / spread
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  y = values - values.mean()
  best, weights = np.inf, np.zeros(x.shape[1])
  for alpha in np.logspace(-3, 3, 13):
    shrink = s**2 / (s**2 + alpha)
    # The term 1 / N comes of the mean, which is fitted too.
    leverage = (u**2 * shrink).sum(1) + 1 / len(y)
    left_out = (y - u @ (shrink * (u.T @ y))) / np.maximum(1 - leverage, 1e-9)
    error = np.mean(left_out**2)
    if error < best:
      best, weights = error, vt.T @ (s / (s**2 + alpha) * (u.T @ y))
  return z @ weights + values.mean()
