"""Result rows of a comparison: quality, costs, and differences at equal cost.

Costs are net keep, and FLOPs and bytes of a decode step that really skips the
work, as shares of the dense step; a policy's own network is in its rows. They
stand without and with the refresh. The replay needs dense logits, too, where
the controller reads surprise or entropy. The dense model needs no refresh.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.sol import scoring
from research.sol.comparison import Comparison
from research.sol.cost import StepCosts
from research.sol.scoring import Score

Row = dict[str, Any]


def measures(costs: StepCosts, refreshed: bool) -> tuple[str, ...]:
  """Keys of a row's costs: those of a step, and with the refresh if any."""
  later = [f"{unit}_with_refresh" for unit in costs.units]
  return (*costs.units, *(later if refreshed else ()))


SEED = "SOL policy, seed "
# Baselines whose controller reads the dense model's surprise and entropy.
_READ_LOGITS = ("surprise", "entropy", "counterfactual regression")
# Shares of the dense step that a curve is drawn beyond its cheapest point.
_REACH = 0.01
_OVER_SEEDS = (
  "fixed",
  "best static",
  "best static by FLOPs",
  "best static by bytes",
  "counterfactual regression",
)


def rows(
  comparison: Comparison,
  *,
  asked: Sequence[float],
  reads_logits: bool,
  common: Row,
) -> list[Row]:
  """One row per method and budget, and one per static point.

  `policy_minus_method` is the first policy's nll less the method's at the
  method's budget, which was matched in net keep; `..._at_COST` is that against
  the method at exactly the policy's cost, see `at_equal_cost`. `window_nll`
  holds nats by window, `window_tokens` of the dense row the tokens of each, so
  that intervals can be computed anew.

  Args:
    comparison: the scores.
    asked: net keep rates that were asked.
    reads_logits: policies read surprise and entropy.
    common: columns of every row (system, model, data, seeds, ...).
  """
  common = common | {
    "context": comparison.costs.context,
    "page_union": {
      f"{kappa:g}": union
      for kappa, union in comparison.costs.page_union.items()
    },
  }
  made = _Rows(comparison, asked, reads_logits, common)
  out = made.all() + made.over_seeds() + made.distributions()
  if comparison.without_refresh is not None:
    again = _Rows(
      comparison.without_refresh,
      asked,
      reads_logits,
      common | {"refresh_every": None},
    )
    out += again.all()
  return out


def at_equal_cost(
  want: float, curve: Sequence[tuple[float, Score]], dense: Score
) -> Score | None:
  """A method at a given cost, or None where it has no point so cheap.

  Between two of its points it plays them in turn; beyond its dearest, that and
  the dense model, which costs 1 and stands for every point above that. A cost
  that is lower than its cheapest by `_REACH` at most, as those of policies of
  other seeds may be, is read off the line through its two cheapest.

  Args:
    want: the cost, as a share of the dense step.
    curve: the method's points (cost, score).
    dense: the dense model.
  """
  points = sorted(
    [(cost, score) for cost, score in curve if cost < 1], key=lambda x: x[0]
  )
  points.append((1.0, dense))
  if want >= 1:
    return dense
  if want < points[0][0] - _REACH:
    return None
  for (low, cheap), (high, dear) in zip(points, points[1:]):
    if want <= high:
      return scoring.mix(cheap, dear, (want - low) / max(high - low, 1e-12))
  return None


