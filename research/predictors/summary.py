"""What a table holds, told before anything is learned from it."""

import numpy as np

from research.predictors import measures, splits
from research.predictors.splits import Split
from research.predictors.tables import Table

# Letters of a text, and names of features, that are shown.
_LETTERS, _NAMES = 160, 12
# Rank correlation of a feature that is told as a leak, of so many rows.
_ALIKE, _ENOUGH = 0.98, 10


def lines(table: Table, parts: Split) -> list[str]:
  """Rows, targets, what text and peers see, and repeats across the split.

  Args:
    table: all rows.
    parts: its split.
  """
  counts = [len(part) for part in (parts.train, parts.valid, parts.test)]
  found = [
    f"{len(table)} rows: {counts[0]} for training, {counts[1]} for validation, "
    f"{counts[2]} for the test",
    *table.notes,
  ]
  for place, name in enumerate(table.targets):
    column = table.values[:, place]
    there = column[np.isfinite(column)]
    missing = int(np.isnan(column).sum())
    told = f"target {name}: " + (
      f"{there.min():g} to {there.max():g}" if len(there) else "no number"
    )
    found.append(told + (f", {missing} missing" if missing else ""))
  found.append(f"text: {_short(table.texts[int(parts.train[0])])}")
  found.append(f"peers: {seen_by_peers(table)}")
  if gaps := _gaps(table):
    found.append(f"missing numbers: {gaps}")
  for place, name in enumerate(table.targets):
    for other, alike in _alike(table, table.values[:, place]):
      found.append(
        f"warning: {other} ranks rows as {name} does ({alike:.3f}): if it is "
        "another result, give --leave_out"
      )
  if repeated := splits.repeats(table, parts):
    found.append(
      f"warning: {repeated} of {counts[2]} test rows have the text of a known "
      "row: --by_group holds out all rows of a text, or of a --group_column"
    )
  return found


def seen_by_peers(table: Table) -> str:
  """What tabular peers are given, in words."""
  words: dict[str, int] = {}
  for name in table.feature_names:
    column = name.partition(" = ")[0]
    words[column] = words.get(column, 0) + (column != name)
  told = [f"{n} ({k} words)" if k else n for n, k in words.items()]
  if len(told) > _NAMES:
    told = [*told[:_NAMES], f"{len(told) - _NAMES} more"]
  if told:
    return ", ".join(told) + (", words of the text" if table.words else "")
  count = table.features.shape[1]
  return f"{count} numbers of the text" if count else "words of the text"


def _gaps(table: Table) -> str:
  """Columns of numbers that rows lack, and how many rows lack them."""
  missing = np.isnan(table.features).sum(axis=0)
  named = zip(table.feature_names, missing.tolist())
  told = [f"{name} {count}" for name, count in named if count]
  if len(told) > _NAMES:
    told = [*told[:_NAMES], f"{len(told) - _NAMES} more"]
  return ", ".join(told)


def _alike(table: Table, truth: np.ndarray) -> list[tuple[str, float]]:
  """Features that tell a target, or nearly so."""
  found = []
  for name, column in zip(table.feature_names, table.features.T):
    there = np.isfinite(truth) & np.isfinite(column)
    if there.sum() >= _ENOUGH:
      alike = measures.spearman(column[there], truth[there])
      if abs(alike) > _ALIKE:
        found.append((name, alike))
  return found


def _short(text: str) -> str:
  text = " ".join(text.split())
  return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} ..."
