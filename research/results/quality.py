"""An evaluation of SOL as Markdown."""

from typing import Any

from research.core.report import markdown_table

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


def table(rows: list[Row]) -> str:
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
