"""An evaluation of SOL as Markdown."""

from typing import Any

from research.core.report import markdown_table

_SAME_BUDGET = 0.002  # net keep beyond which a score is at another one
_EQUAL = {
  "flops": "equal FLOPs",
  "bytes": "equal bytes",
  "ms": "equal predicted ms",
  "bytes_with_refresh": "equal bytes, refresh charged",
}
# Names of older files: what they stand for.
_OLD_NAMES = {
  "Quest@50": "Quest variant, half of the pages",
  "Quest@30": "Quest variant, 30% of the pages",
  "TEAL@60": "TEAL variant, 60% of the channels",
  "TEAL@80": "TEAL variant, 80% of the channels",
  "ZeroQuant-5bit": "ZeroQuant variant, 5 bits",
  "ZeroQuant-8bit": "ZeroQuant variant, 8 bits",
  "per-token oracle": "true gains of the schedules",
}
_LACKING = (
  "This file is of an older evaluation, and lacks: the refresh in FLOPs and "
  "bytes; pages that the query heads of a group do not share, in bytes; costs "
  "at the run's mean context (they are counted at the first episode's); "
  "comparisons at equal FLOPs and bytes; static budgets of levels that the "
  "policy cannot choose; quality without a refresh; numbers by window; other "
  "training seeds.\n"
)

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
  """One line a method, a column a budget; then equal costs, and no refresh."""
  first = [row for row in rows if row.get("refresh_every", 0) is not None]
  dense = next(row for row in first if row["method"] == "dense")
  ours = next(row["method"] for row in first if row["role"] == "ours")
  spent = {row["asked"]: row for row in first if row["method"] == ours}
  parts = [
    f"{dense['model']} on {dense['data']}, {dense['tokens']:,} tokens, actions "
    f"{dense['preset']}; dense perplexity {dense['value']:.3f}.\n",
    _methods(first, ours, spent),
    f"{_count(first, ours, spent)}\n",
    f"Static points, perplexity at net keep: {_static(first)}.\n",
  ]
  if "flops_with_refresh" not in spent[next(iter(spent))]:
    return "\n".join([*parts, _LACKING])
  parts += [
    f"Costs are those of a decode step at {dense['context']:.0f} tokens; "
    f"{_refresh(dense)}\n",
    _equal_costs(first, spent),
  ]
  seeds = [row for row in rows if row["role"] == "seeds"]
  if seeds:
    parts.append(_seeds(seeds))
  return "\n".join(parts)


def _refresh(dense: Row) -> str:
  """The refresh, the unit of budgets and what controllers cost themselves."""
  parts = ["nothing is replayed"]
  if dense["refresh_every"]:
    every = dense["refresh_every"]
    parts = [f"the refresh is a dense replay of every {every} tokens"]
  if dense.get("budget_unit", "net_keep") != "net_keep":
    parts.append(f"budgets are asked in {dense['budget_unit']}, all included")
  own = [
    f"{name} {one['flops']:,.0f} FLOPs, {one['bytes']:,.0f} bytes"
    for name, one in dense.get("controllers", {}).items()
  ]
  if own:
    parts.append(f"controllers themselves take a token: {', '.join(own)}")
  return f"{'; '.join(parts)}."


def without_refresh(rows: list[Row]) -> str:
  """Perplexity and costs of what was played without a refresh."""
  unbroken = [row for row in rows if row.get("refresh_every", 0) is None]
  dense = next(row for row in unbroken if row["method"] == "dense")
  lines: dict[str, Row] = {}
  asked = {}
  for row in unbroken:
    if row.get("asked") is not None:
      asked[row["asked"]] = f"asked {row['asked']:g}"
      line = lines.setdefault(row["method"], {"method": row["method"]})
      line[row["asked"]] = (
        f"{row['value']:.3f} (net keep {row['budget']:.3f}, FLOPs "
        f"{row['flops']:.3f}, bytes {row['bytes']:.3f})"
      )
  columns = {"method": "without a refresh"} | asked
  return (
    f"{dense['model']} on {dense['data']}, {dense['tokens']:,} tokens, dense "
    f"perplexity {dense['value']:.3f}.\n\n"
    f"{markdown_table(list(lines.values()), columns)}"
  )