class _Rows:
  """Rows of one protocol."""

  def __init__(self, comparison, asked, reads_logits, common):
    self.found = comparison
    self.asked = asked
    self.common = common
    self.reads_logits = reads_logits
    # None and 0 both stand for no refresh: 0 where the whole comparison is
    # without one.
    self.refreshed = bool(common["refresh_every"])
    self.name = next(iter(comparison.policies))

  def all(self) -> list[Row]:
    """The dense model, policies, baselines, oracles and static points."""
    found = self.found
    dense = self._row("reference", "dense", found.dense)
    dense["window_tokens"] = found.dense.tokens.sum(1)
    out = [dense]
    for name, scores in found.policies.items():
      other = scores is not found.ours
      out += self._series("ours", name, scores, compared=other)
    for role, group in (
      ("baseline", found.baselines),
      ("oracle", found.oracles),
    ):
      for name, scores in group.items():
        out += self._series(role, name, scores, matched=True)
    for name, score in found.static.items():
      out += self._series("static", name, [score], asked=[None])
    return out

  def over_seeds(self) -> list[Row]:
    """Policies of several seeds against baselines, each at its own net keep."""
    policies = {
      name: scores
      for name, scores in self.found.policies.items()
      if scores is self.found.ours or name.startswith(SEED)
    }
    seeds = [int(name.removeprefix(SEED)) for name in list(policies)[1:]]
    out = []
    if not seeds:
      return out
    for name in filter(self.found.baselines.__contains__, _OVER_SEEDS):
      for i, asked in enumerate(self.asked):
        each = [
          self._difference(scores[i], own, "baseline", name, "net_keep")
          for own, scores in policies.items()
        ]
        if None in each:
          continue
        each = [difference[0] for difference in each]
        out.append(
          self.common
          | {
            "method": f"SOL policy minus {name}",
            "role": "seeds",
            "asked": asked,
            "budget": self.found.ours[i].net_keep,
            "metric": "nats at equal net keep",
            "seeds": self.common["seeds"] + seeds,
            "each": each,
            "value": float(np.mean(each)),
            "low": min(each),
            "high": max(each),
          }
        )
    return out

  def distributions(self) -> list[Row]:
    """Random whole-set trials."""
    return [
      self.common
      | {
        "method": "random trials",
        "role": "distribution",
        "budget": self.found.ours[i].net_keep,
        "metric": "perplexity quantiles 0, 5, 50, 95, 100%",
        "value": np.exp(np.quantile(trials, [0, 0.05, 0.5, 0.95, 1])),
      }
      for i, trials in enumerate(self.found.trials)
    ]

  def _series(
    self, role, name, scores, *, asked=None, matched=False, compared=False
  ) -> list[Row]:
    """Rows of one method; matched ones have the policy's net keep."""
    out, found = [], self.found
    for i, score in enumerate(scores):
      row = self._row(role, name, score, (asked or self.asked)[i])
      ours = self.found.ours[min(i, len(self.found.ours) - 1)]
      if matched:
        mean, low, high = scoring.paired_difference(ours, score)
        row |= {
          "policy_minus_method": mean,
          "policy_minus_method_low": low,
          "policy_minus_method_high": high,
        }
      if matched or compared:
        shown = measures(found.costs, self.refreshed)
        for measure in shown if matched else ("net_keep", *shown):
          row[f"policy_minus_method_at_{measure}"] = self._difference(
            ours, self.name, role, name, measure
          )
      out.append(row)
    return out

  def _row(self, role, name, score, asked=None) -> Row:
    dense = self.found.dense
    mean, low, high = scoring.paired_difference(score, dense)
    return (
      self.common
      | {
        "method": name,
        "role": role,
        "budget": score.net_keep,
        "asked": asked,
        "metric": "perplexity",
        "value": score.perplexity,
        "nll": score.mean_nll,
        "kappa": score.means[0],
        "rho": score.means[1],
        "bits": score.means[2] * 16,
        "tokens": int(score.tokens.sum()),
        "delta_dense": mean,
        "low": float(np.exp(dense.mean_nll + low)),
        "high": float(np.exp(dense.mean_nll + high)),
      }
      | {
        key: value
        for key, value in self._costs(role, name, score).items()
        if key != "net_keep"
      }
      | {"window_nll": score.nll.sum(1).round(4)}
    )

  def _costs(self, role: str, name: str, score: Score) -> Mapping[str, Any]:
    """All measures of cost; with the refresh None where there is none."""
    costs = self.found.costs
    spent = score.further
    if name in self.found.own:
      spent = spent + costs.controller(self.found.own[name])
    refreshed = [None] * len(spent)
    if self.refreshed:
      refreshed = spent
      # Where every token was dense there is nothing to renew.
      if score.net_keep < 1 - 1e-9:
        head = self.reads_logits if role == "ours" else name in _READ_LOGITS
        refreshed = spent + costs.refresh(head=head)
      refreshed = [float(x) for x in refreshed]
    found = {"net_keep": score.net_keep}
    for unit, one, later in zip(costs.units, spent, refreshed, strict=True):
      found |= {unit: float(one), f"{unit}_with_refresh": later}
    return found

  def _difference(
    self, ours: Score, our_name: str, role: str, name: str, measure: str
  ) -> tuple[float, float, float] | None:
    """Paired difference to a method at the cost of `ours`, and its ends."""
    groups = self.found.policies, self.found.baselines, self.found.oracles
    (scores,) = [group[name] for group in groups if name in group]
    curve = [(self._costs(role, name, s)[measure], s) for s in scores]
    want = self._costs("ours", our_name, ours)[measure]
    other = at_equal_cost(want, curve, self.found.dense)
    return None if other is None else scoring.paired_difference(ours, other)
