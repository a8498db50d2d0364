"""Tables of pages: every kind of result has one function that shows it.

A table stands in a page between the lines `<!-- table: KIND FILE -->` and
`<!-- end -->`. KIND is one of `KINDS`, FILE a result JSON relative to the page.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models import input_files
from models.errors import InputError
from research.results import (
  codesign,
  endurance,
  first_comments,
  formats,
  fuzz,
  lra,
  pages,
  predictions,
  program_metrics,
  quality,
  quantization,
  recall,
  scaling,
  speed,
  training,
)

KINDS: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
  "speed": speed.table,
  "quality": quality.table,
  "without_refresh": quality.without_refresh,
  "training": training.table,
  "predictions": predictions.table,
  "paired": predictions.paired,
  "densities": predictions.densities,
  "errors": predictions.errors,
  "program_metrics": program_metrics.table,
  "quantization": quantization.table,
  "quantization_tasks": quantization.tasks,
  "codesign": codesign.front,
  "codesign_searches": codesign.searches,
  "codesign_claims": codesign.claims,
  "lra": lra.table,
  "lra_times": lra.times,
  "recall": recall.table,
  "pages": pages.table,
  "formats": formats.table,
  "tails": formats.tails,
  "codebooks": formats.codebooks,
  "precision": formats.precision,
  "fuzz": fuzz.table,
  "endurance": endurance.table,
  "scaling": scaling.table,
  "scaling_losses": scaling.losses,
}

_OPEN = "<!-- table:"
_BLOCK = re.compile(
  r"(<!-- table: (\S+) (\S+) -->\n)((?:(?!<!-- ).)*)(<!-- end -->)", re.DOTALL
)
_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}\b")


def fill(page: pathlib.Path) -> str:
  """Returns the text of a Markdown page, tables and comments written anew.

  Raises:
    InputError: a marker is not of this form, or names no kind of result, or
      its file is none of this kind.
  """
  text = page.read_text(encoding="utf-8")
  if text.count(_OPEN) != len(_BLOCK.findall(text)):
    raise InputError(
      f"{page}: a `{_OPEN} ...` is no `{_OPEN} KIND FILE -->` above an "
      "`<!-- end -->`"
    )

  def block(found: re.Match) -> str:
    begin, kind, name, _, end = found.groups()
    if kind not in KINDS:
      raise InputError(
        f"{page}: there is no kind of table {kind!r}; valid: {', '.join(KINDS)}"
      )
    return f"{begin}{_table(kind, page.parent / name, name)}{end}"

  return first_comments.fill(_BLOCK.sub(block, text), page.parent)


def _table(kind: str, path: pathlib.Path, name: str) -> str:
  """The Markdown of one result file, and where it is from."""
  if not path.exists():
    return "not measured yet\n"
  wrong = f"is no result of kind {kind}"
  with input_files.errors_at(path, "write it anew, or name its kind", wrong):
    result = json.loads(path.read_bytes())
    return f"{KINDS[kind](result['rows'])}\n{_origin(result, name)}\n"


def _origin(result: Mapping[str, Any], name: str) -> str:
  """Device, time and commit; and what makes the result less than it seems."""
  commit = _HASH.sub(r"\1", result["commit"] or "unknown")
  shown = name.replace("../", "")
  line = f"[{shown}]({name}): {result['device']}, {result['seconds']:,.0f} s, "
  line += f"commit {commit.removesuffix('+dirty')}"
  if commit.endswith("+dirty"):
    line += ", of which the code that ran differed"
  if result.get("complete") is False:
    line += "; the run ended before its last row"
  return line
