"""Quantizes a model by every recipe, and puts them beside each other.

  python experiments/eval_quantized.py --model=runs/mamba2_tiny/model \
    --text=wikitext2:test --calibration_text=wikitext2:valid \
    --result=quantized.json --plot=quantized.png

For each recipe: bytes of weights; perplexity of the held-out text, scored as a
whole and decoded token by token with the state that the recipe keeps, with
intervals paired with the float model's; KL from the float model along texts
that it draws; repetition of texts that the quantized model draws; --tasks.
--model=A,B compares models that differ in their training seed: rows of each,
and of their mean. --plant makes channels large first, the function of the float
model unchanged. --as_arrays is for many formats, with a picture by true bits a
weight. With --workdir a run that was stopped goes on with the recipes
that are not done. On a GPU that several --workers share, set
XLA_PYTHON_CLIENT_PREALLOCATE=false. A few minutes for 60 million parameters on
one H200; for a tiny model on two CPU cores, too, with fewer --rows and
--tokens.
"""

import time

from absl import flags

import cli
from models.errors import InputError
from research.quantization import recipes

_MODEL = flags.DEFINE_list(
  "model", ["tiny"], "tiny, smollm2, checkpoints' paths or hub ids"
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, a path, a hub id")
_NAME = flags.DEFINE_string("name", None, "of the model in tables")
_RECIPES = flags.DEFINE_list(
  "recipes",
  [],
  f"all methods if not given; {', '.join(recipes.SETS)}, or {recipes.HELP}",
)
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
_TASKS = flags.DEFINE_list("tasks", [], "such as lambada,arc_easy,piqa")
_DATA = flags.DEFINE_string("data", None, "folder with the files of the tasks")
_WORKERS = cli.integer(
  "workers", 1, "recipes at a time, in processes; 1 takes no other", 1, 64
)
_PLANT = cli.number("plant", 0, "factor of planted outliers; 0 plants none", 0)
_SEED = cli.integer("seed", 0, "of draws and planted channels", 0)
_PRECISION = cli.choice(
  "matmul_precision",
  "highest",
  "of float32 matrix products",
  ("highest", "tensorfloat32", "default"),
)
_ARRAYS = flags.DEFINE_boolean(
  "as_arrays", False, "judge weights as arrays: one program for most recipes"
)
_PLOT = flags.DEFINE_string("plot", None, "PNG to write")
_WORKDIR = flags.DEFINE_string("workdir", None, "keep finished recipes here")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
_DECIDING = (_MODEL, _TOKENIZER, _NAME, _CALIBRATION, _CALIBRATED, _LENGTH)
_DECIDING += (_TEXT, _SCORED, _ROWS, _TOKENS, _AT, _TASKS, _PLANT, _SEED)
_DECIDING += (_PRECISION, _ARRAYS)


def _check() -> tuple[list[str], list[int]]:
  names = recipes.expanded(_RECIPES.value)
  if not all(str(at).isdigit() and int(at) > 0 for at in _AT.value):
    raise InputError(f"--at={','.join(_AT.value)}: give positive integers")
  texts = [_TEXT.value, _CALIBRATION.value]
  cli.check_there(_MODEL.value, texts, tokenizer=_TOKENIZER.value)
  return names, sorted(map(int, _AT.value))


def main(_) -> None:
  """Compares; see the module's docstring."""
  began, (names, at) = time.perf_counter(), _check()
  from research.evaluation import tasks

  asked = [tasks.load_task(name, _DATA.value) for name in _TASKS.value]
  import jax  # after the flags were checked: a mistake is answered at once

  from models.convert import load
  from models.text import load_text
  from research.quantization import calibration, comparison, measures, picture
  from research.results import quantization, recording
  from research.text.tokenizing import of_checkpoint

  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  text = tasks.Text(
    data=_TEXT.value, text=load_text(_TEXT.value),
    window=_LENGTH.value, max_windows=_SCORED.value,
  )  # fmt: skip
  checkpoint = load(_MODEL.value[0])
  batches = calibration.batches_of(
    load_text(_CALIBRATION.value),
    of_checkpoint(checkpoint, _TOKENIZER.value),
    windows=_CALIBRATED.value,
    length=_LENGTH.value,
  )
  plan = measures.Plan(
    text=text,
    batches=batches,
    tasks=tuple(asked),
    rows=_ROWS.value,
    tokens=_TOKENS.value,
    at=tuple(at),
    seed=_SEED.value,
  )
  names = names or comparison.names_for(checkpoint.config)
  setup = comparison.Setup(
    name=_NAME.value or checkpoint.name,
    models=tuple(_MODEL.value),
    tokenizer=_TOKENIZER.value,
    plan=plan,
    plant=_PLANT.value,
    seed=_SEED.value, precision=_PRECISION.value, arrays=_ARRAYS.value,
    flags={flag.name: flag.value for flag in _DECIDING},
  )  # fmt: skip
  record, found = recording.Record(_RESULT.value, began), {}
  for name, rows, line in comparison.compare(
    setup, names, _WORKERS.value, _WORKDIR.value
  ):
    # The seconds of the result do not count what was done before.
    (record.note if line.endswith(comparison.BEFORE) else record.say)(line)
    found[name] = rows
    # In the order of the names, whichever was done first.
    order = [one for one in (comparison.FLOAT, *names) if one in found]
    done = [row for one in order for row in found[one]]
    record.keep(done, complete=len(order) == len(names) + 1)
  print(quantization.table(done), end="")
  if asked:
    print(quantization.tasks(done), end="")
  if _PLOT.value:
    picture.plot(_PLOT.value, done, bits=_ARRAYS.value)
    print(f"plot: {_PLOT.value}")


if __name__ == "__main__":
  cli.run(main)
