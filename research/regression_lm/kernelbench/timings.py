"""Timings of KernelBench's programs, cut into folds, and their tokens.

Shapes by axis letter: N timings, P programs, B examples.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from models.errors import InputError
from research.predictors import kernelbench
from research.regression_lm.kernelbench import made_up_programs
from research.regression_lm.kernelbench.plan import Plan
from research.regression_lm.options import Options
from research.regression_lm.token_batches import Texts
from research.text import tokenizing

# Made-up programs that a tokenizer is learned from.
_LEARNED = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Timings:
  """N timings of the programs of a set.

  Attributes:
    sources: P programs.
    program: (N,) index of each timing's.
    problems: N names.
    fold: (N,) of its problem; -1 for those made up, which none holds out.
    runs: N names of runs.
    headings: N first lines of a text: GPU, run and mode.
    modes: N names.
    ms: (N,) milliseconds.
  """

  sources: Sequence[str]
  program: np.ndarray
  problems: Sequence[str]
  fold: np.ndarray
  runs: np.ndarray
  headings: Sequence[str]
  modes: Sequence[str]
  ms: np.ndarray


def load(folder: str | pathlib.Path, plan: Plan) -> Timings:
  """Reads kernelbench_sources.jsonl.gz and kernelbench_timings.csv.gz.

  Raises:
    InputError: a file is missing or does not do, or a run has no timing.
  """
  folder = pathlib.Path(folder).expanduser()
  codes, rows = kernelbench.read(folder)
  order = np.random.default_rng((plan.options.seed, 41)).permutation(
    sorted({row["problem"] for row in rows})
  )
  fold_of = {str(n): i % plan.folds for i, n in enumerate(order)}
  if plan.limit:
    fold_of = dict(list(fold_of.items())[: plan.limit])
  fold = lambda row: fold_of.get(row["problem"], -1)
  rows = [row for row in rows if fold(row) >= 0]
  for run in plan.runs:
    if not any(row["run"] == run for row in rows):
      raise InputError(f"{folder}: has no run {run!r}: name others with --runs")
  index = {src: i for i, src in enumerate(codes)}
  return Timings(
    sources=list(codes.values()),
    program=np.array([index[row["src"]] for row in rows]),
    problems=[row["problem"] for row in rows],
    fold=np.array([fold(row) for row in rows]),
    runs=np.array([row["run"] for row in rows]),
    headings=[
      f"{row['hardware']}\n{row['run']}\n{row['mode']}\n" for row in rows
    ],
    modes=[row["mode"] for row in rows],
    ms=np.array([float(row["mean_ms"]) for row in rows]),
  )


def with_made_up(timings: Timings, forms, plan: Plan):
  """Timings and forms with the second task behind them."""
  made = made_up_programs.programs(plan.made_up, plan.options.seed)
  texts = [text for text, _ in made]
  count, before = len(made), len(timings.sources)
  longer = Timings(
    sources=[*timings.sources, *texts],
    program=np.append(timings.program, before + np.arange(count)),
    problems=[*timings.problems, *[""] * count],
    fold=np.append(timings.fold, np.full(count, -1)),
    runs=np.append(timings.runs, [""] * count),
    headings=[*timings.headings, *[made_up_programs.HEADING] * count],
    modes=[*timings.modes, *[""] * count],
    ms=np.append(timings.ms, [ms for _, ms in made]),
  )
  return longer, [form + texts for form in forms]


class Fold:
  """Tokens of all timings, by a tokenizer of the training part of a fold."""

  def __init__(self, timings: Timings, forms, fold: int, options: Options):
    """Learns the tokenizer.

    Args:
      timings: all.
      forms: for each renaming, the canonical forms of all programs.
      fold: that is held out.
      options: sizes of tokenizer and texts.
    """
    self.train = np.flatnonzero((timings.fold != fold) & (timings.fold >= 0))
    self.made_up = np.flatnonzero(timings.fold < 0)
    self.test = np.flatnonzero(timings.fold == fold)
    self._program, self._most = timings.program, options.max_length
    made = timings.program[self.made_up]
    names = sorted(set(timings.headings))
    # Texts that repeat are learned from, and written in tokens, once.
    known = [*timings.program[self.train], *made[:_LEARNED]]
    known = dict.fromkeys(form[i] for form in forms for i in known)
    tokenizer = tokenizing.train_bpe([*names, *known], options.vocab_size)
    ids = lambda texts: [
      np.asarray(found, np.int32) for found in tokenizer.encode_all(texts)
    ]
    bodies = list(dict.fromkeys(text for form in forms for text in form))
    written = dict(zip(bodies, ids(bodies)))
    place = {name: i for i, name in enumerate(names)}
    self._headings = ids(names)
    self._heading = np.array([place[name] for name in timings.headings])
    self._forms = [[written[text] for text in form] for form in forms]

  def texts(self, rows: np.ndarray, forms: np.ndarray) -> Texts:
    """Tokens of timings (B,) with their programs in forms (B,)."""
    parts = [
      np.concatenate(
        [
          self._headings[self._heading[row]],
          self._forms[form][self._program[row]],
        ]
      )[: self._most]
      for row, form in zip(rows, forms)
    ]
    starts = np.cumsum([0, *map(len, parts)])
    return Texts(np.concatenate(parts), starts, 0)
