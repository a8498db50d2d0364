"""Rows of a new task without a number, by models that learned the others."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from models.errors import InputError
from research.predictors import calibration
from research.predictors.new_rows import NewRows
from research.predictors.number_scale import NumberScale
from research.predictors.own_tasks import FORM, OwnTasks
from research.regression_lm.transfer import adaptation, parts, preparation
from research.regression_lm.transfer import setup as transfer_setup
from research.regression_lm.transfer.options import Settings
from research.regression_lm.transfer.setup import Split

_KINDS = ("median", "low", "high")


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
  """Predictions of M rows.

  Attributes:
    rows: as they stand in the file.
    columns: name, such as "ms_median" -> (M,) numbers; low and high are the
      ends of 90% intervals.
  """

  rows: NewRows
  columns: dict[str, np.ndarray]

  def lines(self) -> list[dict[str, Any]]:
    """One mapping a row."""
    return [
      {name: float(column[i]) for name, column in self.columns.items()}
      for i in range(len(self.rows))
    ]


def unknown(own: OwnTasks) -> np.ndarray:
  """Rows of the new task that lack the number of a target.

  Raises:
    InputError: there are none.
  """
  values = np.stack([own.facts.columns[name] for name in own.targets])
  found = np.flatnonzero(own.is_new & np.isnan(values).any(axis=0))
  if not len(found):
    raise InputError(
      "--out: all rows of the new task have their numbers: leave those to "
      "predict empty"
    )
  return found


def predict(
  settings: Settings, own: OwnTasks, say: Callable[[str], None]
) -> Answers:
  """Learns the sources, then all known rows of the new task, and predicts.

  Args:
    settings: of the models.
    own: all rows.
    say: told what is done.

  Raises:
    InputError: nothing is to predict, or too few numbers are known.
  """
  asked = unknown(own)
  facts = own.facts
  values = np.stack([facts.columns[name] for name in own.targets])
  known = np.flatnonzero(np.isfinite(values).all(axis=0))
  if len(known) < 2:
    raise InputError(
      f"{len(known)} rows of the new task have all numbers: measure two at "
      "least"
    )
  order = np.random.default_rng((0, 31)).permutation(len(known))
  split = Split(asked, known[order])
  named = lambda names: [
    transfer_setup.Task(column=name, form=FORM) for name in names
  ]
  setup = transfer_setup.make(
    settings,
    targets=named(own.targets),
    sources=named(own.sources),
    sizes=[len(known)],
    seeds=1,
  )
  prepared = preparation.prepare(setup, facts)
  start = adaptation.pretrain(setup, facts, prepared, [split], say)
  found = adaptation.train(
    setup, facts, prepared, [split], start, len(known), say
  )
  columns = {}
  for place, name in enumerate(own.targets):
    part = found[place, 0]
    middle = calibration.weighted_quantile(part.atoms, part.chances, 0.5)
    ends = parts.widened(
      part, facts.columns[name][split.known], NumberScale.of(values[place])
    )
    for kind, column in zip(_KINDS, (middle, *ends)):
      columns[f"{name}_{kind}"] = column
  rows = [own.rows[i] for i in asked]
  texts = [" ; ".join(facts.forms[FORM][i]) for i in asked]
  names = list(dict.fromkeys(name for row in rows for name in row))
  return Answers(NewRows(texts, rows, names), columns)
