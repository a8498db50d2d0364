"""Times a suite against what the machine can, and against peers.

  python experiments/bench.py --suite=ops --shapes=130m:8x2048 \
    --passes=fwd,bwd --peers=plain,mamba_ssm --result=ops.json
  python experiments/bench.py --suite=language_model --unroll=0 \
    --decode=mamba2_130m:1,llama3_2_1b:1x512 --train=mamba2/60m:64x1024 \
    --peers=mamba_ssm,transformers
  python experiments/bench.py --suite=sol --model=smollm2 \
    --dtype=float32,bfloat16 --matmul_precision=highest,default
  python experiments/bench.py --suite=regression_lm --peer=CHECKOUT \
    --train=512/2+2:64x2048:bfloat16 --sample=512/2+2:512x2048x64:bfloat16

A row is an implementation beside a peer, timed in turn; its columns are those
of research/bench/plan.py. `floor_ms` is the time of the least work at the
device's peak, of its data sheet or else measured. `error` is relative, of ops
against float64, of decoding against float32. The result is written anew after
every row, `complete` with the last. A row takes seconds with tiny sizes on a
CPU, and up to a minute with published ones on a GPU, most of it to compile.
"""

import importlib
import time

from absl import flags

import bench_flags
import cli
from research.bench import specs

_SUITES = ("ops", "language_model", "sol", "regression_lm")
flags.adopt_module_key_flags(bench_flags)
_SUITE = cli.choice("suite", "ops", "what to time", _SUITES)
_REPEATS = cli.integer("repeats", 20, "measurements of a row, at most", 1, 1000)
_SECONDS = cli.number(
  "seconds",
  None,
  "of a row's measurements, about, 2 if not given; of sol those of a setting,"
  " 300 if not given, after which no further row begins",
  0.0,
)
_PROFILE = flags.DEFINE_bool("profile", False, "name the kernels of ours")
_MEASURE = flags.DEFINE_bool(
  "measure_ceilings", False, "take what the device can from this run"
)
_RESULT = flags.DEFINE_string("result", None, "write the result JSON here")


def main(_) -> None:
  """Runs the benchmark; see the module's docstring."""
  began = time.perf_counter()
  name = _SUITE.value
  options = bench_flags.values(name)
  specs.check(name, options)
  random = options.get("model", "random:").startswith("random:")
  cli.check_there(models=[] if random else [options["model"]])
  given = {k: options.pop(k) for k in ("peers", "passes") if k in options}
  if _SECONDS.value is not None:
    (options if name == "sol" else given)["seconds"] = _SECONDS.value
  from research.bench.plan import Plan, run
  from research.results import recording

  suite = importlib.import_module(f"research.bench.suites.{name}")
  suite = suite.Suite(**options)
  plan = Plan(
    repeats=_REPEATS.value,
    profile=_PROFILE.value,
    measure_ceilings=_MEASURE.value,
    **given,
  )
  record = recording.Record(_RESULT.value, began)
  cases = suite.cases(plan, record.note)
  rows = record.rows(run(cases, plan, record.say, record.note))
  for line in suite.closing(rows):
    record.say(line)


if __name__ == "__main__":
  cli.run(main)
