"""Regression language models and their peers by the number of examples.

  python experiments/learning_curve_rlm.py --data=nasbench201 \
    --path=nasbench201.csv.gz --targets=val_acc_200ep_cifar10 \
    --flagfile=experiments/flagfiles/rlm_nasbench201_cpu.flags

Every size and seed trains a model on random rows (a fifth of them decide when
to stop) and the peers on the same rows, and tests all on the same other rows.
Finished parts are kept in --workdir: a killed run goes on where it was. Half an
hour on two CPU cores.
"""

import dataclasses
import pathlib
import time

from absl import flags

import cli
import data_flags
import option_flags
from models.errors import InputError
from research.regression_lm.options import Options

flags.adopt_module_key_flags(data_flags)
_WORKDIR = flags.DEFINE_string("workdir", "runs/rlm_curve", "folder of the run")
_SIZES = cli.integers(
  "sizes", [78, 256], "numbers of training examples", 2, 1e6
)
_SEEDS = cli.integer("seeds", 3, "splits", 1, 1000)
_VALID_SHARE = cli.number("valid_share", 0.2, "of the examples", 0.0, 0.9)
_TESTS = cli.integer("tests", 5000, "test rows at most", 2)
_START = flags.DEFINE_string("start", None, "folder of a model to begin with")
_ENSEMBLE = cli.integer("ensemble", 1, "models, their draws pooled", 1, 64)
_SAMPLES = cli.integer("samples", 64, "draws of a text", 2, 1 << 16)
_METHOD = cli.choice("method", "full", "what is trained", ("full", "lora"))
_EPOCHS = cli.integer("epochs", 100, "at most", 1, 10**6)
_PATIENCE = cli.integer("patience", 10, "epochs without a better one", 1)
_SELECT = cli.choice(
  "select", "loss", "what validation looks at", ("loss", "expected")
)
_PEERS = flags.DEFINE_list(
  "peers", ["ridge on TF-IDF", "XGBoost", "MLP"], "beside the model, or none"
)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
_OPTIONS = option_flags.define(Options)


def main(_) -> None:
  """Runs; see the module's docstring."""
  began = time.perf_counter()
  options = Options(**{name: flag.value for name, flag in _OPTIONS.items()})
  data = data_flags.data_options()
  if data.prompt_shots or data.text_copies > 1:
    raise InputError(
      "--prompt_shots and --text_copies: are for train_rlm.py: leave them out"
    )
  from research.predictors import peers

  asked = peers.asked(_PEERS.value)
  table = data_flags.read(data)
  if table is None:
    raise InputError(f"--data={data.kind}: has no rows: take a table")
  from research.core import workdir as workdir_lib
  from research.predictors import summary
  from research.regression_lm import learning_curve
  from research.regression_lm.fine_tuning import FineTuneOptions
  from research.results import predictions

  curve = learning_curve.Curve(
    data=data,
    sizes=_SIZES.value,
    valid_share=_VALID_SHARE.value,
    seeds=_SEEDS.value,
    model=options,
    fine_tune=FineTuneOptions(
      method=_METHOD.value,
      freeze_encoder=options.freeze_encoder,
      max_epochs=_EPOCHS.value,
      patience=_PATIENCE.value,
      batch=options.batch,
      learning_rate=options.learning_rate,
      warmup=options.warmup,
      weight_decay=options.weight_decay,
      clip_norm=options.clip_norm,
      loss=options.loss(),
      select=_SELECT.value,
      scale=options.scale,
      grid=options.grid,
    ),
    start=_START.value,
    ensemble=_ENSEMBLE.value,
    num_samples=_SAMPLES.value,
    peers=asked,
    tests=_TESTS.value,
  )
  first = learning_curve.split(curve, table, max(curve.sizes), 0)
  print("\n".join(summary.lines(table, first)))
  workdir = pathlib.Path(_WORKDIR.value)
  # More sizes and seeds may be asked of a workdir; what is done stays right
  # as long as the largest size, which decides the test, is the same.
  deciding = dataclasses.asdict(curve) | {"largest": max(curve.sizes)}
  for name in ("sizes", "seeds"):
    deciding.pop(name)
  workdir_lib.claim(workdir, deciding)
  rows = learning_curve.run(curve, table, workdir, cli.say)
  lines = predictions.means_over_seeds(rows)
  columns = ["target", "train", "method", "kendall", "kendall sd", "spearman",
             "mse", "crps", "coverage of 0.9, calibrated", "seeds"]  # fmt: skip
  cli.show(lines, columns)
  cli.keep(_RESULT.value, rows, began, summary=lines)


if __name__ == "__main__":
  cli.run(main)
