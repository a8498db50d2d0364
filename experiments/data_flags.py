"""Flags that say which examples a regression language model is given.

A script that takes them says `flags.adopt_module_key_flags(data_flags)`, so
that its `--help` lists them.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags

import cli
import table_flags
from models.errors import InputError
from research.predictors.data_options import DataOptions
from research.predictors.tables import Table
from research.regression_lm import data_sets
from research.regression_lm.data_sets import DENSITY, KINDS

flags.adopt_module_key_flags(table_flags)
DATA = cli.choice("data", "csv", "kind of --path", KINDS)
PATH = flags.DEFINE_string("path", None, "file or folder of the data")
TARGETS = flags.DEFINE_list("targets", [], "columns to predict, in order")
_GROUP = flags.DEFINE_string(
  "group_column", None, "of jsonl and csv: rows that belong together"
)
_BY_GROUP = flags.DEFINE_bool(
  "by_group", False, "hold out whole groups, such as all runs of a program"
)
_NAMED = flags.DEFINE_string(
  "split",
  None,
  "one that the data brings with it, such as random, operators or sizes of"
  " programs; --train and --test then only cap the rows",
)
_TRAIN = cli.number(
  "train", 0.8, "share of the rows (or groups), or their number", 0.0
)
_VALID = cli.number("valid", 0.1, "share or number of rows", 0.0)
_TEST = cli.integer("test", 0, "rows of the test at most; 0 takes all", 0)
_SHOTS = cli.integer(
  "prompt_shots", 0, "others of a group in front of a text, at most", 0, 1024
)
_COPIES = cli.integer(
  "text_copies",
  1,
  "texts of one meaning for each training row of programs, its own among them:"
  " other names, another order",
  1,
  1024,
)
_SEED = cli.integer("split_seed", 0, "of the split", 0)


def read(options: DataOptions) -> Table | None:
  """The table of --path, before JAX is imported; None where there is none.

  Raises:
    InputError: the data needs a path, which leads nowhere or to something else.
  """
  if options.kind == DENSITY:
    return None
  if not PATH.value:
    raise InputError(
      f"--data={options.kind} needs --path of its file or folder"
    )
  cli.check_path(PATH.value)
  return data_sets.load(options, PATH.value)


def data_options(described: Mapping[str, Any] | None = None) -> DataOptions:
  """The flags as options, or the options that a model was trained with."""
  if described:
    return DataOptions.from_json(described)
  return DataOptions(
    kind=DATA.value,
    targets=tuple(TARGETS.value),
    group=_GROUP.value,
    **table_flags.layout(),
    by_group=_BY_GROUP.value,
    train=_TRAIN.value,
    valid=_VALID.value,
    test=_TEST.value,
    split_seed=_SEED.value,
    named=_NAMED.value,
    prompt_shots=_SHOTS.value,
    text_copies=_COPIES.value,
  )
