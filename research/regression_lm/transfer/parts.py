"""Finished parts of a transfer comparison in a folder, and rows from them.

A part is a method's predictions of one target, size and seed. Parts may come
from several machines: copied into one folder, they are joined.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.core import files, intervals
from research.predictors import calibration, measures
from research.predictors.calibration import Margins
from research.predictors.number_scale import NumberScale
from research.predictors.text_forms import Facts
from research.regression_lm.transfer import names
from research.regression_lm.transfer import setup as transfer_setup
from research.regression_lm.transfer.setup import Found, Setup, Split

OURS = "regression LM"
_FIELDS = ("points", "atoms", "chances")
_HELD = "held_"
# Of intervals.
_LEVEL = 0.9


def path(folder: pathlib.Path, method: str, *names: Any) -> pathlib.Path:
  """The file of a part; `names` are target, size and seed."""
  slug = re.sub(r"\W+", "_", method)
  return folder / f"{'-'.join([slug, *map(str, names)])}.npz"


def write(folder: pathlib.Path, method: str, found: Found, *names: Any):
  """Writes a part, by rename."""
  arrays = {"method": np.array(method)}
  for prefix, part in (("", found), (_HELD, found.held)):
    if part is not None:
      for name in _FIELDS:
        value = getattr(part, name).astype(np.float32)
        arrays[f"{prefix}{name}"] = value
  files.write_npz(path(folder, method, *names), arrays)


def read(file: pathlib.Path) -> tuple[str, Found]:
  """Method and predictions of a part.

  Raises:
    InputError: it is damaged.
  """
  arrays = files.read_npz(file)
  try:
    method = str(arrays["method"])
    points = arrays["points"].astype(float)
    if "draws" in arrays:  # Parts of before: quantiles, each as likely.
      atoms = arrays["draws"].astype(float)
      even = np.full(atoms.shape, 1 / atoms.shape[1])
      return method, Found(points, atoms, even)
    told = lambda before: (
      arrays[f"{before}{name}"].astype(float) for name in _FIELDS
    )
    held = Found(*told(_HELD)) if f"{_HELD}points" in arrays else None
    return method, Found(*told(""), held)
  except (KeyError, ValueError) as error:
    raise InputError(f"{file} is damaged: remove it") from error


def rows(
  setup: Setup, facts: Facts, parts: Sequence[Split], folder: pathlib.Path,
  *, num_samples: int = 100,
) -> list[dict[str, Any]]:  # fmt: skip
  """Result rows of all parts that are there.

  Of the ranking measures a row also tells the difference of each of our
  methods to the best peer, paired on the test rows, with a 95% interval. Where
  an example has the text of a test row, such rows are left out of measures
  "..., without twins". Intervals of 90% that the errors on held-out folds of
  the examples calibrated are judged as "..., calibrated".
  """
  found = []
  for task in setup.targets:
    for size in setup.sizes:
      for seed, split in enumerate(parts):
        name = "-".join(map(str, (task.column, size, seed)))
        methods = dict(map(read, sorted(folder.glob(f"*-{name}.npz"))))
        column = facts.column(task.column)
        truth, known = column[split.test], column[split.known[:size]]
        margins = _margins(methods, known, NumberScale.of(column))
        shared = {
          "target": task.column,
          "train": size,
          "seed": seed,
          "tests": len(truth),
        }
        measured = _measured(methods, truth, margins, num_samples)
        alone = ~transfer_setup.twins(facts, task, split, size)
        if methods and 2 <= alone.sum() < len(alone):
          shared["twins"] = int((~alone).sum())
          few = {name: part.take(alone) for name, part in methods.items()}
          measured += [
            row | {"metric": f"{row['metric']}, without twins"}
            for row in _measured(few, truth[alone], margins, num_samples)
          ]
        found += [shared | row for row in measured]
  return found


def _margins(methods, known, scale) -> dict[str, Margins]:
  """Of the methods that predicted every example from the others.

  A method's errors are told on the scale that it was fitted on.
  """
  found = {}
  for method, part in methods.items():
    if part.held is not None:
      if len(part.held.points) != len(known):
        raise InputError(f"a part of {method!r} is of another split: remove it")
      low, high = part.held.interval(_LEVEL)
      plain = method.removeprefix(f"{OURS}, ") in names.PLAIN
      own = NumberScale() if plain else scale
      found[method] = Margins.of_ends(
        low[:, None], high[:, None], known[:, None], _LEVEL, [own]
      )
  return found


def widened(
  part: Found, known: np.ndarray, scale: NumberScale
) -> tuple[np.ndarray, np.ndarray]:
  """Ends of 90% intervals (M,), calibrated where examples were held out.

  Args:
    part: predictions of M rows.
    known: numbers of the examples, in their order.
    scale: of the numbers.
  """
  low, high = part.interval(_LEVEL)
  margins = _margins({"": part}, known, scale).get("")
  if margins is None:
    return low, high
  return margins.widen(low[:, None], -1)[:, 0], margins.widen(high[:, None], 1)[
    :, 0
  ]


def _of_interval(ends, truth, more="") -> dict[str, float]:
  low, high = ends
  inside = (low <= truth) & (truth <= high)
  scores = calibration.interval_score(low, high, truth, _LEVEL)
  return {
    f"coverage of {_LEVEL}{more}": float(np.mean(inside)),
    f"interval score of {_LEVEL}{more}": float(np.nanmean(scores)),
  }


def _measured(methods, truth, margins, num_samples) -> list[dict[str, Any]]:
  found = []
  for method, part in methods.items():
    if len(part.points) != len(truth):
      raise InputError(f"a part of {method!r} is of another split: remove it")
    points = measures.without_gaps(part.points)
    values = {n: m(points, truth) for n, m in measures.MEASURES.items()}
    scores = np.abs(points - truth)
    if part.atoms.shape[1] > 1:
      scores = calibration.weighted_crps(part.atoms, part.chances, truth)
      values |= _of_interval(part.interval(_LEVEL), truth)
    if method in margins:
      ends = (
        margins[method].widen(end[:, None], side)[:, 0]
        for end, side in zip(part.interval(_LEVEL), (-1, 1))
      )
      values |= _of_interval(ends, truth, ", calibrated")
    values["crps"] = float(np.nanmean(scores))
    found += [
      {"method": method, "metric": n, "value": v} for n, v in values.items()
    ]
  others = [name for name in methods if not name.startswith(OURS)]
  for metric in ("kendall", "spearman") if others else ():
    measure = measures.MEASURES[metric]
    best = max(others, key=lambda n: measure(methods[n].points, truth))
    for method in methods:
      if method.startswith(OURS):
        interval = intervals.paired_difference(
          measure, methods[method].points, methods[best].points, truth,
          num_samples=num_samples,
        )  # fmt: skip
        found.append(
          {"method": method, "metric": f"{metric}, minus {best}"}
          | dict(zip(("value", "low", "high"), interval))
        )
  return found