def _difference(values) -> str:
  """Policy minus method with its interval, or a dash."""
  if values is None:
    return "–"
  mean, low, high = values
  return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _cell(row: Row, budget: float) -> str:
  """Perplexity, its net keep where it is another one, and the difference."""
  cell = f"{row['value']:.3f}"
  if abs(row["budget"] - budget) > _SAME_BUDGET:
    cell += f" at {row['budget']:.3f}"
  if "policy_minus_method" in row:
    ends = [row[f"policy_minus_method{end}"] for end in ("", "_low", "_high")]
    cell += f"; {_difference(ends)}"
  return cell


def _headings(spent: dict[float, Row]) -> dict[Any, str]:
  return {"method": "method"} | {
    asked: f"net keep {row['budget']:.3f} (asked {asked:g})"
    for asked, row in spent.items()
  }


def _methods(rows: list[Row], ours: str, spent: dict[float, Row]) -> str:
  lines: dict[str, Row] = {}
  for row in rows:
    if row.get("asked") in spent and row["role"] != "seeds":
      name = _OLD_NAMES.get(row["method"], row["method"])
      name += " (sees labels)" * (row["role"] == "oracle")
      line = lines.setdefault(name, {"method": name})
      line[row["asked"]] = _cell(row, spent[row["asked"]]["budget"])
  for title, keys in (
    ("kappa, rho, bits", ("kappa", "rho", "bits")),
    ("flops, bytes", ("flops", "bytes")),
    ("with refresh", ("flops_with_refresh", "bytes_with_refresh")),
  ):
    known = [row.get(key) for row in spent.values() for key in keys]
    if None not in known:
      show = lambda row, keys=keys: ", ".join(f"{row[key]:.3f}" for key in keys)
      line = {asked: show(row) for asked, row in spent.items()}
      lines[title] = line | {"method": f"{ours}: {title}"}
  return markdown_table(list(lines.values()), _headings(spent))


def _count(rows: list[Row], ours: str, spent: dict[float, Row]) -> str:
  compared = [
    row
    for row in rows
    if row["role"] == "baseline"
    and row.get("asked") in spent
    and abs(row["budget"] - spent[row["asked"]]["budget"]) <= _SAME_BUDGET
  ]
  better = sum(row["policy_minus_method_high"] < 0 for row in compared)
  worse = sum(row["policy_minus_method_low"] > 0 for row in compared)
  return (
    f"Of {len(compared)} comparisons with baselines at its budget the {ours} "
    f"is better in {better} and worse in {worse} with the interval excluding "
    "zero."
  )


def _static(rows: list[Row]) -> str:
  points = [
    f"{_OLD_NAMES.get(row['method'], row['method'])}: {row['value']:.3f} at "
    f"{row['budget']:.3f}"
    for row in rows
    if row["role"] == "static"
  ]
  return "; ".join(points) or "not evaluated"


def _equal_costs(rows: list[Row], spent: dict[float, Row]) -> str:
  """A line a method and measure of cost."""
  lines: dict[tuple, Row] = {}
  for measure, title in _EQUAL.items():
    key = f"policy_minus_method_at_{measure}"
    for row in rows:
      if key in row and row["role"] == "baseline":
        name = row["method"]
        line = lines.setdefault((name, measure), {"method": name, "at": title})
        line[row["asked"]] = _difference(row[key])
  columns = {"method": "policy minus", "at": "at"} | {
    asked: f"asked {asked:g}" for asked in spent
  }
  return markdown_table(list(lines.values()), columns)


def _seeds(rows: list[Row]) -> str:
  """Mean over training seeds, and the least and the most.

  Without methods that do not reach every net keep, such as static budgets that
  keep the bits: at the few that they reach the numbers are between points far
  apart.
  """
  asked = {row["asked"] for row in rows}
  lines: dict[str, Row] = {}
  for row in rows:
    line = lines.setdefault(row["method"], {"method": row["method"]})
    line[row["asked"]] = (
      f"{row['value']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
    )
  columns = {"method": f"training seeds {rows[0]['seeds']}, equal net keep"} | {
    row["asked"]: f"asked {row['asked']:g}" for row in rows
  }
  shown = [line for line in lines.values() if asked <= line.keys()]
  return markdown_table(shown, columns)
