"""Flags that say what is transferred: which tables and tasks, which settings.

A script that takes them says `flags.adopt_module_key_flags(transfer_flags)`, so
that its `--help` lists them.
"""

from typing import Any

from absl import flags

import cli
import option_flags
import table_flags
from models.errors import InputError
from research.regression_lm.transfer.options import Settings, best_of

flags.adopt_module_key_flags(table_flags)
OWN = "csv"
DATA = cli.choice(
  "data", OWN, "set; csv is any table, also JSON lines",
  (OWN, "nasbench201", "kernel_tuner"),
)  # fmt: skip
PATH = flags.DEFINE_string("path", None, "file of the set, or of the new task")
TARGETS = flags.DEFINE_list("targets", [], "columns, as name or name:form")
SOURCES = flags.DEFINE_list("sources", [], "likewise; lat_* takes all such")
_SOURCE_PATHS = flags.DEFINE_list(
  "source_paths", [], "of csv: tables of what was measured before"
)
_TASK_COLUMN = flags.DEFINE_string(
  "task_column", None, "of csv: says of which task a row is, such as a device"
)
_NEW_TASK = flags.DEFINE_string(
  "new_task", None, "what --task_column says of the rows to predict"
)
_FROM = flags.DEFINE_list(
  "settings_from", [], "results: take the settings of the best of them"
)
MEASURE = cli.choice("measure", "kendall", "best by", ("kendall", "spearman"))
_OPTIONS = option_flags.define(Settings)


def settings() -> tuple[Settings, dict[str, Any]]:
  """The settings, and how they were chosen."""
  flagged = {name: flag.value for name, flag in _OPTIONS.items()}
  if not _FROM.value:
    return Settings(**flagged), {"how": "as the flags say"}
  # Flags that are given beside the results, such as a larger ensemble, win.
  present = {n: v for n, v in flagged.items() if flags.FLAGS[n].present}
  return best_of(_FROM.value, TARGETS.value, MEASURE.value, present)


def sources(own=None) -> list[str]:
  """Names of the columns to learn first.

  Args:
    own: tables of a user, if they are such.
  """
  if own is None:
    return SOURCES.value
  return [*own.sources, *filter(_is_made_up, SOURCES.value)]


def _is_made_up(name: str) -> bool:
  return name.startswith("made_up_")


def own_tasks():
  """`OwnTasks` of a user's tables; None where --data is a set.

  Raises:
    InputError: a file is not there, or does not do.
  """
  paths = [PATH.value, *_SOURCE_PATHS.value]
  for path in paths:
    cli.check_path(path)
  if DATA.value != OWN:
    if _SOURCE_PATHS.value or _TASK_COLUMN.value:
      raise InputError(
        "--source_paths and --task_column are of --data=csv: leave them out"
      )
    return None
  from research.predictors import own_tasks, tables

  return own_tasks.read(
    own_tasks.Where(
      path=PATH.value,
      targets=TARGETS.value,
      sources=[name for name in SOURCES.value if not _is_made_up(name)],
      source_paths=_SOURCE_PATHS.value,
      task_column=_TASK_COLUMN.value,
      new_task=_NEW_TASK.value,
      layout=tables.Layout(**table_flags.layout()),
    )
  )
