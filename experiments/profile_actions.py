"""Measures what a decode step takes under every level of SOL's actions.

  python experiments/profile_actions.py --model=tiny --preset=S-FL \
    --result=runs/profile.json

For `train_sol.py --budget_unit=ms --profile=FILE`. The decoder is the one that
plays the actions, on the device at hand: it masks what an action drops, so that
every level takes about as long as the dense step. Half a minute on two CPU
cores.
"""

import time

from absl import flags

import cli
from models.errors import InputError

_MODEL = flags.DEFINE_string("model", "smollm2", "the frozen model")
_PRESET = flags.DEFINE_string("preset", "KR-FL", "action table")
_PAGE = cli.integer("page_size", None, "tokens a page; the preset's", 1, 256)
_CONTEXT = cli.integer("context", 128, "tokens before the step", 16)
_WINDOWS = cli.integer("windows", 1, "sequences of the batch", 1)
_REPEATS = cli.integer("repeats", 9, "calls, of which the median counts", 1)
_DTYPE = cli.choice(
  "dtype", "float32", "of the frozen model", ("float32", "bfloat16")
)
_RESULT = flags.DEFINE_string("result", None, "write the result JSON here")


def main(_) -> None:
  """Measures; see the module's docstring."""
  began = time.perf_counter()
  cli.check_there([_MODEL.value], [])
  import jax.numpy as jnp  # after the flags were checked

  from models import convert
  from research.sol import actions, profile
  from research.sol.rollout import Setup

  table = actions.preset(_PRESET.value)
  page = _PAGE.value or table.page_size
  if _CONTEXT.value % page:
    raise InputError(f"--context={_CONTEXT.value} is no multiple of {page}")
  checkpoint = convert.load(_MODEL.value, jnp.dtype(_DTYPE.value))
  setup = Setup(
    config=checkpoint.config,
    table=table,
    horizon=table.horizon,
    page_size=page,
    keep_sink_and_current=True,
  )
  rows = profile.measure(
    setup,
    checkpoint.params,
    context=_CONTEXT.value,
    windows=_WINDOWS.value,
    repeats=_REPEATS.value,
  )
  for row in rows:
    name = "dense"
    if row["op"] == "level":
      name = f"{row['axis']} {row['level']:g}"
    print(f"{name:>12}  {row['ms']:.3f} ms  {row['ms'] / rows[0]['ms']:.3f}")
  if _RESULT.value:
    seconds = time.perf_counter() - began
    cli.write_result(_RESULT.value, rows, cli.command(), seconds)


if __name__ == "__main__":
  cli.run(main)
