"""Result rows of regression language models as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.core.report import markdown_table
from research.regression_lm import learning_curve

_DENSITY = {
  "CRPS 1": "crps_1",
  "CRPS 2": "crps_2",
  "CRPS 2 given 1": "crps_2_given_1",
}
_COLUMNS = ("kendall", "spearman", "mse", "crps")


def densities(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a text: the model beside a second set of true points."""
  lines: dict[str, dict[str, Any]] = {}
  for row in rows:
    line = lines.setdefault(row["text"], {"text": row["text"]})
    short = "model" if row["method"] == "regression LM" else "truth"
    line[f"energy distance, {short}"] = f"{row['energy_distance']:.4f}"
    for name, key in _DENSITY.items():
      line[f"{name}, {short}"] = f"{row[key]:.4f}"
  names = ["text"]
  for measure in ("energy distance", *_DENSITY):
    names += [f"{measure}, model", f"{measure}, truth"]
  return markdown_table(list(lines.values()), names)


def methods(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a target, size and method: means over seeds, and their spread."""
  shown = []
  for line in learning_curve.summary(rows):
    cells = {
      "target": line["target"],
      "training rows": line["train"],
      "method": line["method"],
    }
    for name in _COLUMNS:
      if name in line:
        spread = f" ± {_digits(line[f'{name} sd'])}"
        cells[name] = _digits(line[name]) + spread * (line["seeds"] > 1)
    shown.append(cells | {"seeds": line["seeds"]})
  return markdown_table(
    shown, ["target", "training rows", "method", *_COLUMNS, "seeds"]
  )


def speed(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a setting of ours and of the peer; ratios of ours to the others.

  Those of ours in bfloat16 are set against the peer's in bfloat16, those in
  float32 against the peer's in float32 and with TensorFloat-32.
  """
  ours = {
    (row["work"], row["model"], row["shape"], row["dtype"]): row["seconds"]
    for row in rows
    if row["system"] == "frugax"
  }
  lines = []
  for row in rows:
    key = row["work"], row["model"], row["shape"], row["dtype"]
    line = {
      "work": row["work"],
      "model": row["model"],
      "shape": row["shape"],
      "system": row["system"],
      "setting": row["setting"],
      "ms": f"{1e3 * row['seconds']:,.2f}",
      "texts/s": f"{row['examples_per_second']:,.1f}",
    }
    if not row.get("compiled", True):
      line["setting"] += ", not compiled"
    if "share" in row:
      line["share"] = f"{row['share']:.1%}"
    elif key in ours:
      line["frugax is faster by"] = f"{row['seconds'] / ours[key]:.1f}"
    lines.append(line)
  columns = ("work", "model", "shape", "system", "setting", "ms", "texts/s")
  return markdown_table(lines, [*columns, "share", "frugax is faster by"])


# Parts of a target that a table of errors shows.
_PARTS = 6


def errors(rows: Sequence[Mapping[str, Any]]) -> str:
  """The parts of each target with the largest shares of its rank error."""
  shown: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    shown.setdefault(row["target"], []).append(row)
  lines = [
    {
      "target": row["target"],
      "part": row["part"],
      "tests": row["tests"],
      "median factor": f"{2 ** row['median_bits']:.2f}",
      "beyond 2x": f"{row['beyond_2x']:.1%}",
      "share of rank error": f"{row['share_of_rank_error']:.0%}",
    }
    for part in shown.values()
    for row in part[:_PARTS]
  ]
  return markdown_table(lines, list(lines[0]))


def _digits(value: float) -> str:
  return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.2e}"


# The key that tells rows of a kind -> their table.
KINDS: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
  "energy_distance": densities,
  "share_of_rank_error": errors,
  "tests": methods,
  "examples_per_second": speed,
}
