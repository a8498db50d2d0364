"""Text forms of shared sets, as fields that may be reordered.

A text is a list of fields; any order of them says the same, so that orders are
data augmentation. A set may have several forms: what is measured of all that
is built (latency) reads other facts than what is measured of what works
(accuracy).

Axis letters: N rows, F features.
"""

import dataclasses
import fnmatch
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from models import input_files
from models.errors import InputError
from research.predictors import cells, made_up_numbers, public_sets, reading

Fields = Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
  """What is known of N rows.

  Attributes:
    forms: name of a form -> fields of every row.
    features: name of a form -> (N, F) float64 for tabular peers.
    columns: name -> (N,) float64, NaN where a number is missing.
  """

  forms: Mapping[str, Sequence[Fields]]
  features: Mapping[str, np.ndarray]
  columns: Mapping[str, np.ndarray]

  def column(self, name: str) -> np.ndarray:
    """A column of numbers.

    Raises:
      InputError: there is none of this name.
    """
    if name not in self.columns:
      raise InputError(
        f"there is no column {name!r}, but {', '.join(list(self.columns)[:12])}"
      )
    return self.columns[name]


def views(fields: Fields, count: int, generator: np.random.Generator):
  """A text of the fields in their order, and `count - 1` in random ones."""
  orders = [np.arange(len(fields))]
  orders += [generator.permutation(len(fields)) for _ in range(count - 1)]
  return [" ; ".join(fields[i] for i in order) for order in orders]


def nasbench201(
  path: pathlib.Path, proxies: pathlib.Path | None = None
) -> Facts:
  """Cells in three forms.

  "live" tells what carries data, as `public_sets.nasbench201` does; accuracy
  depends on that alone. "words" tells the same, every field as one word, which
  is one token: what is counted need not be put together first. "built" tells
  all six edges, which is what is run.

  Args:
    path: the cells.
    proxies: zero-cost proxies of some of them, as NASLib keeps them (JSON, set
      of images -> cell -> proxy -> score; Krishnakumar et al. 2022): columns
      proxy_NAME_SET. Accuracies in the file are not read.
  """
  rows = reading.csv_rows(path)
  columns = _columns(rows)
  accuracies = [name for name in columns if name.startswith("val_acc")]
  if not accuracies:
    raise InputError(f"{path}: has no column of numbers val_acc_...")
  anything = accuracies[0]
  table = public_sets.nasbench201(path, [anything])
  if len(table) != len(rows):
    raise InputError(f"{path}: a cell has no {anything}")
  words = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3",
           "avg_pool_3x3")  # fmt: skip
  ops = [re.findall(r"\b(\w+)~\d", row["arch_str"]) for row in rows]
  short = dict(zip(words, ("none", "skip", "point", "conv", "pool")))
  built = [
    [f"{edge} {short[op]}" for edge, op in zip("abcdef", cell)] for cell in ops
  ]
  one_hot = [[op == word for op in cell for word in words] for cell in ops]
  features = {
    "live": table.features,
    "built": np.concatenate([table.features, np.array(one_hot, float)], axis=1),
  }
  live = [_live_fields(text) for text in table.texts]
  forms = {"live": live, "words": [_as_words(f) for f in live], "built": built}
  features["words"] = features["live"]
  if proxies:
    columns |= _proxies(proxies, ops)
  return Facts(forms, features, columns)


def _as_words(fields: Fields) -> Fields:
  """Every field as one word of letters, which a BPE learns whole."""
  digits = str.maketrans({str(n): chr(ord("a") + n) for n in range(10)})
  return [field.translate(digits).replace(" ", "") for field in fields]


# Operations and edges in the order of NASLib, edges as places in `arch_str`.
_NASLIB_OPS = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1",
               "avg_pool_3x3")  # fmt: skip
_NASLIB_EDGES = (0, 1, 3, 2, 4, 5)


