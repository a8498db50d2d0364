"""A trained policy as files: `policy.json` and `policy.safetensors`."""

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from models.errors import InputError, reason
from research.core import files
from research.core.options import from_json
from research.sol.options import Options
from research.sol.policy import InputStats

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefact:
  """A trained policy and what it was trained for.

  Attributes:
    options: filled options of the run.
    mode: the mode they came from.
    model: name of the frozen LLM.
    params: policy parameters.
    stats: input statistics.
    prices: (P,) prices of the calibration curve; empty without prices.
    spent: (P,) mean cost at each price on training text.
    scalar_stats: (2, 9) mean and scale of the scalars on training text.
    coefficients: (10, 3) of the baseline "counterfactual regression", fitted
      on the same text.
    action_costs: (A,) of the actions in the budget's unit, of which `spent` is,
      with the policy's own and the refresh's; empty for net keep.
  """

  options: Options
  mode: str
  model: str
  params: Tree
  stats: InputStats
  prices: np.ndarray
  spent: np.ndarray
  scalar_stats: np.ndarray
  coefficients: np.ndarray
  action_costs: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0,), np.float32)
  )


def _flatten(tree: Tree, path: str = "") -> dict[str, np.ndarray]:
  if not isinstance(tree, dict):
    return {path: np.asarray(tree)}
  flat = {}
  for name, child in tree.items():
    flat |= _flatten(child, f"{path}.{name}" if path else name)
  return flat


def _unflatten(flat: dict[str, np.ndarray]) -> Tree:
  tree: Tree = {}
  for path, value in flat.items():
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.asarray(value)
  return tree


def save(directory: pathlib.Path, artefact: Artefact) -> None:
  """Writes both files; the JSON last, so that its presence means all."""
  tensors = _flatten(
    {
      "params": artefact.params,
      "stats": vars(artefact.stats),
      "prices": artefact.prices,
      "spent": artefact.spent,
      "scalar_stats": artefact.scalar_stats,
      "coefficients": artefact.coefficients,
      "action_costs": artefact.action_costs,
    }
  )
  files.write_safetensors(directory / "policy.safetensors", tensors)
  files.write_json(
    directory / "policy.json",
    {
      "mode": artefact.mode,
      "model": artefact.model,
      "options": vars(artefact.options),
    },
  )


def load(directory: pathlib.Path) -> Artefact:
  """Reads what `save` wrote.

  Raises:
    InputError: a file is missing or damaged.
  """
  path = directory / "policy.json"
  try:
    meta = json.loads(path.read_text())
    path = directory / "policy.safetensors"
    tree = _unflatten(safetensors.numpy.load_file(path))
    return Artefact(
      # Options that are younger than the file take the values of its mode.
      options=from_json(Options, meta["options"]).filled(meta["mode"]),
      mode=meta["mode"],
      model=meta["model"],
      params=tree["params"],
      stats=InputStats(**tree["stats"]),
      prices=np.asarray(tree["prices"]),
      spent=np.asarray(tree["spent"]),
      scalar_stats=np.asarray(tree["scalar_stats"]),
      coefficients=np.asarray(tree["coefficients"]),
      action_costs=np.asarray(tree.get("action_costs", np.zeros((0,)))),
    )
  except FileNotFoundError as error:
    raise InputError(
      f"{path} is missing: train a policy there with train_sol.py first"
    ) from error
  except Exception as error:
    raise InputError(
      f"{path} is damaged ({reason(error)}): train the policy again"
    ) from error
