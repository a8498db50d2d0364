"""Trains a language model to recall what stood in its text, and tests it.

  python experiments/train_recall.py \
    --flagfile=experiments/flagfiles/recall_tiny.flags

learns to recall values of up to 4 pairs, with .45 of right answers where there
are 4, in a minute on 2 CPU cores.
--task=pairs asks for the values of keys, --task=needle for facts strewn over a
text. Models are those of train_lm.py; --seeds=0,1,2 trains all at once, in one
program. Texts of training have up to --pairs pairs, of --symbols keys, in
--length tokens; tests have every length and number of pairs that is asked and
fits. Writes the run to --workdir: flags, metrics, checkpoints, `report.md` and
`result.json`. The same command goes on where a killed run was;
`plot_recall.py` puts several beside each other.
"""

import pathlib
import time

from absl import flags

import cli
import option_flags
from models.errors import InputError
from research.language_model.options import Options
from research.language_model.recall import Task

_WORKDIR = flags.DEFINE_string("workdir", "runs/recall", "folder of the run")
_NAME = flags.DEFINE_string("name", None, "in tables; --arch if not given")
_SEEDS = cli.integers("seeds", [0], "of members", lower=0)
_LENGTHS = cli.integers(
  "test_lengths", [], "tokens of tested texts; --length if none", lower=16
)
_PAIRS = cli.integers(
  "test_pairs", [], "pairs of tested texts; --pairs if none", lower=1
)
# What is about texts of words, and about one model instead of several seeds.
_OPTIONS = option_flags.define(
  Options,
  without=(
    "tokenizer",
    "documents",
    "text_field",
    "document_mask",
    "held_out",
    "accumulate",
    "eval_every",
    "eval_windows",
    "seed",
  ),
)
# Few tokens are asked for, and their loss alone is the rule.
flags.set_default(_OPTIONS["z_loss"], 0.0)
_TASK = option_flags.define(Task)


def main(_) -> None:
  """Trains and tests; see the module's docstring."""
  began = time.perf_counter()
  options = Options(**{name: flag.value for name, flag in _OPTIONS.items()})
  task = Task(**{name: flag.value for name, flag in _TASK.items()})
  if len(set(_SEEDS.value)) < len(_SEEDS.value) or not _SEEDS.value:
    raise InputError(f"--seeds={_SEEDS.value}: give one or more, each once")
  task.check(options.length, task.pairs, options.vocab_size)
  lengths = tuple(_LENGTHS.value) or (options.length,)
  pairs = tuple(_PAIRS.value) or (task.pairs,)
  task.tests(lengths, pairs, options.vocab_size)

  # After the flags were checked, so that a mistake is answered at once.
  from research.language_model import recalling

  run = recalling.Run(
    name=_NAME.value or options.arch,
    options=options,
    task=task,
    seeds=tuple(_SEEDS.value),
    test_lengths=lengths,
    test_pairs=pairs,
    workdir=pathlib.Path(_WORKDIR.value),
  )
  rows = recalling.train(run, cli.say)
  cli.keep(run.workdir / "result.json", rows, began)


if __name__ == "__main__":
  cli.run(main)
