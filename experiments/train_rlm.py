"""Trains a regression language model: numbers from any text.

  python experiments/train_rlm.py \
    --flagfile=experiments/flagfiles/rlm_tiny.flags

learns two numbers of a shipped table in two minutes on 2 CPU cores (Spearman
.96 and .98 by eval_rlm.py). Your own:

  python experiments/train_rlm.py --data=csv --path=runs.csv \
    --targets=accuracy,seconds --workdir=runs/mine

With --encoder_weights=FOLDER the encoder is that of T5Gemma or T5Gemma-2, which
--freeze_encoder leaves as it is; --prompt_shots=4 --group_column=task trains a
model that reads examples in front of a text.

Writes the run to --workdir: flags, metrics, checkpoints, curves, `report.md`,
and the model in `model/`, for `eval_rlm.py` and `RegressionLM.from_pretrained`.
The same command goes on where a killed run was. First it prints what the data
holds: rows, targets, what stands in the text, repeats across the split.
"""

import pathlib
import time

from absl import flags

import cli
import data_flags
import mesh_flags
import option_flags
from research.regression_lm import data_sets
from research.regression_lm.options import Options

flags.adopt_module_key_flags(data_flags)
flags.adopt_module_key_flags(mesh_flags)
_WORKDIR = flags.DEFINE_string("workdir", "runs/rlm", "folder of the run")
_START = flags.DEFINE_string("start", None, "folder of a model to go on from")
_WEIGHTS = flags.DEFINE_string(
  "encoder_weights", None, "folder or hub id of T5Gemma, whose encoder is taken"
)
_ATTENTION = cli.choice(
  "attention", None, "implementation over text", ("xla", "cudnn")
)
_PRECISION = cli.choice(
  "matmul_precision",
  "default",
  "of float32 matrix products",
  ("highest", "tensorfloat32", "default"),
)
_UNROLL = cli.integer(
  "unroll", 1, "encoder layers in one iteration of their scan, 0 for all", 0
)
_CHECKPOINT = cli.integer("checkpoint_every", 500, "updates", 1)
_LOG = cli.integer("log_every", 10, "updates between lines of metrics", 1)
_OPTIONS = option_flags.define(Options)


def main(_) -> None:
  """Trains; see the module's docstring."""
  began = time.perf_counter()
  mesh_flags.check()
  options = Options(**{name: flag.value for name, flag in _OPTIONS.items()})
  data = data_flags.data_options()
  table = data_flags.read(data)
  if table and not _START.value:
    data_sets.check_targets(table, data.split(table), options.number_format())

  import jax  # after flags and data were checked: mistakes are told at once

  from research.regression_lm import sources, training

  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  run = training.Run(
    options=options,
    source=sources.open_source(data, data_flags.PATH.value, table),
    workdir=pathlib.Path(_WORKDIR.value),
    start=_START.value,
    encoder_weights=_WEIGHTS.value,
    mesh=mesh_flags.mesh(),
    attention=_ATTENTION.value,
    unroll=_UNROLL.value,
    checkpoint_every=_CHECKPOINT.value,
    log_every=_LOG.value,
  )
  print("\n".join(run.source.summary()))
  training.train(run, cli.say)
  seconds = time.perf_counter() - began
  print(f"model: {run.workdir / 'model'} ({seconds:.0f} s)")


if __name__ == "__main__":
  cli.run(main)
