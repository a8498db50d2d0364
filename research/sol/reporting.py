"""From trained policies to a report: preparation, rows, plot, Markdown."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models import module
from models.convert import Checkpoint
from models.errors import InputError
from research.core import plots, report
from research.sol import artefact, corpus, result_rows
from research.sol import windows as windows_lib
from research.sol.artefact import Artefact
from research.sol.comparison import Comparison
from research.sol.learn import Method
from research.sol.windows import Cover, Layout

# Episodes of a calibration window; thresholds need many windows, not these.
_CALIBRATION_EPISODES = 4
# Options that policies of one comparison have in common.
_SHARED = (
  "preset",
  "page_size",
  "sink",
  "shared_pages",
  "prune",
  "horizon",
  "budget",
  "budget_unit",
  "profile",
  "refresh",
  "surprise",
)


def load_policies(
  workdir: pathlib.Path, others: Sequence[str] = ()
) -> dict[str, Artefact]:
  """The trained policy, those of other seeds, the one before GRPO, and others.

  Policies of other seeds stand in `seed1/policy`, `seed2/policy`, ...

  Args:
    workdir: of the policy.
    others: NAME=WORKDIR of policies that differ from it in themselves alone.

  Raises:
    InputError: a policy is missing or damaged, or another one has other
      actions, budgets or refreshes.
  """
  policies = {"SOL policy": artefact.load(workdir / "policy")}
  for folder in sorted(workdir.glob("seed*/policy")):
    seed = folder.parent.name.removeprefix("seed")
    if seed.isdigit():
      policies[f"{result_rows.SEED}{seed}"] = artefact.load(folder)
  if (workdir / "warm_policy" / "policy.json").exists():
    policies["warm start only"] = artefact.load(workdir / "warm_policy")
  ours = policies["SOL policy"]
  for entry in others:
    name, equals, folder = entry.partition("=")
    if not (name and equals and folder):
      raise InputError(f"--policies={entry!r} is no NAME=WORKDIR")
    other = artefact.load(pathlib.Path(folder) / "policy")
    for field in _SHARED:
      if getattr(other.options, field) != getattr(ours.options, field):
        raise InputError(f"{folder} was trained with another {field}")
    policies[name] = other
  return policies


def prepare(
  ours: Artefact,
  checkpoint: Checkpoint,
  tokens: np.ndarray,
  calibration_tokens: np.ndarray,
  *,
  context: int | None,
  episodes: int,
  max_windows: int | None,
  calibration_windows: int,
) -> tuple[Method, Cover, np.ndarray]:
  """Method, windows of the text, and windows to calibrate on.

  Args:
    ours: the policy.
    checkpoint: the frozen LLM.
    tokens: the held-out text.
    calibration_tokens: training text; its last tenth is used, which training
      left out.
    context: tokens before an episode; the trained ones by default.
    episodes: of a window.
    max_windows: keep so many windows, spread over the text.
    calibration_windows: number of windows to calibrate on.

  Raises:
    InputError: a text is too short, or sizes do not fit the pages.
  """
  options = ours.options
  layout = Layout(
    context=context or options.context,
    horizon=options.horizon,
    episodes=episodes,
  )
  layout.check(options.page_size)
  cover = windows_lib.cover(tokens, layout)
  if options.refresh == "none":
    cover, _ = windows_lib.unbroken(cover, layout)
  if max_windows is not None and max_windows < cover.num_windows:
    picked = np.linspace(0, cover.num_windows - 1, max_windows).astype(int)
    cover = cover.take(picked)
  method = options.method(checkpoint.config, None, ours.action_costs.tolist())
  method = dataclasses.replace(
    method,
    layout=dataclasses.replace(layout, episodes=_CALIBRATION_EPISODES),
  )
  _, held = corpus.split(calibration_tokens, 0.1)
  calibration = windows_lib.spread_windows(
    held, method.layout, calibration_windows
  )
  return method, cover, calibration


def rows(
  comparison: Comparison,
  method: Method,
  checkpoint: Checkpoint,
  ours: Artefact,
  asked: Sequence[float],
  text: str,
  seed: int,
) -> list[dict[str, Any]]:
  """Result rows with the honest costs beside the net keep rate."""
  refresh_every = method.setup.horizon
  if ours.options.refresh == "none":
    refresh_every = 0
  return result_rows.rows(
    comparison,
    asked=asked,
    reads_logits=method.policy.surprise,
    common={
      "system": "SOL",
      "model": checkpoint.name,
      "data": text,
      "preset": ours.options.preset,
      "policy_params": module.num_params(ours.params),
      "refresh_every": refresh_every,
      "budget_unit": ours.options.budget_unit,
      "controllers": {
        name: dataclasses.asdict(one) for name, one in comparison.own.items()
      },
      "seeds": [seed],
    },
  )


def write(
  workdir: pathlib.Path,
  rows: list[dict[str, Any]],
  model: str,
  text: str,
  say: Callable[[str], None],
) -> None:
  """Writes `pareto.png` and `report.md`; `say` prints the tables."""
  shown = [row for row in rows if row["role"] not in ("distribution", "seeds")]
  refreshed = [row for row in shown if row["refresh_every"] is not None]
  path = workdir / "pareto.png"
  dense = refreshed[0]
  plots.panels_plot(
    path,
    _panels(refreshed),
    "perplexity (less is better)",
    f"{model} on {text}, {dense['tokens']:,} tokens, {dense['preset']}",
  )
  table = summary_table(refreshed)
  parts = [
    verdict(refreshed),
    report.picture("Perplexity against what was kept, FLOPs and bytes", path),
    "## At the policy's realised net keep",
    table,
    "`policy - method` is the paired difference in nats a token with its "
    "95% interval: below zero the policy is better. FLOPs and bytes are "
    f"shares of a dense decode step at {dense['context']:.0f} tokens, the "
    "policy's own included; "
    + (
      "`+ refresh` has the dense replay of every "
      f"{dense['refresh_every']} tokens, too."
      if dense["refresh_every"]
      else "nothing is replayed."
    ),
    controllers_line(dense),
    "## At equal cost",
    equal_cost_table(refreshed),
    "Policy minus method in nats a token, the method at exactly the policy's "
    "cost: in turns with its next point or with the dense model. A dash: the "
    "method has no point so cheap. Where the policy costs more than the dense "
    "step, it stands against the dense model.",
  ]
  seeds = [row for row in rows if row["role"] == "seeds"]
  if seeds:
    parts += ["## Over training seeds", seeds_table(seeds)]
  unbroken = [row for row in shown if row["refresh_every"] is None]
  if unbroken:
    parts += [
      "## Without a refresh",
      summary_table(unbroken),
      "The windows whose episodes follow each other, read from the first "
      "episode to the last on what the actions left behind.",
    ]
  report.write_report(workdir / "report.md", f"SOL on {model}", parts)
  say(f"{table}\n{parts[0]}")
  say(f"picture: {path}")
  say(f"report:  {workdir / 'report.md'}")


def verdict(rows: list[dict[str, Any]]) -> str:
  """Where the policy wins against the best static budgets, in one paragraph."""
  lines = []
  for label, method, key in _VERDICTS:
    if key and not any(f"policy_minus_method_at_{key}" in row for row in rows):
      continue
    ends = [
      [row[f"policy_minus_method{end}"] for end in ("_low", "_high")]
      if key is None
      else (row[f"policy_minus_method_at_{key}"] or [None, -1, 1])[1:]
      for row in rows
      if row["method"] == method
    ]
    better = sum(high < 0 for _, high in ends)
    worse = sum(low > 0 for low, _ in ends)
    lines.append(f"{label}: better at {better}, worse at {worse}")
  budgets = sum(row["method"] == "best static" for row in rows)
  return (
    f"Of {budgets} budgets, against the best static one of all levels (95% "
    f"intervals that exclude zero), at equal {'; '.join(lines)}."
  )


# What is equal, the static budget that is best at it, and the key of the rows.
_VERDICTS = (
  ("net keep", "best static", None),
  ("FLOPs", "best static by FLOPs", "flops"),
  ("bytes", "best static by bytes", "bytes"),
  ("FLOPs with the refresh", "best static by FLOPs", "flops_with_refresh"),
  ("bytes with the refresh", "best static by bytes", "bytes_with_refresh"),
)
_PANELS = {
  "budget": "net keep",
  "flops": "FLOPs",
  "bytes": "bytes",
  "bytes_with_refresh": "bytes + refresh",
}
# Methods of the picture, where they were run.
_DRAWN = (
  "SOL policy",
  "fixed",
  "counterfactual regression",
  "best static",
  "best static by FLOPs",
  "best static by bytes",
)


def _panels(rows: list[dict[str, Any]]) -> dict[str, list[plots.Series]]:
  """Perplexity over every measure of cost.

  Where actions move one axis only, two thirds of net keep are constant, and it
  gets no panel.
  """
  ours = [row for row in rows if row["role"] == "ours"]
  moved = sum(
    min(row[axis] for row in ours) < full
    for axis, full in (("kappa", 1.0), ("rho", 1.0), ("bits", 16.0))
  )
  keys = [key for key in _PANELS if key != "budget" or moved != 1]
  keys = [key for key in keys if ours[0][key] is not None]
  panels = {}
  for key in keys:
    series = []
    for name in _DRAWN:
      own = [row for row in rows if row["method"] == name]
      if own:
        pick = lambda column, own=own: [row[column] for row in own]
        role = "ours" if own[0]["role"] == "ours" else "baseline"
        series.append(plots.Series(name, pick(key), pick("value"), role=role))
    panels[_PANELS[key]] = series
  return panels


def summary_table(rows: list[dict[str, Any]]) -> str:
  """Markdown table of rows of one protocol."""
  shown = []
  for row in rows:
    line = {
      "method": row["method"],
      "asked": _number(row.get("asked"), 3),
      "net keep": _number(row["budget"], 3),
      "kappa": _number(row["kappa"], 3),
      "rho": _number(row["rho"], 3),
      "bits": _number(row["bits"], 2),
      "FLOPs": _number(row["flops"], 3),
      "bytes": _number(row["bytes"], 3),
    }
    if row.get("ms") is not None:
      line["ms"] = _number(row["ms"], 3)
    if row["refresh_every"]:
      line["FLOPs + refresh"] = _number(row["flops_with_refresh"], 3)
      line["bytes + refresh"] = _number(row["bytes_with_refresh"], 3)
    line["perplexity"] = _number(row["value"], 3)
    line["policy - method"] = "-"
    if "policy_minus_method" in row:
      ends = ("", "_low", "_high")
      line["policy - method"] = _interval(
        [row[f"policy_minus_method{end}"] for end in ends]
      )
    shown.append(line)
  return report.markdown_table(shown, list(shown[0]))


def equal_cost_table(rows: list[dict[str, Any]]) -> str:
  """Markdown table of what the policy wins at equal cost."""
  shown = []
  for row in rows:
    start = "policy_minus_method_at_"
    keys = {
      key.removeprefix(start): key
      for key in row
      if key.startswith(start) and key != f"{start}net_keep"
    }
    if keys:
      line = {"method": row["method"], "asked": _number(row["asked"], 3)}
      for measure, key in keys.items():
        title = measure.replace("_with_refresh", " + refresh")
        line[title.replace("flops", "FLOPs")] = _interval(row[key])
      shown.append(line)
  return report.markdown_table(shown, list(shown[0]))


def controllers_line(dense: dict[str, Any]) -> str:
  """What controllers cost themselves, in one line."""
  each = [
    f"{name}: {own['flops']:,.0f} FLOPs, {own['bytes']:,.0f} bytes, "
    f"{own['launches']:g} kernels"
    for name, own in dense["controllers"].items()
  ]
  return f"A token of the controllers' own: {'; '.join(each)}."


def seeds_table(rows: list[dict[str, Any]]) -> str:
  """Markdown table of differences over training seeds."""
  shown = [
    {
      "difference": row["method"],
      "asked": _number(row["asked"], 3),
      "mean": f"{row['value']:+.4f}",
      "each seed": ", ".join(f"{x:+.4f}" for x in row["each"]),
    }
    for row in rows
  ]
  return report.markdown_table(shown, list(shown[0]))


def _interval(values: Sequence[float] | None) -> str:
  if values is None:
    return "-"
  mean, low, high = values
  return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:.{digits}f}"
