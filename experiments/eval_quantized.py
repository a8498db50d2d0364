"""Quantizes a model by every recipe, and puts them beside each other.

  python experiments/eval_quantized.py --model=runs/mamba2_tiny/model \
    --text=wikitext2:test --calibration_text=wikitext2:valid \
    --result=quantized.json --plot=quantized.png

For each recipe: bytes of weights; perplexity of the held-out text, scored as a
whole and decoded token by token with the state that the recipe keeps, with
intervals paired with the float model's; KL from the float model along texts
that it draws; repetition of texts that the quantized model draws. --plant makes
channels large first, the function of the float model unchanged. A few minutes
for 60 million parameters on one H200; for a tiny model on two CPU cores, too,
with fewer --rows and --tokens.
"""

import time

from absl import flags

import cli
from models.errors import InputError
from research.quantization.recipes import LLAMA_CPP, RECIPES

_MODEL = flags.DEFINE_string(
  "model", "tiny", "tiny, smollm2, a checkpoint's path or a hub id"
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, a path, a hub id")
_NAME = flags.DEFINE_string("name", None, "of the model in tables")
_RECIPES = flags.DEFINE_list("recipes", [], "names; all if not given")
_CALIBRATION = flags.DEFINE_string(
  "calibration_text", "wikitext2:train", "text to calibrate on"
)
_CALIBRATED = cli.integer("windows", 128, "windows of that text", 1)
_LENGTH = cli.integer("length", 512, "tokens of a window", 16)
_TEXT = flags.DEFINE_string("text", "wikitext2:test", "held-out text")
_SCORED = cli.integer("scored_windows", None, "of it; all if not given", 1)
_ROWS = cli.integer("rows", 16, "rows of it that are decoded together", 2)
_TOKENS = cli.integer("tokens", 1024, "tokens of a row", 32)
_AT = flags.DEFINE_list(
  "at", [16, 256, 1024], "tokens of drawn texts at which KL is told"
)
_WORKERS = cli.integer("workers", 4, "recipes at a time", 1, 64)
_PLANT = cli.number("plant", 0, "factor of planted outliers; 0 plants none", 0)
_SEED = cli.integer("seed", 0, "of draws and planted channels", 0)
_PRECISION = cli.choice(
  "matmul_precision",
  "highest",
  "of float32 matrix products",
  ("highest", "tensorfloat32", "default"),
)
_PLOT = flags.DEFINE_string("plot", None, "PNG to write")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
# Channels behind every norm that --plant makes large.
_PLANTED = 4


_ALL = (*RECIPES, *LLAMA_CPP)


def _check() -> list[int]:
  unknown = [name for name in _RECIPES.value if name not in _ALL]
  if unknown:
    raise InputError(
      f"--recipes={unknown[0]}: no such recipe; there are {', '.join(_ALL)}"
    )
  if not all(str(at).isdigit() and int(at) > 0 for at in _AT.value):
    raise InputError(f"--at={','.join(_AT.value)}: give positive integers")
  return sorted(map(int, _AT.value))


def main(_) -> None:
  """Compares; see the module's docstring."""
  began, at = time.perf_counter(), _check()
  import jax  # after the flags were checked: a mistake is answered at once

  from models.convert import load
  from models.text import load_text
  from research.evaluation.judging import Text
  from research.quantization import (
    calibration,
    comparison,
    picture,
    smoothing,
  )
  from research.results import quantization, recording
  from research.text.tokenizing import of_checkpoint

  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  text = Text(
    data=_TEXT.value,
    text=load_text(_TEXT.value),
    window=_LENGTH.value,
    max_windows=_SCORED.value,
  )
  checkpoint = load(_MODEL.value)
  tokenizer = of_checkpoint(checkpoint, _TOKENIZER.value)
  config, params = checkpoint.config, checkpoint.params
  if _PLANT.value:
    params = smoothing.plant_outliers(
      config, params, factor=_PLANT.value, count=_PLANTED, seed=_SEED.value
    )
  batches = calibration.batches_of(
    load_text(_CALIBRATION.value),
    tokenizer,
    windows=_CALIBRATED.value,
    length=_LENGTH.value,
  )
  plan = comparison.Plan(
    text=text,
    batches=batches,
    rows=_ROWS.value,
    tokens=_TOKENS.value,
    at=tuple(at),
    seed=_SEED.value,
  )
  record = recording.Record(_RESULT.value, began)
  name = _NAME.value or checkpoint.name
  model = config, params
  found = comparison.Comparison(name, model, tokenizer, plan, record.say)
  names = _RECIPES.value or comparison.names_for(config)
  rows = record.rows(found.rows(names, _WORKERS.value))
  print(quantization.table(rows), end="")
  if _PLOT.value:
    picture.plot(_PLOT.value, rows, "Recipes by bytes and perplexity")
    print(f"plot: {_PLOT.value}")


if __name__ == "__main__":
  cli.run(main)
