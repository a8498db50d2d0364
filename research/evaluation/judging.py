"""Judges a language model: perplexity of a text, and tasks by likelihood."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models import input_files
from models.errors import InputError
from research.core import files, metrics
from research.decoding.text import Generator, TextOptions, generate_all
from research.evaluation import tasks
from research.evaluation.estimates import Estimate, estimate
from research.evaluation.scoring import Row, Score, Scorer, windows
from research.evaluation.tasks import PERPLEXITY, Task, Text

Advance = Callable[[int], None]


def judge(
  scorer: Scorer,
  generator: Generator,
  subject: Task | Text,
  *,
  common: Mapping[str, Any],
  advance: Callable[[int], Advance],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Rows of a result file on a task or a text, and values by item.

  Args:
    scorer: of the model.
    generator: of the same model.
    subject: what to judge the model by.
    common: keys that all rows share.
    advance: makes a progress counter for a total.
  """
  if isinstance(subject, Text):
    found, items = judge_text(scorer, subject, advance=advance)
    more = {"data": subject.data, "window": subject.window}
  else:
    found, items = judge_task(scorer, generator, subject, advance=advance)
    more = {"data": subject.data, "shots": subject.shots}
  rows = [{**common, **more, **dataclasses.asdict(one)} for one in found]
  return rows, items


def judge_text(
  scorer: Scorer, subject: Text, *, advance: Callable[[int], Advance]
) -> tuple[list[Estimate], dict[str, Any]]:
  """Perplexity and bits per byte of a text, every token scored once.

  Args:
    scorer: of the model.
    subject: the text.
    advance: makes a progress counter for a number of windows.

  Returns:
    The estimates over windows, and {"nll", "tokens"}: (n,) lists of each
    window's negative log-likelihood and scored tokens.

  Raises:
    InputError: the text is too short to score anything.
  """
  tokenizer = scorer.tokenizer
  tokens = tokenizer.encode(subject.text)
  begin, size = tokenizer.bos_id, subject.window
  try:
    rows = windows(tokens, size=size, overlap=subject.overlap, begin=begin)
  except ValueError as error:
    raise InputError(
      f"--window={size} with --overlap={subject.overlap}: no token is left to "
      "be scored, give a longer window or less overlap"
    ) from error
  if not rows:
    raise InputError(f"the text has {len(tokens)} tokens: give a longer one")
  wanted = subject.max_windows or len(rows)
  if wanted < len(rows):
    rows = [rows[i * len(rows) // wanted] for i in range(wanted)]
  scores = scorer.score(rows, advance(len(rows)))
  nll = [-score.total for score in scores]
  counts = [row.scored for row in rows]
  # Bytes are counted over the whole text, because a window may begin or end in
  # the middle of a character.
  bits = len(tokens) / len(subject.text.encode()) / math.log(2)
  estimates = [
    estimate(PERPLEXITY, nll, counts, math.exp, lambda value: value),
    estimate(
      "bits_per_byte", nll, counts, lambda x: x * bits, lambda value: bits
    ),
  ]
  return estimates, {"nll": nll, "tokens": counts}


def judge_task(
  scorer: Scorer,
  generator: Generator,
  task: Task,
  *,
  advance: Callable[[int], Advance],
) -> tuple[list[Estimate], dict[str, Any]]:
  """Runs a task.

  Args:
    scorer: of the model.
    generator: of the same model.
    task: from `tasks.load_task`.
    advance: makes a progress counter for a number of continuations.

  Returns:
    The estimates over items, and for every metric the list of its values on
    each item, for paired comparisons.
  """
  if task.kind == tasks.GENERATION:
    return _judge_generation(generator, task, scorer, advance(len(task.items)))
  rows = encode_task(scorer, task)
  values = by_likelihood(task, scorer.score(rows, advance(len(rows))))
  found = [estimate(name, value) for name, value in values.items()]
  if task.kind == tasks.CLOZE:
    acc, nll = values.values()
    found = [
      estimate("acc", acc),
      estimate(PERPLEXITY, nll, None, math.exp, lambda value: value),
    ]
  return found, values


def encode_task(scorer: Scorer, task: Task) -> list[Row]:
  """What is scored of a task by likelihood: each choice of each item."""
  return [
    scorer.encode_pair(context, choice)
    for item in task.items
    for context, choice in item.pairs
  ]


def by_likelihood(
  task: Task, scores: Sequence[Score]
) -> dict[str, list[float]]:
  """Values of every item, by metric.

  Args:
    task: a choice or a cloze.
    scores: of the rows of `encode_task`.
  """
  rest = iter(scores)
  by_item = [[next(rest) for _ in item.choices] for item in task.items]
  if task.kind == tasks.CLOZE:
    return _judge_cloze(by_item)
  return _judge_choice(task, by_item)


def _judge_generation(
  generator: Generator, task: Task, scorer: Scorer, advance: Advance
) -> tuple[list[Estimate], dict[str, Any]]:
  texts = generate_all(
    generator,
    [item.context for item in task.items],
    TextOptions(max_tokens=task.max_tokens, stop=task.stop, steps=8),
    max_length=scorer.max_length,
    batch_tokens=scorer.batch_tokens,
    advance=advance,
  )
  matches = [
    tasks.exact_match(text, item.choices[0])
    for text, item in zip(texts, task.items, strict=True)
  ]
  strict, flexible = np.asarray(matches, np.float64).T
  values = {"exact_match_strict": strict, "exact_match_flexible": flexible}
  found = [estimate(name, value) for name, value in values.items()]
  return found, {**values, "text": texts}


def _judge_cloze(by_item: Sequence[Sequence[Score]]) -> dict[str, list[float]]:
  return {
    "acc": [float(score.greedy.all()) for (score,) in by_item],
    "nll": [-score.total for (score,) in by_item],
  }


def _judge_choice(
  task: Task, by_item: Sequence[Sequence[Score]]
) -> dict[str, list[float]]:
  values: dict[str, list[float]] = {"acc": [], "acc_norm": []}
  for item, scores in zip(task.items, by_item, strict=True):
    totals = np.asarray([score.total for score in scores])
    # The space before an answer is no part of it.
    sizes = [len(choice[1:].encode()) for choice in item.choices]
    normed = totals / np.maximum(sizes, 1)
    values["acc"].append(float(totals.argmax() == item.answer))
    values["acc_norm"].append(float(normed.argmax() == item.answer))
  if any(item.contexts for item in task.items):
    del values["acc_norm"]  # The same, since continuations are.
  return values


def kept(
  workdir: pathlib.Path | None,
  name: str,
  judge: Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]],
) -> tuple[list[dict[str, Any]], bool]:
  """Result rows of a task, from `<workdir>/<name>.json` if it is done.

  The file appears whole or not at all, so that an evaluation that was stopped
  goes on with the first task that is not done.

  Args:
    workdir: folder of the evaluation, or None to keep nothing.
    name: of the task.
    judge: runs the task: result rows, and values by item.

  Returns:
    The rows, and whether they were there before.

  Raises:
    InputError: the file is damaged.
  """
  if workdir is None:
    return judge()[0], False
  path = workdir / f"{name}.json"
  if path.exists():
    again = "remove it, and the task runs again"
    found = input_files.read_kept(path, advice=again)
    with input_files.errors_at(path, again):
      return found["rows"], True
  rows, items = judge()
  files.write_json(path, metrics.to_json_value({"rows": rows, "items": items}))
  return rows, False
