"""Times ops, pass by pass, against what the machine can and against peers.

  python experiments/bench_ops.py --shapes=130m:8x2048 --dtype=bfloat16 \
    --passes=fwd,bwd --peers=plain,mamba_ssm --result=ops.json

Every implementation that runs here gets a row. `floor_ms` is the time of the
least work (research/bench/suites/op_cases.py) at the device's peak (data sheet,
or measured where there is none); `error` is relative, of the first tokens
against float64, `error_full` of the whole shape against float32 in XLA, where
that is affordable. The peer `plain` is the op in plain JAX; `mamba_ssm` the
CUDA and Triton kernels of mamba_ssm and causal_conv1d that are installed.
The result is written anew after every row, `complete` with the last. On a CPU:
seconds a row at tiny:2x64, minutes at 130m:1x512.
"""

import time

from absl import flags

import cli

_OPS = flags.DEFINE_list("ops", [], "ops to time; none for all")
_SHAPES = flags.DEFINE_list(
  "shapes",
  ["tiny:2x64"],
  "SIZE:BxL each: tiny, 130m, 370m, 1.3b or 2.8b, batch and tokens; "
  "OP=SIZE:BxL for one op alone",
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
  from research.bench.suites import ops as run

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

  def keep(rows, notes, complete=False) -> None:
    if _RESULT.value:
      cli.write_result(
        _RESULT.value,
        rows,
        cli.command(),
        time.perf_counter() - began,
        left_out=notes,
        complete=complete,
      )

  found = run.run(plan, lambda line: print(line, flush=True), keep)
  keep(*found, complete=True)


if __name__ == "__main__":
  cli.run(main)
