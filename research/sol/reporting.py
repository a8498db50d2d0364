"""From trained policies to a report: preparation, rows, plot, Markdown."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from models import module
from models.convert import Checkpoint
from research.core import plots, report
from research.sol import artefact, corpus, cost, result_rows
from research.sol import windows as windows_lib
from research.sol.artefact import Artefact
from research.sol.comparison import Comparison
from research.sol.learn import Method
from research.sol.windows import Cover, Layout

# Episodes of a calibration window; thresholds need many windows, not these.
_CALIBRATION_EPISODES = 4


def load_policies(workdir: pathlib.Path) -> dict[str, Artefact]:
  """The trained policy and, where there is one, the one before GRPO."""
  policies = {"SOL policy": artefact.load(workdir / "policy")}
  if (workdir / "warm_policy" / "policy.json").exists():
    policies["warm start only"] = artefact.load(workdir / "warm_policy")
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
  if max_windows is not None and max_windows < cover.num_windows:
    picked = np.linspace(0, cover.num_windows - 1, max_windows).astype(int)
    cover = cover.take(picked)
  method = options.method(checkpoint.config, None)
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
  """Result rows with the honest costs beside the net keep rate.

  `flops` and `bytes` are shares of the dense decode step at the trained
  context, the policy's own included in its rows. The refresh is in none.
  """
  params = module.num_params(ours.params)
  context = method.layout.context + method.layout.horizon / 2
  share = cost.shares_of_dense(method.setup, context, params)
  share = share[0] - cost.shares_of_dense(method.setup, context)[0]
  return result_rows.rows(
    comparison,
    asked=asked,
    policy_share=share,
    common={
      "system": "SOL",
      "model": checkpoint.name,
      "data": text,
      "preset": ours.options.preset,
      "policy_params": params,
      "seeds": [seed],
    },
  )


def write(
  workdir: pathlib.Path, rows: list[dict[str, Any]], model: str, text: str
) -> None:
  """Writes `pareto.png` and `report.md`, and prints the table."""
  rows = [row for row in rows if row["role"] != "distribution"]
  path = workdir / "pareto.png"
  dense = next(row for row in rows if row["method"] == "dense")
  plots.pareto_plot(
    path,
    [*_series(rows), _level(dense)],
    "net keep rate: mean of token keep, channel keep and bits / 16",
    "perplexity (less is better)",
    "Perplexity against compute kept",
    subtitle=f"{model} on {text}, {dense['tokens']:,} tokens, "
    f"actions {dense['preset']}; 95% intervals paired with dense",
  )
  table = summary_table(rows)
  report.write_report(
    workdir / "report.md",
    f"SOL on {model}",
    [
      report.picture("Perplexity against net keep rate", path),
      "## Baselines at the policy's realised budget",
      table,
      "`policy - method` is the paired difference in nats a token with its "
      "95% interval: below zero the policy is better. `flops` and `bytes` "
      "are shares of a dense decode step.",
    ],
  )
  print(table)
  print(f"picture: {path}")
  print(f"report:  {workdir / 'report.md'}")


def _level(dense: dict[str, Any]) -> plots.Series:
  return plots.Series(
    "dense", [dense["budget"]], [dense["value"]], role="reference"
  )


def _series(rows: list[dict[str, Any]]) -> list[plots.Series]:
  """Lines of the plot; one random schedule and static points stay out."""
  hidden = {"random, best of 30", "random"}
  names = dict.fromkeys(
    (row["method"], row["role"])
    for row in rows
    if row["role"] in ("ours", "baseline", "oracle")
    and row["method"] not in hidden
  )
  out = []
  for name, role in names:
    own = [row for row in rows if row["method"] == name]
    role = "baseline" if name == "warm start only" else role
    pick = lambda key, own=own: [row[key] for row in own]
    bars = {"low": pick("low"), "high": pick("high")} if role == "ours" else {}
    out.append(
      plots.Series(name, pick("budget"), pick("value"), role=role, **bars)
    )
  return out


def summary_table(rows: list[dict[str, Any]]) -> str:
  """Markdown table of all rows of `eval.json` with a perplexity."""
  shown = []
  for row in rows:
    line = {
      "method": row["method"],
      "asked": _number(row.get("asked"), 3),
      "net keep": _number(row["budget"], 3),
      "kappa": _number(row["kappa"], 3),
      "rho": _number(row["rho"], 3),
      "bits": _number(row["bits"], 2),
      "flops": _number(row["flops"], 3),
      "bytes": _number(row["bytes"], 3),
      "perplexity": _number(row["value"], 3),
      "policy - method": "-",
    }
    if "policy_minus_method" in row:
      line["policy - method"] = (
        f"{row['policy_minus_method']:+.4f} "
        f"[{row['policy_minus_method_low']:+.4f}, "
        f"{row['policy_minus_method_high']:+.4f}]"
      )
    shown.append(line)
  return report.markdown_table(shown, list(shown[0]))


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:.{digits}f}"
