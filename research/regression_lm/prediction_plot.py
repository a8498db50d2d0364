"""A picture of predictions against what was measured."""

import pathlib
from collections.abc import Sequence

import numpy as np

from research.core import plots
from research.predictors import measures
from research.regression_lm.evaluate import OURS, Predictions

# More panels or points than these are not told apart.
_TARGETS, _POINTS = 3, 600


def plot(
  path: str | pathlib.Path, found: Sequence[Predictions], level: float = 0.9
) -> None:
  """Draws our medians with their intervals, and the best peer beside them.

  Axes are logarithmic where all numbers are positive and spread over more than
  a factor of ten. Of many test rows a part is drawn, chosen by chance.

  Args:
    path: of the PNG.
    found: one for each target, of which the first three are drawn.
    level: of the intervals, from our draws where none were calibrated.
  """
  found = found[:_TARGETS]
  figure, axes = plots.new_figure((7.4, 0.9 + 3.1 * len(found)), len(found), 2)
  for row, each in zip(axes, found):
    rng = np.random.default_rng(0)
    some = rng.permutation(len(each.truth))[:_POINTS]
    truth = each.truth[some]
    ends = each.interval
    if ends is None:
      shares = [(1 - level) / 2, (1 + level) / 2]
      ends = np.quantile(each.draws, shares, axis=1, method="nearest").T
    for axis, method in zip(row, (OURS, each.best_peer("spearman"))):
      if method is None:
        axis.set_visible(False)
        continue
      values = each.by_method[method][some]
      _limits(axis, np.concatenate([truth, values[np.isfinite(values)]]))
      color = "#d55e00" if method == OURS else plots.BASELINES[0]
      if method == OURS:
        # An interval may go far beyond all points, which it must not shrink.
        low, high = np.clip(ends[some].T, *axis.get_ylim())
        axis.vlines(truth, low, high, color=color, alpha=0.25, linewidth=0.8)
      axis.scatter(truth, values, s=7, color=color, alpha=0.7, linewidths=0)
      rho = measures.spearman(each.by_method[method], each.truth)
      axis.set_title(f"{method}: Spearman {rho:.3f}", loc="left", fontsize=9.5)
      axis.set_xlabel(f"{each.target}, measured")
    row[0].set_ylabel("predicted")
  figure.suptitle(
    f"Held-out rows; bars are {level:.0%} intervals",
    x=0.02,
    ha="left",
    fontsize=12,
    fontweight="bold",
  )
  plots.save(figure, path)


def _limits(axis, numbers: np.ndarray) -> None:
  """Gives both axes the range of all points, and draws the diagonal."""
  low, high = float(numbers.min()), float(numbers.max())
  if low > 0 and high > 10 * low:
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = low / 1.2, high * 1.2
  else:
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin
  axis.set_xlim(low, high)
  axis.set_ylim(low, high)
  axis.plot([low, high], [low, high], color="#8a8a8a", linewidth=0.9)
