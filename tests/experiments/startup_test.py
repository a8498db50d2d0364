"""A mistaken flag is answered at once: scripts read flags without JAX."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from models.numbers import Ieee, TargetCodec
from models.regression_lm_config import RegressionLMConfig
from research.regression_lm import described

SCRIPTS = pathlib.Path(__file__).parents[2] / "experiments"
# The packages that take seconds to import.
HEAVY = ("jax", "flax", "optax", "orbax", "scipy", "tokenizers", "safetensors",
         "matplotlib", "huggingface_hub", "sklearn", "xgboost")  # fmt: skip

# Each script in a fork, since absl's flags are global. cli, which all share, is
# there already, and would define its flag twice.
_PROGRAM = """
import os, pathlib, runpy, sys
sys.path.insert(0, sys.argv[1])
import cli
heavy = sys.argv[2].split()
for script in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
  if not (child := os.fork()):
    if script.stem != "cli":
      runpy.run_path(str(script))
    print(script.name, *[name for name in heavy if name in sys.modules])
    sys.stdout.flush()
    os._exit(0)
  os.waitpid(child, 0)
"""


def test_scripts_import_what_is_heavy_after_their_flags_were_checked():
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM, str(SCRIPTS), " ".join(HEAVY)],
    capture_output=True,
    text=True,
    check=True,
  )
  lines = [line.split() for line in done.stdout.splitlines()]
  assert not done.stderr
  assert len(lines) == len(list(SCRIPTS.glob("*.py"))) > 15
  assert [line for line in lines if len(line) > 1] == []


# Mistakes that a script answers before it imports what is heavy, also those in
# a small TABLE, in a MODEL without weights, in one with a WRONG config, and in
# one that PREDICTS from a column that the table has not.
MISTAKES = """
analyse_rlm
analyse_rlm --answers=/nowhere
bench --suite=ops --ops=foo
bench --suite=ops --shapes=foo=tiny:2x64
bench --suite=language_model --decode=foo
bench --suite=language_model --train=foo
bench --suite=regression_lm --sample=foo
bench --suite=sol --model=/nowhere
codesign_fabnet
codesign_fabnet --space=foo
codesign_fabnet --objectives=foo
codesign_fabnet --methods=foo
codesign_fabnet --accuracies=/nowhere
codesign_fabnet --device=zynq7045 --objectives=dsp
codesign_fabnet --only=p_bu=3 --objectives=dsp
eval_lm --tasks=foo
eval_lm --tasks=lambada
eval_lm --text=foo
eval_lm --model=/nowhere
eval_lm --tokenizer=/nowhere
eval_pages --windows=0 --needles=0
eval_pages --text=foo
eval_pages --model=/nowhere
eval_quantized --recipes=foo
eval_quantized --text=foo
eval_quantized --calibration_text=foo
eval_quantized --model=MODEL
eval_quantized --model=WRONG
eval_rlm --model=/nowhere
eval_rlm --model=none
eval_rlm --peers=foo
eval_rlm --model=MODEL --path=/nowhere
eval_rlm --model=MODEL --path=TABLE
eval_rlm --model=PREDICTS --path=TABLE
eval_sol --workdir=/nowhere
generate
generate --prompt=x --model=/nowhere
generate --prompt=x --tokenizer=/nowhere
generate --prompt=x --model=MODEL
generate --prompt=x --model=WRONG
kernelbench_rlm
kernelbench_rlm --path=/nowhere
learning_curve_rlm
learning_curve_rlm --path=/nowhere
learning_curve_rlm --path=. --peers=foo
learning_curve_rlm --path=TABLE --targets=foo
make_program_metrics
plot_lm
plot_lm --runs=/nowhere
plot_lra
plot_lra --runs=a --names=b,c
plot_lra --runs=a --times=/nowhere
plot_recall
plot_result
plot_result --kind=speed
plot_result --kind=speed --result=/nowhere
predict_rlm
predict_rlm --path=TABLE --out=new.csv --model=MODEL
predict_rlm --path=TABLE --out=new.csv --model=PREDICTS
quantize_lm
quantize_lm --out=.
quantize_lm --out=new --calibration_text=foo
time_lra --batches=0
time_lra --augment
train_lm --text=foo
train_lm --eval_text=foo
train_lm --text=RECORDS
train_lm --start=/nowhere
train_lm --start=MODEL
train_lm --start=WRONG
train_recall --pairs=9 --length=32
train_recall --seeds=1,1
train_recall --seed=1
train_recall --eval_every=9
train_recall --symbols=8 --pairs=4 --test_pairs=4,16
train_recall --test_pairs=64 --test_lengths=32
train_rlm
train_rlm --path=/nowhere
train_rlm --data=foo
train_rlm --path=TABLE --targets=foo
train_rlm --path=TABLE --targets=word
train_rlm --path=TABLE --targets=huge
train_rlm --path=TABLE --targets=x --train=900
train_rlm --data=jsonl --path=TABLE --targets=x
train_sol --model=/nowhere
train_sol --model=tiny --text=foo
transfer_rlm
transfer_rlm --path=. --targets=x --peers=foo
transfer_rlm --path=. --targets=x --models=foo
transfer_rlm --path=TABLE --targets=foo
transfer_rlm --path=TABLE --targets=x --source_paths=/nowhere
transfer_rlm --path=TABLE --targets=x --out=a.txt
docs_tables --foo
train_lra --task=foo
train_lra --task=text
train_lra --task=image --data=/nowhere
train_lra --augment
"""
# These two need JAX itself, but no model of flax.
AFTER_JAX = """
generate --prompt=x --state_format=int5
train_sol --model=tiny --preset=foo
"""

# Seconds are of the CPU, so that other work counts little; the child's clock
# begins at zero.
_MISTAKES = """
import os, runpy, sys, time
sys.path.insert(0, sys.argv[1])
import cli
heavy = sys.argv[2].split()
shared = time.process_time()
for line in sys.argv[3].splitlines():
  if not (child := os.fork()):
    script, *arguments = line.split()
    sys.argv = [f"{sys.argv[1]}/{script}.py", *arguments]
    try:
      runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
      code = end.code
    imported = [name for name in heavy if name in sys.modules]
    print(line, "|", code, shared + time.process_time(), *imported)
    sys.stdout.flush()
    os._exit(0)
  os.waitpid(child, 0)
