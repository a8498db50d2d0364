"""Evaluates a regression language model beside its peers on held-out rows.

  python experiments/eval_rlm.py --model=runs/rlm/model --path=runs.csv

The split is the one that the model was trained with. Prints Spearman, Kendall's
tau, errors, CRPS and coverage, also of calibrated intervals, each with a 95%
bootstrap interval in the JSON of --result, beside ridge on TF-IDF, XGBoost and
an MLP trained on the same rows (--model=none --peers_dir=FOLDER trains them
beforehand); --plot draws them. Other --peers, for --data=programs, read token
counts, sizes or a compiler's costs. A model of the densities (--data=density)
is judged by its draws. Half a minute.
"""

import pathlib
import time

from absl import flags

import cli
import data_flags
from models.errors import InputError

flags.adopt_module_key_flags(data_flags)
_MODEL = flags.DEFINE_string(
  "model", "runs/rlm/model", "its folder; none trains the peers alone"
)
_SAMPLES = cli.integer("samples", 64, "draws a text", 2, 1 << 16)
_TEMPERATURE = cli.number("temperature", 1.0, "of the draws", 0.0, 100.0)
_TOP_P = cli.number("top_p", 1.0, "of the draws", 1e-6, 1.0)
_ANY_NUMBER = flags.DEFINE_bool(
  "any_number", False, "keep draws far outside of all training targets"
)
_LIMIT = cli.integer("limit", None, "test rows at most", 2)
_PEERS = flags.DEFINE_list(
  "peers",
  ["ridge on TF-IDF", "XGBoost", "MLP"],
  "beside the model, or none; also 'XGBoost on token counts', 'cost analysis'"
  " and 'XGBoost on the cost analysis', of programs 'XGBoost on sizes'",
)
_KEPT = flags.DEFINE_string(
  "peers_dir",
  None,
  "folder of answers of peers, which need not train again",
)
_PROCESSES = cli.integer("processes", 1, "that train the peers", 1, 4096)
_ANSWERS = flags.DEFINE_string("answers", None, "JSONL file of our answers")
_BOOTSTRAP = cli.integer("bootstrap", 200, "resamples", 10, 1 << 16)
_LEVEL = cli.number("level", 0.9, "of the interval", 0.01, 0.99)
_DTYPE = cli.choice(
  "dtype", "float32", "of activations", ("float32", "bfloat16")
)
_SEED = cli.integer("seed", 0, "of draws and peers", 0)
_PLOT = flags.DEFINE_string("plot", None, "PNG of predictions against truth")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
# Rows of validation that calibrate intervals, at most.
_CALIBRATED = 1000


def _density(lm) -> tuple[list[dict], list[dict]]:
  from research.regression_lm.density import report as density_report

  rows, clouds = density_report.evaluate(
    lm, num_samples=_SAMPLES.value, seed=_SEED.value
  )
  if _PLOT.value:
    density_report.plot(_PLOT.value, clouds)
  return rows, rows


def _table(lm, options, table, trained) -> tuple[list[dict], list[dict]]:
  import numpy as np

  from research.predictors import peers
  from research.predictors.splits import Split
  from research.regression_lm import evaluate, prediction_plot, sources

  source = sources.open_source(options, data_flags.PATH.value, table)
  parts = source.parts
  if trained:
    sources.check_same(source, trained)
  parts = Split(parts.train, parts.valid, parts.test[: _LIMIT.value])
  kept = pathlib.Path(_KEPT.value) if _KEPT.value else None
  answers = evaluate.answers_of_peers(
    table, parts, peers.asked(_PEERS.value), seed=_SEED.value, kept=kept,
    say=cli.say, processes=_PROCESSES.value,
  )  # fmt: skip
  if lm is None:
    print(f"{len(answers)} answers of peers in {kept}")
    return [], []
  print("\n".join(source.summary()))
  asked = source.questions(lm)[: len(parts.test)]
  how = {"temperature": _TEMPERATURE.value, "top_p": _TOP_P.value}
  how |= {"seed": _SEED.value, "level": _LEVEL.value}
  how["plausible"] = not _ANY_NUMBER.value
  # Behind a prompt intervals are others than those without.
  if len(parts.valid) and not options.prompt_shots:
    lm.calibrate(source.held_out()[:_CALIBRATED], _SAMPLES.value, **how)
  prediction = lm.predict(asked, _SAMPLES.value, **how)
  if _ANSWERS.value:
    path = pathlib.Path(_ANSWERS.value)
    evaluate.write_answers(path, table, parts, prediction)
  known = table.examples(np.concatenate([parts.train, parts.valid]))
  expected = lm.expected(asked, known)
  found = evaluate.predictions(
    table, parts, prediction, answers, expected=expected
  )
  shared = {"system": "regression_lm", "data": options.kind, "seeds": 1}
  shared |= {"text": options.text, "split": options.named}
  shared["train"] = len(parts.train) + len(parts.valid)
  judged = {"num_samples": _BOOTSTRAP.value, "level": _LEVEL.value}
  rows = [row for f in found for row in evaluate.rows(f, **judged, **shared)]
  if _PLOT.value:
    prediction_plot.plot(_PLOT.value, found, _LEVEL.value)
  return rows, evaluate.table_lines(rows)


def main(_) -> None:
  """Evaluates; see the module's docstring."""
  began = time.perf_counter()
  from research.predictors import peers
  from research.regression_lm.data_sets import DENSITY

  peers.asked(_PEERS.value)
  lm, trained = None, None
  if _MODEL.value != "none":
    from research.regression_lm import described

    trained = described.read(_MODEL.value).info.get("data")
  elif not _KEPT.value or _RESULT.value or data_flags.DATA.value == DENSITY:
    raise InputError("--model=none trains peers of a table for --peers_dir")
  options = data_flags.data_options(trained)
  table = data_flags.read(options)
  if _MODEL.value != "none":
    from research.regression_lm import RegressionLM  # after what is checked

    lm = RegressionLM.from_pretrained(_MODEL.value, dtype=_DTYPE.value)
  if table is None:
    rows, lines = _density(lm)
  else:
    rows, lines = _table(lm, options, table, trained)
  if lines:
    cli.show(lines)
  if _PLOT.value:
    print(f"plot: {_PLOT.value}")
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
