"""Rows of a file as the texts that a model was trained on, without JAX."""

import pathlib
from typing import Any, Protocol

from models.errors import InputError
from research.predictors import new_rows, tables
from research.predictors.data_options import DataOptions
from research.predictors.new_rows import NewRows
from research.predictors.seen import Column


class Model(Protocol):
  """What is asked of a model: a `RegressionLM`, or a `Described` alone."""

  @property
  def info(self) -> dict[str, Any]:
    """What `training` wrote down."""

  @property
  def num_objectives(self) -> int:
    """Numbers of a row."""


def targets_of(model: Model) -> list[str]:
  """Names of what a model predicts: those of its data, or y, or y1, y2, ..."""
  named = (model.info.get("data") or {}).get("targets") or []
  if len(named) == model.num_objectives:
    return list(named)
  count = model.num_objectives
  return ["y"] if count == 1 else [f"y{i}" for i in range(1, count + 1)]


def read(
  model: Model,
  path: str | pathlib.Path,
  given: tables.Layout,
  *,
  any_cell: bool = False,
) -> NewRows:
  """Reads rows as the model's training read its own.

  Args:
    model: with what `training` wrote down.
    path: of the rows.
    given: what differs from training; see `new_rows.read`.
    any_cell: take cells that are unlike all of training.

  Raises:
    InputError: the file does not do, or texts of the model are not written of
      columns and `given` names no column of texts.
  """
  described = model.info.get("data") or {}
  options = DataOptions.from_json({"kind": "", **described})
  kept = model.info.get("columns")
  if not isinstance(kept, list | None):
    kept = [kept]
  columns = kept and [Column.from_json(value) for value in kept]
  trained = options.layout("x" if options.kind == "jsonl" else None)
  made_by_set = options.kind not in ("csv", "jsonl")
  if made_by_set and not columns and not (given.text or given.columns):
    kind = options.kind or "no file"
    raise InputError(
      f"the model was trained on texts of {kind}: write such texts into a "
      "column and name it with --text_column"
    )
  return new_rows.read(
    path, targets_of(model), trained, columns, given, any_cell=any_cell
  )
