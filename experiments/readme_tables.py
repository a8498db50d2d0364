"""Fills the tables of README.md from result files.

  python experiments/readme_tables.py          # writes
  python experiments/readme_tables.py --check  # exits with 1 where out of date

A table stands between the lines `<!-- table: FILE -->` and `<!-- end -->`,
FILE relative to the README. Its form follows from the keys of the rows.
"""

import json
import pathlib
import re
import sys
from typing import Any

from absl import flags

import cli
from models.errors import InputError
from research.bench import table
from research.core.report import markdown_table
from research.regression_lm import result_tables

_README = flags.DEFINE_string("readme", "README.md", "the file to fill")
_CHECK = flags.DEFINE_bool("check", False, "write nothing, only compare")

_BLOCK = re.compile(
  r"(<!-- table: (\S+) -->\n)((?:(?!<!-- ).)*)(<!-- end -->)", re.DOTALL
)
# The others are parts of these, for whoever wants to know where time goes.
_OPS = "prefill scan/uniform scan/policy block warm_update grpo_update".split()
_SAME_BUDGET = 0.002  # net keep beyond which a score is at another one

Row = dict[str, Any]


def _cell(row: Row, budget: float) -> str:
  """Perplexity, its net keep where it is another one, and the difference."""
  cell = f"{row['value']:.3f}"
  if abs(row["budget"] - budget) > _SAME_BUDGET:
    cell += f" at {row['budget']:.3f}"
  if "policy_minus_method" in row:
    ends = (row[f"policy_minus_method_{end}"] for end in ("low", "high"))
    low, high = (f"{end:+.4f}" for end in ends)
    cell += f"; {row['policy_minus_method']:+.4f} [{low}, {high}]"
  return cell


def _quality(rows: list[Row]) -> str:
  """One line a method, a column a budget."""
  dense = next(row for row in rows if row["method"] == "dense")
  ours = next(row["method"] for row in rows if row["role"] == "ours")
  spent = {row["asked"]: row for row in rows if row["method"] == ours}
  columns = {"method": "method"}
  lines: dict[str, Row] = {}
  for asked, row in spent.items():
    columns[asked] = f"net keep {row['budget']:.3f} (asked {asked:g})"
  compared = []
  for row in rows:
    if row.get("asked") in spent:
      name = row["method"] + " (sees labels)" * (row["role"] == "oracle")
      budget = spent[row["asked"]]["budget"]
      line = lines.setdefault(name, {"method": name})
      line[row["asked"]] = _cell(row, budget)
      same = abs(row["budget"] - budget) <= _SAME_BUDGET
      compared += [row] * (row["role"] == "baseline" and same)
  for keys in (("kappa", "rho", "bits"), ("flops", "bytes")):
    show = lambda row, keys=keys: ", ".join(f"{row[key]:.3f}" for key in keys)
    line = {asked: show(row) for asked, row in spent.items()}
    lines[keys[0]] = line | {"method": f"{ours}: {', '.join(keys)}"}
  static = [
    f"{row['method']} {row['value']:.3f} at {row['budget']:.3f}"
    for row in rows
    if row["role"] == "static"
  ]
  better = sum(row["policy_minus_method_high"] < 0 for row in compared)
  worse = sum(row["policy_minus_method_low"] > 0 for row in compared)
  return (
    f"{dense['model']} on {dense['data']}, {dense['tokens']:,} tokens, actions "
    f"{dense['preset']}; dense perplexity {dense['value']:.3f}.\n\n"
    f"{markdown_table(list(lines.values()), columns)}\n"
    f"Of {len(compared)} comparisons with baselines at its budget the {ours} "
    f"is better in {better} and worse in {worse} with the interval excluding "
    f"zero.\n\nStatic points, perplexity at net keep: "
    f"{'; '.join(static) or 'not evaluated'}.\n"
  )


def _speed(rows: list[Row]) -> str:
  """One line an operation and setting."""
  lines, ceilings = [], {}
  for row in rows:
    kind = f"{row['dtype']}, {row['matmul_precision']}"
    rate, bandwidth = row["matmul_tflops"], row["copy_gb_per_s"]
    ceilings[kind] = f"{rate:,.3g} TFLOP/s, {bandwidth:,.1f} GB/s ({kind})"
    line = {key: row[key] for key in ("op", "shape")}
    line["dtype, matmul"] = kind
    line["ms"] = f"{row['ms']:,.2f}"
    line["calls/s"] = f"{1000 / row['ms']:,.1f}"
    line["tokens/s"] = f"{row['tokens_per_second']:,.0f}"
    line["floor ms"] = f"{row['floor_ms']:,.3f}"
    lines.append(line | {"share": f"{row['share']:.1%}"})
  shown = [line for line in lines if line["op"] in _OPS] or lines
  return (
    f"{markdown_table(shown, list(shown[0]))}\n"
    f"Ceilings: {'; '.join(ceilings.values())}.\n"
  )


def _table(path: pathlib.Path, name: str) -> str:
  """The Markdown for one result file."""
  if not path.exists():
    return "not measured yet\n"
  try:
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = result["rows"]
    kinds = {"peer_ms": table.markdown, "op": _speed, "role": _quality}
    kinds |= result_tables.KINDS
    body = next(kinds[key] for key in kinds if key in rows[0])(rows)
    where = f"{result['device']}, {result['seconds']:,.0f} s"
    commit = f"commit {result['commit'] or 'unknown'}"
    return f"{body}\n[{name}]({name}): {where}, {commit}\n"
  except (ValueError, KeyError, IndexError, StopIteration, TypeError) as error:
    raise InputError(
      f"{path}: is no result of an evaluation or a benchmark "
      f"({type(error).__name__}: {error}): write it anew"
    ) from error


def main(_) -> None:
  """Fills or compares; see the module's docstring."""
  path = pathlib.Path(_README.value)
  if not path.is_file():
    raise InputError(f"{path}: no such file: give --readme")
  old = path.read_text(encoding="utf-8")
  if old.count("<!-- table: ") != len(_BLOCK.findall(old)):
    raise InputError(f"{path}: a `<!-- table: -->` has no `<!-- end -->`")
  new = _BLOCK.sub(
    lambda m: f"{m[1]}{_table(path.parent / m[2], m[2])}{m[4]}", old
  )
  if _CHECK.value and new != old:
    sys.exit(f"{path} is out of date: run experiments/readme_tables.py")
  if not _CHECK.value:
    path.write_text(new, encoding="utf-8")
  print(f"{path}: {'changed' if new != old else 'up to date'}")


if __name__ == "__main__":
  cli.run(main)
