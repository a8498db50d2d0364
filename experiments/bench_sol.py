"""Times SOL's rollouts and updates against what the machine can do.

  python experiments/bench_sol.py --model=smollm2 \
    --dtype=float32,bfloat16 --matmul_precision=highest,default

Each row has its floor: operations over the rate of a large matrix product,
bytes over the bandwidth of a large copy, both measured in the same run; see
research/bench/suites/sol.py. `compiles` must be 1.
"""

import os
import time

from absl import flags

import cli

_MODEL = flags.DEFINE_string(
  "model",
  "tiny",
  "frozen model: tiny, smollm2, a directory, a .gguf file, a hub id, or "
  "random:NAME for random weights of a shape, such as random:smollm2_135m",
)
_PRESET = flags.DEFINE_list("preset", ["J-FL"], "action tables")
_DTYPE = flags.DEFINE_list(
  "dtype", ["float32"], "of the frozen model: float32 or bfloat16"
)
_PRECISION = flags.DEFINE_list(
  "matmul_precision",
  ["highest"],
  "of float32 matrix products, one for each dtype or one for all: highest, "
  "tensorfloat32 or default",
)
_CONTEXT = cli.integer(
  "context", None, "tokens before an episode; 64 on a CPU, else 512", 16
)
_HORIZON = cli.integer("horizon", 16, "steps of an episode", 1, 1024)
_WINDOWS = cli.integer("windows", None, "1 on a CPU, else 8", 1, 4096)
_GROUP = cli.integer(
  "group_size", None, "rollouts of an episode; 4 on a CPU, else 32", 2, 1024
)
_BREAKDOWN = flags.DEFINE_bool(
  "breakdown", None, "time scans that leave parts out; not on a CPU by default"
)
_ONLY = flags.DEFINE_list("only", [], "rows to time, such as block; or all")
_REPEATS = cli.integer("repeats", 20, "calls of each row at most", 1, 1000)
_SECONDS = cli.number(
  "seconds", 300.0, "of each setting; after so many no further row begins", 1.0
)
_RESULT = flags.DEFINE_string("result", None, "write the result JSON here")


def main(_) -> None:
  """Runs the benchmark; see the module's docstring."""
  began = time.perf_counter()
  from research.bench.suites import sol as bench

  rows, skipped = [], []
  pairs = bench.pair(_DTYPE.value, _PRECISION.value)
  for preset in _PRESET.value:
    for dtype, precision in pairs:
      plan = bench.Plan(
        model=_MODEL.value,
        preset=preset,
        dtype=dtype,
        precision=precision,
        context=_CONTEXT.value,
        horizon=_HORIZON.value,
        windows=_WINDOWS.value,
        group_size=_GROUP.value,
        breakdown=_BREAKDOWN.value,
        only=_ONLY.value,
        repeats=_REPEATS.value,
      )
      timed, left_out = bench.run(
        plan, _SECONDS.value, lambda line: print(line, flush=True)
      )
      rows += timed
      skipped += left_out
  if _RESULT.value:
    cli.write_result(
      _RESULT.value,
      rows,
      cli.command(),
      time.perf_counter() - began,
      xla_flags=os.environ.get("XLA_FLAGS", ""),
      skipped=skipped,
    )


if __name__ == "__main__":
  cli.run(main)
