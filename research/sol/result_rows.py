"""Result rows of a comparison."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from research.sol import scoring
from research.sol.comparison import Comparison


def rows(
  comparison: Comparison,
  *,
  asked: Sequence[float],
  policy_share: Sequence[float],
  common: dict[str, Any],
) -> list[dict[str, Any]]:
  """Result rows, one per method and budget, and one per static point.

  Args:
    comparison: the scores.
    asked: net keep rates that were asked.
    policy_share: the policy's own FLOPs and bytes as shares of a dense step.
    common: columns of every row (system, model, data, seeds, ...).
  """
  out = []
  ours = comparison.ours
  paired = scoring.paired_difference

  def add(role, name, score, asked_for=None, against=None):
    row = common | {
      "method": name,
      "role": role,
      "budget": score.net_keep,
      "asked": asked_for,
      "metric": "perplexity",
      "value": score.perplexity,
      "nll": score.mean_nll,
      "kappa": score.means[0],
      "rho": score.means[1],
      "bits": score.means[2] * 16,
      "tokens": int(score.tokens.sum()),
    }
    mean, low, high = paired(score, comparison.dense)
    row |= {
      "delta_dense": mean,
      "low": float(np.exp(comparison.dense.mean_nll + low)),
      "high": float(np.exp(comparison.dense.mean_nll + high)),
    }
    if against is not None:
      mean, low, high = paired(against, score)
      row |= {
        "policy_minus_method": mean,
        "policy_minus_method_low": low,
        "policy_minus_method_high": high,
      }
    own = np.asarray(policy_share) if role == "ours" else np.zeros(2)
    flops, moved = score.further + own
    out.append(row | {"flops": float(flops), "bytes": float(moved)})

  add("reference", "dense", comparison.dense)
  for name, scores in comparison.policies.items():
    for i, score in enumerate(scores):
      add("ours", name, score, asked[i])
  for role, group in (
    ("baseline", comparison.baselines),
    ("oracle", comparison.oracles),
  ):
    for name, scores in group.items():
      for i, score in enumerate(scores):
        add(role, name, score, asked[i], against=ours[i])
  for name, score in comparison.static.items():
    add("static", name, score)
  for i, trials in enumerate(comparison.trials):
    out.append(
      common
      | {
        "method": "random trials",
        "role": "distribution",
        "budget": ours[i].net_keep,
        "metric": "perplexity quantiles 0, 5, 50, 95, 100%",
        "value": np.exp(np.quantile(trials, [0, 0.05, 0.5, 0.95, 1])),
      }
    )
  return out
