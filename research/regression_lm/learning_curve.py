"""Models and peers by the number of training examples, over seeds."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models import input_files
from models.errors import InputError
from research.core import files, metrics
from research.predictors.calibration import Margins, Prediction
from research.predictors.data_options import DataOptions
from research.predictors.splits import Split
from research.predictors.tables import Table
from research.regression_lm import data_sets, evaluate
from research.regression_lm.api import RegressionLM
from research.regression_lm.fine_tuning import FineTuneOptions
from research.regression_lm.options import Options

Say = Callable[[str], None]
# Of intervals, which validation calibrates.
_LEVEL = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """What is compared.

  Attributes:
    data: which data; its `train`, `valid` and `split_seed` are not used.
    sizes: numbers of training examples; a share of them is for validation.
    valid_share: that share.
    seeds: splits, and models of each.
    model: sizes, tokenizer and numbers of a model from scratch.
    fine_tune: how it is trained.
    start: folder of a model to begin with instead.
    ensemble: models that are trained on a split, their draws pooled.
    num_samples: draws of each.
    peers: names of peers.
    tests: test rows at most; the same for all sizes and seeds.
  """

  data: DataOptions
  sizes: Sequence[int]
  valid_share: float = 0.2
  seeds: int = 3
  model: Options
  fine_tune: FineTuneOptions
  start: str | None = None
  ensemble: int = 1
  num_samples: int = 64
  peers: Sequence[str]
  tests: int = 5000


def run(
  curve: Curve, table: Table, workdir: pathlib.Path, say: Say
) -> list[dict[str, Any]]:
  """Trains and evaluates; parts that are done in `workdir` are read.

  Args:
    curve: what is compared.
    table: all rows.
    workdir: keeps the rows of each size and seed.
    say: prints a line.

  Returns:
    Rows as `evaluate.rows`, one set for each size and seed, with "train" and
    "seed".

  Raises:
    InputError: there are too few rows.
  """
  rows = []
  for size in curve.sizes:
    for seed in range(curve.seeds):
      kept = workdir / f"{size}-{seed}.json"
      if kept.exists():
        part = _read(kept)
      else:
        part = _one(curve, table, size, seed, say)
        files.write_json(kept, metrics.to_json_value(part))
      rows += part
      say(f"{size} examples, seed {seed}: {_line(part)}")
  return rows


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  return input_files.read_kept(path, list)


def _line(rows: Sequence[dict[str, Any]]) -> str:
  found = [
    f"{row['method']} {row['value']:.3f}"
    for row in rows
    if row["metric"] == "kendall"
  ]
  return "Kendall's tau " + ", ".join(found)


def _one(
  curve: Curve, table: Table, size: int, seed: int, say: Say
) -> list[dict[str, Any]]:
  parts = split(curve, table, size, seed)
  draws, held_out, means = [], [], []
  known = table.examples(np.concatenate([parts.train, parts.valid]))
  for member in range(curve.ensemble):
    lm = make(curve, table, parts, 1000 * seed + member)
    data_sets.check_targets(table, parts, lm.model.codec.format)
    history = lm.fine_tune(
      table.examples(parts.train),
      table.examples(parts.valid) if len(parts.valid) else None,
      options=curve.fine_tune,
      seed=1000 * seed + member,
    )
    sample = lambda rows, lm=lm, member=member: lm.sample(
      [table.texts[i] for i in rows], curve.num_samples, seed=member
    )
    draws.append(sample(parts.test))
    held_out.append(sample(parts.valid))
    means.append(lm.expected([table.texts[i] for i in parts.test], known))
  margins = None
  if len(parts.valid):
    margins = Margins.fit(
      np.concatenate(held_out, 1), table.values[parts.valid], _LEVEL
    )
  pooled = Prediction(np.concatenate(draws, 1), _LEVEL, margins)
  answers = evaluate.answers_of_peers(
    table, parts, curve.peers, seed=seed, say=say
  )
  rows = []
  for found in evaluate.predictions(
    table, parts, pooled, answers, expected=np.mean(means, axis=0)
  ):
    rows += evaluate.rows(
      found,
      system="regression_lm",
      data=curve.data.kind,
      train=size,
      seed=seed,
      best_epoch=history.best_epoch,
      num_params=lm.num_params,
    )
  return rows


def split(curve: Curve, table: Table, size: int, seed: int) -> Split:
  """The parts of one size and seed; the test is the same for all sizes.

  With `by_group` all rows of a group are tested, or none.

  Raises:
    InputError: there are too few rows.
  """
  order = np.random.default_rng((seed, 31)).permutation(len(table))
  count = min(curve.tests, len(order) - max(curve.sizes))
  groups = None
  if curve.data.by_group:
    # Rows of a group stand together, in the order of each group's first.
    _, groups = np.unique(np.asarray(table.groups), return_inverse=True)
    first = np.full(groups.max() + 1, len(order))
    np.minimum.at(first, groups[order], np.arange(len(order)))
    order = order[np.argsort(first[groups[order]], kind="stable")]
    borders = _borders(groups[order])
    count = int(borders[borders <= count].max(initial=0))
  test = order[: max(count, 0)]
  if not len(test) or size < 2:
    raise InputError(
      f"{len(table)} rows leave no test beside {max(curve.sizes)} for training:"
      " take smaller --sizes"
    )
  known = order[len(test) : len(test) + size]
  cut = round(size * curve.valid_share)
  if groups is not None:
    borders = _borders(groups[known])
    if cut and len(borders):
      cut = int(borders[borders <= cut].max(initial=borders[0]))
  return Split(train=known[cut:], valid=known[:cut], test=test)


def _borders(groups: np.ndarray) -> np.ndarray:
  """Numbers of first rows that cut no group of rows."""
  return np.flatnonzero(groups[1:] != groups[:-1]) + 1


def make(curve: Curve, table: Table, parts: Split, seed: int) -> RegressionLM:
  """A model before training."""
  if curve.start:
    return RegressionLM.from_pretrained(curve.start)
  o = curve.model
  return RegressionLM.from_scratch(
    [table.texts[i] for i in parts.train],
    tokenizer=o.tokenizer,
    vocab_size=o.vocab_size,
    size=o.size,
    numbers=o.number_format(),
    num_objectives=len(table.targets),
    max_length=o.max_length,
    seed=seed,
    dtype=o.dtype,
    **o.sizes(),
  )
