"""Measured times of actions on one device, as `profile_actions.py` writes them.

Axis letters: A actions.
"""

import dataclasses
import json
import pathlib

import numpy as np

from models.errors import InputError, reason
from research.sol.actions import AXES, ActionTable


@dataclasses.dataclass(frozen=True)
class Profile:
  """Measured times of decode steps on one device.

  Attributes:
    device: its name.
    dense: ms of the dense step.
    launch: ms of a kernel as small as a policy's.
    replay: ms of the dense replay of `replayed` tokens.
    replayed: how many.
    levels: axis -> level -> ms of a step with that level alone.
  """

  device: str
  dense: float
  launch: float
  replay: float
  replayed: int
  levels: dict[str, dict[float, float]]

  def shares(self, table: ActionTable) -> np.ndarray:
    """Predicted time of the A actions, as shares of the dense step's.

    Axes save different parts of a step, so what they save is added up.

    Raises:
      InputError: a level was not measured.
    """
    saved = np.zeros(table.size)
    for axis in AXES:
      for i, level in enumerate(getattr(table, axis)):
        if level not in self.levels.get(axis, {}):
          raise InputError(
            f"the profile has no {axis}={level:g}: measure it by "
            "profile_actions.py with the same --preset"
          )
        saved[i] += self.dense - self.levels[axis][level]
    return np.maximum(self.dense - saved, 0.0) / self.dense

  def controller(self, launches: float) -> float:
    """Share of a dense step that so many small kernels take."""
    return launches * self.launch / self.dense

  @property
  def refresh(self) -> float:
    """Share of a dense step that a token pays for its replay, with logits."""
    return self.replay / self.replayed / self.dense


def read(path: pathlib.Path) -> Profile:
  """Reads what `profile_actions.py` wrote.

  Raises:
    InputError: the file is missing or damaged.
  """
  try:
    rows = json.loads(path.read_text())["rows"]
    (dense,) = [row for row in rows if row["op"] == "dense"]
    levels: dict[str, dict[float, float]] = {}
    for row in rows:
      if row["op"] == "level":
        own = levels.setdefault(row["axis"], {})
        own[float(row["level"])] = float(row["ms"])
    return Profile(
      device=str(dense["device"]),
      dense=float(dense["ms"]),
      launch=float(dense["launch_ms"]),
      replay=float(dense["replay_ms"]),
      replayed=int(dense["replayed"]),
      levels=levels,
    )
  except FileNotFoundError as error:
    raise InputError(
      f"{path} is missing: measure it by profile_actions.py"
    ) from error
  except Exception as error:
    raise InputError(f"{path} is no profile ({reason(error)})") from error
