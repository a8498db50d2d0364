"""SOL: a policy that chooses how much of a language model each token gets."""

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from research.sol.artefact import Artefact

__all__ = ["load_policy"]


def load_policy(path: str | pathlib.Path) -> "Artefact":
  """Reads a trained policy, with what it was trained for and its budgets.

  Args:
    path: of a run of `train_sol.py`, or of a folder `policy` in it.

  Raises:
    models.errors.InputError: a file is missing or damaged.
  """
  from research.sol import artefact

  folder = pathlib.Path(path)
  if (folder / "policy" / "policy.json").exists():
    folder = folder / "policy"
  return artefact.load(folder)