def _proxies(
  path: pathlib.Path, ops: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
  """Columns of the proxies, NaN where a cell has none."""
  names = [
    str(tuple(_NASLIB_OPS.index(cell[edge]) for edge in _NASLIB_EDGES))
    for cell in ops
  ]
  place = {name: row for row, name in enumerate(names)}
  columns: dict[str, np.ndarray] = {}
  with input_files.errors_at(path, wrong="has no proxies of these cells"):
    for images, cells in json.loads(reading.read_text(path)).items():
      for cell, facts in cells.items():
        for proxy, fact in facts.items():
          # The cell's name and accuracy, which stand beside the proxies, are
          # left out.
          if isinstance(fact, dict):
            name = f"proxy_{proxy}_{images}"
            column = columns.setdefault(name, np.full(len(ops), np.nan))
            column[place[cell]] = fact["score"]
  return columns


def _live_fields(text: str) -> Fields:
  """Those of a text "depth 1 skip 3 ... paths 2 conv point ; skip"."""
  head, paths = re.fullmatch(r"((?:\w+ \d+ ?)+)(.*)", text).groups()
  found = re.findall(r"\w+ \d+", head)
  return found + ([p for p in paths.split(" ; ") if p] if paths else [])


def kernel_tuner(path: pathlib.Path, hidden: Sequence[str] = ()) -> Facts:
  """Settings of a GPU kernel; those that never change are left out.

  Where there are settings block_size_* and tile_size_*, threads of a block,
  points of a thread and points of a block are told too, to peers as well: they
  are products of the settings. Settings may be words.

  Args:
    path: the table, one with a heading of any kind.
    hidden: patterns of columns that are no settings, beside "time_*"; what
      stands behind a colon is no part of them.
  """
  rows = reading.csv_rows(path)
  columns = _columns(rows)
  patterns = ["time_*", *(name.partition(":")[0] for name in hidden)]
  settings = [
    name
    for name in rows[0]
    if not any(fnmatch.fnmatch(name, p) for p in patterns)
  ]
  if not settings:
    raise InputError(f"{path}: has no column of settings")
  told = {
    name.replace("_", ""): [_said(row[name]) for row in rows]
    for name in settings
    if len({row[name] for row in rows}) > 1
  }
  features = cells.features(rows, settings, cells.Spelling()).values
  products = {}
  with np.errstate(invalid="ignore", over="ignore"):
    for name, part in (("threads", "block_size"), ("points", "tile_size")):
      found = [columns[n] for n in settings if n.startswith(part)
               and n in columns]  # fmt: skip
      if found:
        products[name] = np.prod(found, axis=0)
    if len(products) == 2:
      products["area"] = products["threads"] * products["points"]
  told |= {n: [f"{v:g}" for v in values] for n, values in products.items()}
  fields = [
    [f"{name} {values[i]}" for name, values in told.items()]
    for i in range(len(rows))
  ]
  features = np.column_stack([features, *products.values()])
  return Facts({"settings": fields}, {"settings": features}, columns)


def _said(cell: str) -> str:
  """A setting in a text: numbers in their shortest form."""
  number = cells.Spelling().number(cell)
  return cell.strip() if number is None else f"{number:g}"


def _columns(rows: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
  """The columns that hold numbers, missing ones as NaN."""
  found = {}
  spelling = cells.Spelling()
  for name in rows[0]:
    there = [not spelling.is_missing(row[name]) for row in rows]
    numbers = [spelling.number(row[name]) for row in rows]
    if not any(number is None and t for number, t in zip(numbers, there)):
      column = [n if t else np.nan for n, t in zip(numbers, there)]
      found[name] = np.array(column, np.float64)
  return found


SETS: dict[str, Callable[..., Facts]] = {
  "nasbench201": nasbench201,
  "kernel_tuner": kernel_tuner,
}


def with_made_up(facts: Facts, form: str, draws: int) -> Facts:
  """The facts with columns made_up_0, made_up_1, ... of a form's features.

  Raises:
    InputError: the features are no counts.
  """
  if not draws:
    return facts
  found = made_up_numbers.columns(facts.features[form], draws)
  named = {f"made_up_{i}": found[:, i] for i in range(draws)}
  return dataclasses.replace(facts, columns={**facts.columns, **named})


def load(
  kind: str,
  path: str | pathlib.Path,
  proxies: str | pathlib.Path | None = None,
  hidden: Sequence[str] = (),
) -> Facts:
  """Reads a set.

  Args:
    kind: one of `SETS`.
    path: its file.
    proxies: see `nasbench201`.
    hidden: see `kernel_tuner`.

  Raises:
    InputError: it is unknown or cannot be read.
  """
  if kind not in SETS:
    raise InputError(f"set {kind!r} is unknown: take one of {list(SETS)}")
  if proxies and kind != "nasbench201":
    raise InputError(f"proxies are of nasbench201, not of {kind!r}")
  path = pathlib.Path(path).expanduser()
  with input_files.errors_at(path, wrong=f"is no set {kind}"):
    if kind == "nasbench201":
      return nasbench201(path, proxies and pathlib.Path(proxies).expanduser())
    return SETS[kind](path, hidden)
