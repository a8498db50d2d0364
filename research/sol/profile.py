"""Measured times of actions on one device: a file, and how it is made.

Axis letters: A actions.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError, reason
from research.sol import damage as damage_lib
from research.sol import rollout
from research.sol.actions import AXES, FULL_BITS, ActionTable
from research.sol.rollout import Setup


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


def measure(
  setup: Setup, lm: Any, *, context: int, windows: int, repeats: int
) -> list[dict[str, Any]]:
  """Times a decode step under every level of a table on this device.

  A step is one token of every window through all layers and the head, by the
  decoder that SOL plays actions with: where that masks what an action drops, a
  level takes as long as the dense step.

  Args:
    setup: the model, the table, and its pages.
    lm: parameters of the model.
    context: tokens before the step, a multiple of the page size.
    windows: sequences of the batch.
    repeats: calls, of which the median counts.

  Returns:
    Rows: "dense", with what `Profile` holds, and one for every "level".
  """
  full = dict(zip(AXES, (1.0, 1.0, FULL_BITS), strict=True))
  every = damage_lib.moves(setup.table)
  played = [full | {axis: level} for axis, level in every] + [full]
  table = dataclasses.replace(
    setup.table,
    name="levels",
    **{axis: tuple(one[axis] for one in played) for axis in AXES},
  )
  setup = dataclasses.replace(setup, table=table)
  tokens = np.random.default_rng(0).integers(
    0, setup.config.vocab_size, (windows, context + setup.horizon + 1)
  )
  tokens = jnp.asarray(tokens, jnp.int32)
  prefix = setup.build_prefix(lm, tokens[:, : context + 1], context)
  starts = jnp.full((windows, 1), context, jnp.int32)

  @jax.jit
  def play(lm, prefix, actions):
    found = rollout.score_block(setup, lm, prefix, tokens, starts, actions)
    return found.log_p

  def ms(function, *arguments):
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
      began = time.perf_counter()
      jax.block_until_ready(function(*arguments))
      seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds))

  def step(level, steps=1):
    actions = jnp.full((windows, 1, steps), level, jnp.int32)
    return ms(play, lm, prefix, actions)

  last = len(every)
  small = jnp.ones((16, 16))
  dense = {
    "op": "dense",
    "device": jax.devices()[0].device_kind,
    "context": context,
    "windows": windows,
    "ms": step(last),
    "launch_ms": ms(jax.jit(jnp.matmul), small, small),
    "replay_ms": step(last, setup.horizon),
    "replayed": setup.horizon,
  }
  rows = [
    {"op": "level", "axis": axis, "level": level, "ms": step(i)}
    for i, (axis, level) in enumerate(every)
  ]
  # A full level is the dense step: a time of its own would be noise.
  rows += [
    {"op": "level", "axis": axis, "level": level, "ms": dense["ms"]}
    for axis, level in full.items()
  ]
  return [dense, *rows]
