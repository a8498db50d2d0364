"""Times training and draws of regression language models, beside a peer.

  python experiments/bench_rlm.py --train=512/2+2:64x2048:bfloat16 \
    --sample=512/2+2:512x2048x64:bfloat16 --peer=CHECKOUT --result=rlm.json

Sizes are WIDTH/ENCODER+DECODER layers, shapes BATCHxLENGTH and
TEXTSxLENGTHxDRAWS. The peer is a checkout of google-deepmind/regress-lm, timed
first in a process of its own: its updates compiled as by default, in float32 as
it is released, with TensorFloat-32, and under autocast to bfloat16. Draws count
from tokens of texts to numbers on the host; the peer's are timed for
--peer_texts texts and scaled up. `share` is the time of the least work at the
device's peak (data sheet, or measured where there is none) of ours. The result
is written anew after every row, `complete` with the last. About a minute a row
of the peer that it compiles, and ten seconds one of ours, on an H100.
"""

import time

from absl import flags

import cli
from research.results import recording

_TRAIN = flags.DEFINE_list("train", [], "such as 512/2+2:64x2048:bfloat16")
_SAMPLE = flags.DEFINE_list(
  "sample", [], "such as 512/2+2:512x2048x64:bfloat16"
)
_REPEATS = cli.integer("repeats", 5, "measurements of a row", 1, 1000)
_PEER = flags.DEFINE_string("peer", None, "checkout of the peer")
_PEER_PYTHON = flags.DEFINE_string(
  "peer_python", None, "interpreter with torch; this one if not given"
)
_PEER_TEXTS = cli.integer("peer_texts", 16, "in one call of the peer", 1)
_PEER_SETTINGS = flags.DEFINE_list(
  "peer_settings", ["float32", "tf32", "bfloat16"], "of the peer"
)
_PEER_COMPILE = flags.DEFINE_bool(
  "peer_compile", True, "let the peer compile its updates"
)
_PROFILE = flags.DEFINE_bool("profile", False, "name the kernels of ours")
_RESULT = flags.DEFINE_string("result", None, "write the result JSON here")


def main(_) -> None:
  """Runs the benchmark; see the module's docstring."""
  began = time.perf_counter()
  from research.bench.suites import regression_lm as bench

  plan = bench.Plan(
    train=_TRAIN.value,
    sample=_SAMPLE.value,
    repeats=_REPEATS.value,
    peer=_PEER.value,
    peer_python=_PEER_PYTHON.value,
    peer_texts=_PEER_TEXTS.value,
    peer_settings=_PEER_SETTINGS.value,
    peer_compile=_PEER_COMPILE.value,
    profile=_PROFILE.value,
  )
  recording.record_rows(lambda say: bench.run(plan, say), _RESULT.value, began)


if __name__ == "__main__":
  cli.run(main)
