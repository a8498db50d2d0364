"""What a model is judged by beside others: likelihoods, decoding, tasks.

Of the float model everything is seen first; others are compared with that, item
by item: a window of the held-out text, a row that is decoded, a question.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from models.errors import InputError
from models.tokenizer import Tokenizer
from research.core import intervals
from research.evaluation import judging, scoring
from research.evaluation.tasks import Task, Text
from research.quantization import quality

# Padded lengths of the questions of all tasks; each is compiled once a recipe.
_SIZES = 2
# Of intervals over questions, of which there are thousands.
_RESAMPLES = 2000
# Stands before the name of a task in a file.
_ACC = "acc/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What every recipe is judged by.

  Attributes:
    text: held out, scored in windows.
    batches: (N, B, T) tokens of the text to calibrate on.
    tasks: judged by likelihood.
    rows: that are decoded together, spread over the held-out text.
    tokens: of each.
    at: positions of drawn texts at which KL is told.
    prompt: tokens of the held-out text in front of them.
    seed: of draws.
    batch_tokens: that one call reads when windows are scored.
  """

  text: Text
  batches: np.ndarray
  tasks: tuple[Task, ...] = ()
  rows: int = 16
  tokens: int = 1024
  at: tuple[int, ...] = (16, 256, 1024)
  prompt: int = 16
  seed: int = 0
  batch_tokens: int = 16384

  @property
  def kept(self) -> tuple[int, ...]:
    """Positions at whose tokens distributions are compared."""
    places = [quality.near(self.prompt + token - 1) for token in self.at]
    return tuple(sorted({place for some in places for place in some}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
  """What is seen of one model.

  Attributes:
    nll: (W,) nats of each window of the held-out text.
    counts: (W,) tokens of each.
    decoded: (R,) nats a token of each decoded row.
    drawn: (R, T) tokens that the model draws, and that others read.
    kept: (K, R, V) log-probabilities along drawn tokens: of the float model
      along its own, of others along those of the float model.
    own: (R, T) tokens that the model draws.
    acc: (Q,) of each task by name, whether each question is answered right.
  """

  nll: np.ndarray
  counts: np.ndarray
  decoded: np.ndarray
  drawn: np.ndarray
  kept: np.ndarray
  own: np.ndarray
  acc: Mapping[str, np.ndarray]

  def arrays(self) -> dict[str, np.ndarray]:
    """All of it by name, for a file."""
    found = {field.name: getattr(self, field.name) for field in _fields()}
    acc = {f"{_ACC}{name}": value for name, value in self.acc.items()}
    return found | acc

  @classmethod
  def of(cls, arrays: Mapping[str, np.ndarray]) -> Self:
    """What `arrays` gave."""
    acc = {
      name.removeprefix(_ACC): value
      for name, value in arrays.items()
      if name.startswith(_ACC)
    }
    return cls(**{one.name: arrays[one.name] for one in _fields()}, acc=acc)


def _fields() -> list[dataclasses.Field]:
  return [one for one in dataclasses.fields(Seen) if one.name != "acc"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """One number of each item.

  Attributes:
    values: (n,).
    weights: (n,), None for all alike.
    is_log: whether the mean's exponential is asked for.
  """

  values: np.ndarray
  weights: np.ndarray | None = None
  is_log: bool = False

  def interval(self) -> intervals.Interval:
    """The mean over items, and its 95% interval."""
    many = len(self.values) > _RESAMPLES
    found = intervals.paired_mean(
      self.values, self.weights, *([_RESAMPLES] if many else [])
    )
    change = math.exp if self.is_log else float
    return intervals.Interval(*map(change, found))


def mean_of(samples: Sequence[Sample]) -> Sample:
  """One sample of several models on the same items: of each item the mean.

  Raises:
    InputError: their items are not the same.
  """
  if len({one.values.shape for one in samples}) > 1:
    raise InputError("the models cut the held-out text into other windows")
  values = np.mean([one.values for one in samples], axis=0)
  return dataclasses.replace(samples[0], values=values)


class Judge:
  """Looks at models by a plan.

  Args:
    tokenizer: of the models.
    plan: what to judge by.

  Raises:
    InputError: the held-out text is too short.
  """

  def __init__(self, tokenizer: Tokenizer, plan: Plan):
    self._tokenizer, self._plan = tokenizer, plan
    self._held_out = _rows(tokenizer, plan)
    self._questions: list[list[scoring.Row]] | None = None

  def look(self, model: quality.Model, drawn: np.ndarray | None) -> Seen:
    """Judges one model.

    Args:
      model: config and parameters.
      drawn: (R, T) tokens that the float model drew; None for that model, which
        draws them.
    """
    plan, rows = self._plan, len(self._held_out)
    scorer = scoring.Scorer(
      *model,
      self._tokenizer,
      max_length=plan.text.window,
      batch_tokens=plan.batch_tokens,
    )
    silent = lambda _: lambda _: None
    _, windows = judging.judge_text(scorer, plan.text, advance=silent)
    acc = self._answer(scorer)
    # The three blocks of rows: what distributions are compared along, the
    # held-out text, and what the model draws by itself.
    first = self._held_out if drawn is None else drawn
    blocks = [first, self._held_out, self._held_out]
    reading = quality.read(
      model,
      np.concatenate(blocks),
      free=np.repeat([drawn is None, False, True], rows),
      prompt=plan.prompt,
      seed=plan.seed,
      keep=plan.kept,
      rows=rows,
    )
    return Seen(
      nll=np.asarray(windows["nll"]),
      counts=np.asarray(windows["tokens"], np.float64),
      decoded=reading.nll[rows : 2 * rows].mean(axis=1, dtype=np.float64),
      drawn=reading.tokens[:rows],
      kept=reading.kept,
      own=reading.tokens[2 * rows :],
      acc=acc,
    )

  def compare(self, seen: Seen, first: Seen) -> dict[str, Sample]:
    """Samples by metric, of a model and of its distance from the float one."""
    per_token = Sample(
      values=seen.nll / seen.counts, weights=seen.counts, is_log=True
    )
    change = (seen.nll - first.nll) / seen.counts
    decoded = Sample(values=seen.decoded, is_log=True)
    found = {
      "perplexity": per_token,
      "ratio": dataclasses.replace(per_token, values=change),
      "decoding_perplexity": decoded,
      "decoding_ratio": dataclasses.replace(
        decoded, values=seen.decoded - first.decoded
      ),
    }
    kl = np.asarray(quality.divergence(first.kept, seen.kept))
    for token in self._plan.at:
      near = quality.near(self._plan.prompt + token - 1)
      near = [self._plan.kept.index(place) for place in near]
      found[f"kl_{token}"] = Sample(values=kl[near].mean(axis=0))
    found["repetition"] = Sample(values=quality.repetition(seen.own))
    for name, right in seen.acc.items():
      found[f"{name}_acc"] = Sample(values=right)
      found[f"{name}_change"] = Sample(values=right - first.acc[name])
    return found

  def _answer(self, scorer: scoring.Scorer) -> dict[str, np.ndarray]:
    """Whether each question is answered right, all tasks scored at once."""
    if not self._plan.tasks:
      return {}
    if self._questions is None:
      self._questions = [
        judging.encode_task(scorer, task) for task in self._plan.tasks
      ]
    rows = [row for some in self._questions for row in some]
    scores = iter(scorer.score(rows, most_sizes=_SIZES))
    found = {}
    for task, some in zip(self._plan.tasks, self._questions, strict=True):
      own = [next(scores) for _ in some]
      found[task.name] = np.asarray(judging.by_likelihood(task, own)["acc"])
    return found


def _rows(tokenizer: Tokenizer, plan: Plan) -> np.ndarray:
  """Rows (R, T) of the held-out text, spread evenly over it.

  As long as the drawn ones, so that one program does for both.
  """
  tokens = tokenizer.encode(plan.text.text)
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  size = max(plan.tokens + 1, plan.prompt + max(plan.at))
  body = size - len(begin)
  fit = len(tokens) // body
  if fit < plan.rows:
    raise InputError(
      f"the held-out text has {len(tokens):,} tokens, and {plan.rows} rows of"
      f" {plan.tokens:,} are decoded: give a longer one"
    )
  starts = [i * fit // plan.rows * body for i in range(plan.rows)]
  rows = [[*begin, *tokens[start : start + body]] for start in starts]
  return np.asarray(rows, np.int32)
