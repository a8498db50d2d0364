"""What a run's budgets are of: costs of actions, and what every token pays.

A budget is asked in one unit, and holds all that a token costs in it: its
action, the policy's own network, and the refresh. Net keep, the published
proxy, knows the action alone.

Axis letters: W windows, S' tokens, A actions.
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from models import module
from research.cost.controller import ControllerCost
from research.sol import page_union, profile
from research.sol import policy as policy_lib
from research.sol import windows as windows_lib
from research.sol.cost import StepCosts
from research.sol.learn import Method

if TYPE_CHECKING:
  from research.sol.training import Run

# Windows on which it is measured which pages the heads of a group share.
_WINDOWS = 16


def of_run(run: "Run", lm: Any, tokens: np.ndarray) -> "Run":
  """A run with the costs of its actions and what every token pays beside.

  Args:
    run: the run.
    lm: parameters of the frozen LLM.
    tokens: (n,) training text.

  Raises:
    InputError: the profile is missing, damaged, or lacks a level.
  """
  unit, method = run.options.budget_unit, run.method
  if unit == "net_keep":
    return run
  costs = step_costs(method, lm, tokens, run.seed)
  if unit == "ms":
    path = pathlib.Path(run.options.profile)
    costs = dataclasses.replace(costs, profile=profile.read(path))
  actions = costs.of_unit(method.setup.table, unit)
  overhead = costs.overhead(
    unit,
    own_cost(method),
    refreshed=run.options.refresh != "none",
    head=method.policy.surprise,
  )
  return dataclasses.replace(
    run, action_costs=tuple(map(float, actions)), overhead=overhead
  )


def own_cost(method: Method) -> ControllerCost:
  """What the method's policy costs a token itself."""
  shapes = jax.eval_shape(
    lambda: policy_lib.init(method.policy, jax.random.key(0))
  )
  return method.policy.own_cost(module.num_params(shapes))


def step_costs(
  method: Method, lm: Any, tokens: np.ndarray, seed: int
) -> StepCosts:
  """Costs of a step at the mean context of the method's windows.

  Args:
    method: the method.
    lm: parameters of the frozen LLM.
    tokens: (n,) text on which shared pages are measured.
    seed: of its windows.
  """
  text = windows_lib.random_windows(
    tokens, method.layout, _WINDOWS, seed=seed + 10, step=0
  )
  cover = windows_lib.whole(text, method.layout)
  union = page_union.measure(
    method.setup, lm, text, first=method.layout.context, batch=8
  )
  return StepCosts(
    setup=method.setup, context=cover.mean_context, page_union=union
  )
