"""Perplexity and tasks of a language model, with standard errors.

  python experiments/eval_lm.py --model=smollm2 --window=1024 --windows=12
  python experiments/eval_lm.py --model=smollm2 --data=FOLDER \
    --tasks=lambada,piqa --limit=300 --workdir=runs/eval_smollm2

The text is scored in separate windows, every token once. Tasks are asked as
lm-evaluation-harness asks them; `research/evaluation/task_data.py` says
what files they are read from. With --workdir, which belongs to one model, a
run that was stopped goes on with the first task that is not done.
smollm2 has perplexity 25 on the 12 windows, in two minutes on 2 CPU cores.
"""

import functools
import pathlib
import time

from absl import flags

import chunk_flags
import cli
from models.errors import InputError

flags.adopt_module_key_flags(chunk_flags)
_MODEL = flags.DEFINE_string("model", "tiny", "tiny, smollm2, a path, a hub id")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, a path, a hub id")
_TASKS = flags.DEFINE_list(
  "tasks",
  ["perplexity"],
  "perplexity, lambada, arc_easy, arc_challenge, hellaswag, winogrande, piqa, "
  "boolq, mmlu, gsm8k",
)
_TEXT = flags.DEFINE_string(
  "text",
  "wikitext2:test",
  "of perplexity: wikitext2:train|valid|test, gutenberg:slice, or a file",
)
_FIELD = flags.DEFINE_string("text_field", "text", "of records of --text")
_WINDOW = cli.integer("window", 512, "tokens of its windows", 2)
_OVERLAP = cli.integer("overlap", 0, "tokens of a window that are context", 0)
_WINDOWS = cli.integer(
  "windows", None, "windows, spread evenly over the text; all if not given", 1
)
_DATA = flags.DEFINE_string("data", None, "folder with the files of the tasks")
_SHOTS = cli.integer(
  "shots", None, "examples before a question; gsm8k 5, others 0", 0, 64
)
_LIMIT = cli.integer("limit", None, "items a task, spread evenly; None: all", 1)
_LENGTH = cli.integer(
  "max_length", None, "longest row; by default as the model was trained", 16
)
_BATCH = cli.integer("batch_tokens", 4096, "tokens read by one call", 1)
_DTYPE = cli.choice(
  "dtype", "float32", "of the weights", ("float32", "bfloat16")
)
_PRECISION = cli.choice(
  "matmul_precision",
  "highest",
  "of float32 matrix products",
  ("highest", "tensorfloat32", "default"),
)
_WORKDIR = flags.DEFINE_string("workdir", None, "keep finished tasks here")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
_COLUMNS = "model task data shots metric value stderr low high items"
_DECIDING = (_MODEL, _TEXT, _WINDOW, _OVERLAP, _WINDOWS, _SHOTS, _LIMIT)
_DECIDING += (_LENGTH, _DTYPE, _PRECISION, _TOKENIZER, _FIELD)
_DECIDING += chunk_flags.FLAGS


def _workdir() -> pathlib.Path | None:
  """The folder to keep tasks in, bound to the flags that decide numbers."""
  from research.core import workdir as workdir_lib

  if _WORKDIR.value is None:
    return None
  path = pathlib.Path(_WORKDIR.value).expanduser()
  workdir_lib.claim(path, {flag.name: flag.value for flag in _DECIDING})
  return path


def main(_) -> None:
  """Evaluates; see the module's docstring."""
  began = time.perf_counter()
  from models.text import load_text
  from research.evaluation import tasks

  cli.check_there([_MODEL.value], tokenizer=_TOKENIZER.value)
  # All inputs are read first: a missing file ends no long run in its midst.
  todo = {}
  for name in dict.fromkeys(_TASKS.value):
    if name == tasks.PERPLEXITY:
      todo[name] = tasks.Text(
        data=_TEXT.value,
        text=load_text(_TEXT.value, _FIELD.value),
        window=_WINDOW.value,
        overlap=_OVERLAP.value,
        max_windows=_WINDOWS.value,
      )
      continue
    todo[name] = tasks.load_task(
      name, _DATA.value, shots=_SHOTS.value, limit=_LIMIT.value
    )
  import jax  # after the flags were checked: a mistake is answered at once
  import jax.numpy as jnp

  from models.convert import load
  from research.core import progress
  from research.decoding.text import Generator
  from research.evaluation import judging, scoring
  from research.text.tokenizing import of_checkpoint

  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  checkpoint = chunk_flags.changed(load(_MODEL.value, jnp.dtype(_DTYPE.value)))
  tokenizer = of_checkpoint(checkpoint, _TOKENIZER.value)
  model = (checkpoint.config, checkpoint.params, tokenizer)
  length = _LENGTH.value or checkpoint.config.max_position or 8192
  if tasks.PERPLEXITY in todo and _WINDOW.value > length:
    raise InputError(f"--window={_WINDOW.value}: --max_length is {length}")
  scorer = scoring.Scorer(*model, max_length=length, batch_tokens=_BATCH.value)
  generator = Generator(*model)
  common = chunk_flags.told() | {
    "system": checkpoint.config.family,
    "model": checkpoint.name,
    "method": "dense",
    "budget": 1.0,
    "seeds": 1,
    "dtype": _DTYPE.value,
  }
  rows = []
  for name, subject in todo.items():
    judge = functools.partial(
      judging.judge,
      scorer,
      generator,
      subject,
      common={**common, "task": name},
      advance=functools.partial(progress.counter, name),
    )
    found, before = judging.kept(_workdir(), name, judge)
    rows += found
    if before:
      print(f"{name}: done before, read from {_WORKDIR.value}")
  cli.show(rows, tuple(_COLUMNS.split()))
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
