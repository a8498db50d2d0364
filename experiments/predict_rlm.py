"""Predicts the rows of a file with a regression language model.

  python experiments/predict_rlm.py --model=runs/mine/model --path=new.csv \
    --out=predicted.csv --calibrate_on=runs.csv

Reads CSV, TSV or JSON lines, with the targets empty, absent or partly there,
and writes the texts as training did: the model knows its columns, their order
and how the file was read. Each row comes out with its own cells (--keep names
fewer), the median of every target and both ends of its interval, and its draws
with --draws. --calibrate_on, the file of training, widens the intervals by the
rows that were held out for validation. Cells unlike all of training are told,
and refused where they look like a mistake (--any_cell takes them). Thousands of
short rows take a minute on a CPU.
"""

from absl import flags

import cli
import table_flags
from models.errors import InputError

flags.adopt_module_key_flags(table_flags)
_MODEL = flags.DEFINE_string("model", "runs/rlm/model", "its folder")
_PATH = flags.DEFINE_string("path", None, "file of the rows")
_OUT = flags.DEFINE_string(
  "out", None, "file to write: .csv, .tsv or .jsonl, by its name"
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "write over --out")
_KEEP = flags.DEFINE_list(
  "keep", None, "columns that are copied to --out; all if not given"
)
_CALIBRATE = flags.DEFINE_string(
  "calibrate_on",
  None,
  "file of training, whose validation rows widen intervals",
)
_ANY_CELL = flags.DEFINE_bool(
  "any_cell", False, "take gaps, and words for numbers, that training never saw"
)
_ANY_NUMBER = flags.DEFINE_bool(
  "any_number", False, "keep draws far outside of all training targets"
)
_SAMPLES = cli.integer("samples", 64, "draws a row", 2, 1 << 16)
_DRAWS = flags.DEFINE_bool("draws", False, "write the draws, too")
_LEVEL = cli.number("level", 0.9, "of the interval", 0.01, 0.99)
_TEMPERATURE = cli.number("temperature", 1.0, "of the draws", 0.0, 100.0)
_TOP_P = cli.number("top_p", 1.0, "of the draws", 1e-6, 1.0)
_BATCH = cli.integer("batch", 256, "rows of one step", 1, 1 << 20)
_DTYPE = cli.choice(
  "dtype", "float32", "of activations", ("float32", "bfloat16")
)
_SEED = cli.integer("seed", 0, "of the draws", 0)


def main(_) -> None:
  """Predicts; see the module's docstring."""
  from research.predictors import tables

  given = tables.Layout(**table_flags.layout())
  if not _PATH.value:
    raise InputError("--path: give the file of the rows to predict")
  cli.check_path(_PATH.value)
  if _CALIBRATE.value:
    cli.check_path(_CALIBRATE.value)

  from research.regression_lm import described, rows_to_predict, written_rows

  model = described.read(_MODEL.value)
  out = written_rows.check_out(_OUT.value, _OVERWRITE.value)
  rows = rows_to_predict.read(
    model, _PATH.value, given, any_cell=_ANY_CELL.value
  )
  from research.core import progress  # after the model and rows were checked
  from research.regression_lm import RegressionLM, predict

  lm = RegressionLM.from_pretrained(_MODEL.value, dtype=_DTYPE.value)
  names = predict.predicted_names(lm, _DRAWS.value)
  for note in rows.notes:
    cli.say(note)
  how = {"level": _LEVEL.value, "temperature": _TEMPERATURE.value}
  how |= {"top_p": _TOP_P.value, "seed": _SEED.value}
  how["plausible"] = not _ANY_NUMBER.value
  if _CALIBRATE.value:
    predict.calibrate(lm, _CALIBRATE.value, _SAMPLES.value, **how)
  cli.say(f"text: {' '.join(rows.texts[0].split())[:160]}")
  found = predict.batches(
    lm, rows, samples=_SAMPLES.value, batch=_BATCH.value, draws=_DRAWS.value,
    **how,
  )  # fmt: skip
  written_rows.write(
    out, rows, found, names, keep=_KEEP.value, delimiter=given.delimiter,
    decimal=given.decimal or ".",
    advance=progress.counter("predict", len(rows)),
  )  # fmt: skip
  print(f"predictions of {len(rows)} rows: {_OUT.value}")


if __name__ == "__main__":
  cli.run(main)
