"""Milliseconds of an op and of its peers over the length of texts, as PNG."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from models import input_files
from models.errors import InputError
from research.core import plots
from research.core.plots import Series

_LENGTH = re.compile(r"\bL(\d+)\b")


def plot(path: pathlib.Path, source: pathlib.Path, title: str | None) -> None:
  """Draws a panel a pass, a line an implementation or peer.

  Args:
    path: of the PNG.
    source: result file of bench.py's suite `ops`.
    title: of the picture; None for the op and its device.

  Raises:
    InputError: the file is damaged, or its rows are of several ops or of no
      length.
  """
  result = input_files.read_json(source)
  with input_files.errors_at(source, wrong="is no result of bench.py's ops"):
    ops = list(dict.fromkeys(row["op"] for row in result["rows"]))
    panels = {f"tokens, {name}": series for name, series in
              _panels(result["rows"]).items()}  # fmt: skip
    title = title or f"{', '.join(ops)} on {result['device']}"
  if len(ops) != 1:
    raise InputError(
      f"{source}: its rows are of {len(ops)} ops: give a result of one"
    )
  plots.panels_plot(
    path, panels, "milliseconds (less is better)", title, log_x=True, log_y=True
  )


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Series]]:
  """Lines of each pass, the same names in the same order in each."""
  times = {}
  for row in rows:
    length = int(_LENGTH.search(row["shape"])[1])
    # Peers stand in the rows of the implementation that they ran beside.
    pair = ((row["implementation"], row["ms"]), (row["peer"], row["peer_ms"]))
    for name, ms in pair:
      if name and ms:
        times.setdefault(name, {}).setdefault(row["pass"], {})[length] = ms
  ours = {row["implementation"] for row in rows}
  passes = dict.fromkeys(row["pass"] for row in rows)
  return {
    each: [
      Series(
        name=name,
        x=sorted(found.get(each, {})),
        y=[ms for _, ms in sorted(found.get(each, {}).items())],
        role="ours" if name in ours else "baseline",
      )
      for name, found in times.items()
    ]
    for each in passes
  }