"""


# To import JAX takes .6 to .7 seconds, and where other tests run up to half as
# much more, and so does what is ours. So the bound is a second, or half as much
# again as JAX takes there; of several tries the least counts.
_JAX = "import time, jax.numpy; print(time.process_time())"


def jax_seconds():
  """Of the CPU, to import JAX: the least of three tries."""
  command = [sys.executable, "-c", _JAX]
  run = lambda: subprocess.run(command, capture_output=True, check=True).stdout
  return min(float(run()) for _ in range(3))


def write_predictor(folder):
  """A regression language model whose files of arrays are empty."""
  codec = TargetCodec(format=Ieee(mantissa_digits=1))
  config = RegressionLMConfig.tiny(
    target_vocab_size=len(codec.tokens), target_length=codec.length
  )
  entries = {
    "kind": described.KIND,
    "version": described.VERSION,
    "model": dataclasses.asdict(config),
    "numbers": codec.format.to_json(),
    "num_objectives": codec.num_objectives,
    "max_length": 8,
    "info": {
      "data": {"kind": "csv", "targets": ["gone"]},
      "columns": [{"name": "lost"}],
    },
  }
  folder.mkdir()
  (folder / described.CONFIG).write_text(json.dumps(entries))
  (folder / described.WEIGHTS).touch()
  (folder / described.TOKENIZER).touch()
  return folder


@pytest.mark.parametrize(
  "mistakes, heavy",
  [
    (MISTAKES, HEAVY),
    (3 * AFTER_JAX, tuple(name for name in HEAVY if name != "jax")),
  ],
  ids=["before JAX", "after JAX"],
)
def test_a_mistake_is_answered_within_a_second(mistakes, heavy, tmp_path):
  table = tmp_path / "a.csv"
  table.write_text("x,word,huge\n" + "1,a,1e300\n2,b,3\n" * 20)
  (tmp_path / "config.json").write_text("{}")
  lines = mistakes.strip().replace("\n\n", "\n").replace("TABLE", str(table))
  records = tmp_path / "a.jsonl"
  records.write_text('{"other": "a"}\n')
  lines = lines.replace("RECORDS", str(records))
  wrong = tmp_path / "wrong"
  wrong.mkdir()
  (wrong / "model.safetensors").touch()
  config = {"model_type": "llama", "hidden_size": "32", "vocab_size": 8}
  config |= {"num_hidden_layers": 1, "num_attention_heads": 2}
  (wrong / "config.json").write_text(json.dumps(config))
  lines = lines.replace("MODEL", str(tmp_path)).replace("WRONG", str(wrong))
  predicts = write_predictor(tmp_path / "predicts")
  lines = lines.replace("PREDICTS", str(predicts))
  done = subprocess.run(
    [sys.executable, "-c", _MISTAKES, str(SCRIPTS), " ".join(heavy), lines],
    capture_output=True,
    text=True,
    check=True,
  )
  told = done.stderr.splitlines()
  assert len(told) == len(lines.splitlines())
  least, free = {}, 0.0 if "jax" in heavy else jax_seconds()
  for line, error in zip(done.stdout.splitlines(), told, strict=True):
    mistake, _, found = line.partition(" | ")
    code, seconds, *imported = found.split()
    assert error.startswith("error: "), mistake
    assert code == "2" and not imported, line
    if str(predicts) in line:
      assert str(table) in error and ("lost" in error or "gone" in error)
    least[mistake] = min(float(seconds), least.get(mistake, 9.0))
  assert len(least) == len(set(lines.splitlines()))
  most = max(1.0, 1.5 * free)
  assert {m: seconds for m, seconds in least.items() if seconds >= most} == {}
