"""Times decoding and training of language models against what a device can.

  python experiments/bench_lm.py --decode=mamba2_130m:1,mamba2_2_7b:64 \
    --train=mamba2/60m:64x1024 --unroll=0 --peer --result=lm.json

`floor_ms` is the time of the least work at the device's peak (data sheet, or
measured where there is none): for decoding, of reading weights and states and
writing states; for an update, of its matrix products, so that `share` is the
MFU. The peer is mamba_ssm in a CUDA graph, where it is installed. `error` of a
decoding is that of its logits against float32, relative. The result is written
anew after every row, `complete` with the last. A row takes seconds with tiny
sizes on a CPU, and about a minute with published ones on a GPU, most of it for
XLA to look for fast products: less with --steps=mosaic_gpu.
"""

import time

from absl import flags

import cli
from research.results import recording

_DECODE = flags.DEFINE_list(
  "decode", [], "MODEL:BATCH each, such as mamba2_130m:1"
)
_TRAIN = flags.DEFINE_list(
  "train", [], "ARCH/PRESET:BxL each, such as mamba2/60m:64x1024"
)
_STEPS = flags.DEFINE_list(
  "steps", ["xla", "mosaic_gpu"], "implementations of a decoding step"
)
_TOKENS = cli.integer("tokens", 64, "decoded in a call", 1, 4096)
_REPEATS = cli.integer("repeats", 5, "measurements of a row", 1, 1000)
_UNROLL = cli.integer(
  "unroll", 1, "layers in one iteration of a training scan, 0 for all", 0
)
_REMAT = flags.DEFINE_bool(
  "remat", False, "compute every layer again in the backward pass"
)
_PEER = flags.DEFINE_bool("peer", False, "time mamba_ssm's decoding too")
_PROFILE = flags.DEFINE_bool(
  "profile", False, "name the kernels that an update's time goes to"
)
_RESULT = flags.DEFINE_string("result", None, "write the result JSON here")


def main(_) -> None:
  """Runs the benchmark; see the module's docstring."""
  began = time.perf_counter()
  from research.bench.suites import language_model as bench

  plan = bench.Plan(
    decode=_DECODE.value,
    train=_TRAIN.value,
    steps=_STEPS.value,
    tokens=_TOKENS.value,
    repeats=_REPEATS.value,
    unroll=_UNROLL.value,
    remat=_REMAT.value,
    peer=_PEER.value,
    profile=_PROFILE.value,
  )
  recording.record_rows(lambda say: bench.run(plan, say), _RESULT.value, began)


if __name__ == "__main__":
  cli.run(main)
