"""Times ops, pass by pass, against what the machine can and against peers.

  python experiments/bench_ops.py --shapes=130m:8x2048 --dtype=bfloat16 \
    --passes=fwd,bwd --peers=plain,mamba_ssm --result=ops.json

Every implementation that runs here gets a row. `floor_ms` is the time of the
least work (research/bench/cases.py) at the device's peak (data sheet, or
measured where there is none); `error` is relative, against float64. The peer
`plain` is the op in plain JAX; `mamba_ssm` its CUDA and Triton kernels, where
torch, mamba_ssm and causal_conv1d are installed. On a CPU: seconds a row at
tiny:2x64, minutes at 130m:1x512.
"""

import time

from absl import flags

import cli

_OPS = flags.DEFINE_list("ops", [], "ops to time; none for all")
_SHAPES = flags.DEFINE_list(
  "shapes",
  ["tiny:2x64"],
  "SIZE:BxL each: tiny, 130m or 2.8b, batch and tokens",
)
_DTYPE = flags.DEFINE_list(
  "dtype", ["bfloat16"], "of activations: bfloat16 or float32"
)
_PASSES = flags.DEFINE_list(
  "passes", ["fwd", "bwd"], "fwd, bwd (from what fwd kept), fwd+bwd (at once)"
)
_IMPLEMENTATIONS = flags.DEFINE_list(
  "implementations", [], "xla, mosaic_gpu or mosaic_tpu; none for all that run"
)
_PEERS = flags.DEFINE_list("peers", [], "plain, mamba_ssm")
_REPEATS = cli.integer("repeats", 20, "measurements of a row at most", 1, 1000)
_SECONDS = cli.number("seconds", 2.0, "of a row's measurements, about", 0.0)
_RESULT = flags.DEFINE_string("result", None, "write the result JSON here")


def main(_) -> None:
  """Runs the benchmark; see the module's docstring."""
  began = time.perf_counter()
  from research.bench import run

  plan = run.Plan(
    ops=_OPS.value,
    shapes=_SHAPES.value,
    dtypes=_DTYPE.value,
    passes=_PASSES.value,
    implementations=_IMPLEMENTATIONS.value,
    peers=_PEERS.value,
    repeats=_REPEATS.value,
    seconds=_SECONDS.value,
  )
  rows, notes = run.run(plan, lambda line: print(line, flush=True))
  if _RESULT.value:
    seconds = time.perf_counter() - began
    cli.write_result(
      _RESULT.value, rows, cli.command(), seconds, left_out=notes
    )


if __name__ == "__main__":
  cli.run(main)
