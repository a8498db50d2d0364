"""The data sets that a regression language model may be given, by name."""

import pathlib

import numpy as np

from models import input_files
from models.errors import InputError
from models.numbers import Ieee, Normalized, NumberFormat
from research.predictors import program_table, public_sets, tables
from research.predictors.data_options import DataOptions
from research.predictors.splits import Split
from research.predictors.tables import Table

DENSITY, PROGRAMS = "density", "programs"
SETS = public_sets.SETS | {PROGRAMS: program_table.programs}
KINDS = ("jsonl", "csv", *SETS, DENSITY)


def load(options: DataOptions, path: str | pathlib.Path) -> Table:
  """Reads the table that options name.

  Args:
    options: which data.
    path: of the file, or of the set's folder.

  Raises:
    InputError: it cannot be read, or its texts have no copies.
  """
  o, path = options, pathlib.Path(path).expanduser()
  if o.kind == "jsonl":
    table = tables.read_jsonl(path, o.targets, o.layout("x"))
  elif o.kind == "csv":
    table = tables.read_csv(path, o.targets, o.layout())
  elif o.kind == PROGRAMS and o.text is not None:
    table = program_table.programs(path, o.targets, o.text)
  elif o.kind in SETS:
    with input_files.errors_at(path, wrong=f"is no set {o.kind}"):
      table = SETS[o.kind](path, o.targets)
  else:
    raise InputError(
      f"data {o.kind!r} is unknown: take jsonl, csv or one of {list(SETS)}"
    )
  if o.text_copies > 1 and table.other_texts is None:
    raise no_copies(o)
  if o.text_copies > 1 and o.prompt_shots:
    raise InputError(
      "--text_copies and --prompt_shots: a copy in front of a text would "
      "tell its numbers: give one of them"
    )
  return table


def no_copies(options: DataOptions) -> InputError:
  """What is wrong where a row has one text alone."""
  text = f" --text_column={options.text}" if options.text else ""
  return InputError(
    f"--text_copies={options.text_copies}: --data={options.kind}{text} knows "
    "one text a row: leave it at 1, or take --data=programs with "
    "--text_column=source, typed or sized"
  )


def check_targets(table: Table, parts: Split, numbers: NumberFormat) -> None:
  """Checks that the number format holds the targets of training.

  Raises:
    InputError: it does not; names the place of one and the flag that helps.
  """
  rows = np.concatenate([parts.train, parts.valid])
  values = table.values[rows]
  for row, place in np.argwhere(np.isinf(values)):
    if not numbers.special:
      raise InputError(
        f"{table.place(rows[row])}: {table.targets[place]} is "
        f"{values[row, place]}: mend it, give --missing to leave it out, or "
        "--special to write them"
      )
  if isinstance(numbers, Normalized):
    return  # It says itself what lies outside of [0, 1].
  lost = numbers.lost(values)
  for place, name in enumerate(table.targets):
    for wrong, what in zip(lost, ("too large for", "0 in")):
      found = np.flatnonzero(wrong[:, place])
      if len(found):
        first = rows[found[0]]
        raise InputError(
          f"{len(found)} of {len(rows)} targets {name!r} are {what} the "
          f"format of numbers, such as {table.values[first, place]:g} "
          f"({table.place(first)}): give {_larger(numbers)}"
        )


def _larger(numbers: NumberFormat) -> str:
  """The flag that lets a number format hold more."""
  if isinstance(numbers, Ieee):
    return f"--exponent_digits={numbers.exponent_digits + 1}"
  return f"--exponent_range={2 * numbers.exponent_range}, or --numbers=ieee"
