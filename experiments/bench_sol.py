"""Times SOL's rollouts and updates against what the machine can do.

  python experiments/bench_sol.py --model=smollm2 \
    --dtype=float32,bfloat16 --matmul_precision=highest,default

Each row has its floor: operations over the rate of a large matrix product,
bytes over the bandwidth of a large copy, both measured in the same run; see
research/sol/bench.py. `compiles` must be 1.
"""

import os
import time

from absl import flags

import cli
from models.errors import InputError

_PRECISIONS = ("highest", "tensorfloat32", "default")
_MODEL = flags.DEFINE_string(
  "model",
  "tiny",
  "frozen model: tiny, smollm2, a directory, a .gguf file, a hub id, or "
  "random:NAME for random weights of a shape, such as random:smollm2_135m",
)
_PRESET = flags.DEFINE_list("preset", ["J-FL"], "action tables")
_DTYPE = flags.DEFINE_list(
  "dtype", ["float32"], "of the frozen model: float32, bfloat16, or both"
)
_PRECISION = flags.DEFINE_list(
  "matmul_precision",
  ["highest"],
  f"one for each dtype, or one for all: {', '.join(_PRECISIONS)}",
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
_ONLY = flags.DEFINE_list("only", [], "time these rows only, such as block")
_REPEATS = cli.integer("repeats", 20, "calls of each row at most", 1, 1000)
_SECONDS = cli.number(
  "seconds", 300.0, "after so many no further row begins", 1.0
)
_RESULT = flags.DEFINE_string("result", None, "write the result JSON here")
_COLUMNS = {
  "ms": "10,.2f",
  "tokens_per_second": "18,.0f",
  "floor_ms": "10,.3f",
  "share": "10.1%",
  "matmul_share": "13.1%",
  "gflop": "11,.2f",
  "compiles": "9",
}


def _settings() -> list[tuple[str, str, str]]:
  """(preset, dtype, precision) of every table; dtype and precision paired."""
  dtypes, precisions = _DTYPE.value, _PRECISION.value
  for name, values, valid in (
    ("dtype", dtypes, ("float32", "bfloat16")),
    ("matmul_precision", precisions, _PRECISIONS),
  ):
    for value in set(values) - set(valid) or ([] if values else [""]):
      raise InputError(f"--{name}={value}: take from {', '.join(valid)}")
  most = max(len(dtypes), len(precisions))
  if {len(dtypes), len(precisions)} - {1, most}:
    raise InputError(
      f"{len(dtypes)} values of --dtype and {len(precisions)} of "
      "--matmul_precision do not pair: give one, or as many"
    )
  dtypes, precisions = (
    values * (most // len(values)) for values in (dtypes, precisions)
  )
  return [(p, *pair) for p in _PRESET.value for pair in zip(dtypes, precisions)]


def _line(cells: dict, head: bool = False) -> str:
  name = "op" if head else cells["op"]
  rest = (
    f"{key:>{width.split('.')[0].strip(',')}}"
    if head
    else f"{cells[key]:{width}}"
    for key, width in _COLUMNS.items()
  )
  return f"{name:26}{''.join(rest)}"


def main(_) -> None:
  """Runs the benchmark; see the module's docstring."""
  began = time.perf_counter()
  settings = _settings()
  import jax  # after the flags were checked: a mistake is answered at once

  from research.sol import bench

  on_cpu = jax.default_backend() == "cpu"
  pick = lambda value, small, large: (
    value if value is not None else small if on_cpu else large
  )
  options = {
    "windows": pick(_WINDOWS.value, 1, 8),
    "context": pick(_CONTEXT.value, 64, 512),
    "horizon": _HORIZON.value,
    "group_size": pick(_GROUP.value, 4, 32),
  }
  rows, skipped = [], []
  for preset, dtype, precision in settings:
    with jax.default_matmul_precision(precision):
      config, params = bench.load(_MODEL.value, dtype)
      method = bench.method_of(config, preset=preset, **options)
      ceilings = bench.measure_ceilings(
        dtype, *pick(None, (1024, 1 << 27), (8192, 1 << 31))
      )
      setting = {
        "model": _MODEL.value,
        "preset": preset,
        "dtype": dtype,
        "matmul_precision": precision,
        "matmul_tflops": ceilings.flops / 1e12,
        "copy_gb_per_s": ceilings.bytes / 1e9,
      }
      print("\n", " ".join(f"{k}={v}" for k, v in setting.items()), sep="")
      print(_line({}, head=True), flush=True)
      timed = bench.Bench(method, params, options["windows"])
      ops = [*timed.operations()]
      if pick(_BREAKDOWN.value, False, True):
        ops += timed.breakdown()
      if unknown := set(_ONLY.value) - {op.name for op in ops}:
        names = ", ".join(op.name for op in ops)
        raise InputError(f"--only={','.join(unknown)}: take from {names}")
      ops = [op for op in ops if op.name in (_ONLY.value or [op.name])]
      for op in ops:
        if time.perf_counter() - began > _SECONDS.value:
          skipped.append({**setting, "op": op.name})
          continue
        limit = _SECONDS.value / len(settings) / len(ops) / 2
        row = bench.row(op, ceilings, repeats=_REPEATS.value, seconds=limit)
        rows.append(setting | row)
        print(_line(row), flush=True)
      layer = bench.microseconds_per_layer(rows[-len(ops) :], method)
      if layer is not None:
        print(f"one layer of one step: {layer:.1f} us")
  if skipped:
    print(f"out of --seconds: {len(skipped)} rows skipped")
  if _RESULT.value:
    seconds = time.perf_counter() - began
    xla_flags = os.environ.get("XLA_FLAGS", "")
    cli.write_result(
      _RESULT.value,
      rows,
      cli.command(),
      seconds,
      xla_flags=xla_flags,
      skipped=skipped,
    )


if __name__ == "__main__":
  cli.run(main)
