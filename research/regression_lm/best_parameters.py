"""The parameters with the best validation loss of a run, in one file.

The file is written by the evaluations of a run, by rename, with the loss in it.
A run that was killed evaluates again what it did after its last checkpoint, and
finds the same losses: what is in the file stays right.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.numpy

from models import input_files, weight_files
from models.errors import InputError
from models.regression_lm import Params
from research.core import files, workdir


class Best:
  """Keeps the best parameters in `path`."""

  def __init__(self, path: pathlib.Path):
    """Reads the loss of the file, where there is one.

    Raises:
      InputError: the file is damaged, or of a run with other flags than those
        beside it.
    """
    self._path = path
    flags = path.with_name(workdir.FLAGS)
    self._run = files.digest_of_file(flags) if flags.exists() else ""
    self.loss, self.step = None, 0
    if path.exists():
      found = self._metadata()
      self.loss, self.step = float(found["loss"]), int(found["step"])

  def offer(self, step: int, loss: float, params: Params) -> None:
    """Writes the file where `loss` is less than any before."""
    if self.loss is not None and not loss < self.loss:
      return
    # The loss is written with all its digits, so that a run that goes on
    # compares with the same number.
    found = {"step": str(step), "loss": repr(float(loss)), "run": self._run}
    files.write_safetensors(self._path, weight_files.flatten(params), found)
    self.loss, self.step = float(loss), step

  def load(self, like: Params) -> tuple[int, Params]:
    """The step and the parameters of the file.

    Args:
      like: parameters of the same model.

    Raises:
      InputError: the file is damaged, or of another model.
    """
    step = int(self._metadata()["step"])
    flat = safetensors.numpy.load_file(self._path)
    wanted: dict[str, Any] = weight_files.flatten(like)
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    if shapes != {name: leaf.shape for name, leaf in wanted.items()}:
      raise InputError(f"{self._path}: is of another model: remove it")
    return step, jax.tree.map(jnp.asarray, weight_files.unflatten(flat))

  def _metadata(self) -> dict[str, str]:
    with input_files.errors_at(self._path, "give another --workdir"):
      with safetensors.safe_open(self._path, framework="numpy") as file:
        found = file.metadata() or {}
      found = {"run": self._run} | found
      metadata = {name: found[name] for name in ("loss", "step", "run")}
      float(metadata["loss"]), int(metadata["step"])
    if metadata["run"] != self._run:
      raise InputError(
        f"{self._path}: is of a run with other flags: give another --workdir"
      )
    return metadata
