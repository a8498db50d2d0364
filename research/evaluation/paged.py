"""What a model loses that reads some pages of its cache alone.

A context is read whole, as prompts are, and what follows it is read one token
at a time by the very steps that decode, every one of which chooses pages anew.
The next token is scored behind each, so nothing that is scored was predicted
by a dense step. Rows are the same for all choices, hence differences are
paired.

Shapes by axis letter: B rows of a batch, C tokens of the context, M scored
tokens, L layers, P pages, N key heads, K head dimension.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import errors, language_model
from models.caches.paged import PageBudget
from models.errors import InputError
from models.tokenizer import Tokenizer
from ops.ceil_share import ceil_share
from ops.paged_sparse_attention import KINDS, PageSummary
from research.core import intervals
from research.evaluation.estimates import estimate

# The first page and the latest ones, whatever the query: what a choice by
# scores has to be better than.
LATEST = "latest"
CHOICES = (*KINDS, LATEST)

_NEEDLE = "\nThe secret number is {}. Remember it.\n"
_QUESTION = "\nWhat is the secret number? The secret number is"
_DIGITS = 5
# Tokens that one call reads. Rows of other lengths take more calls, and no
# other program.
_STEPS = 16
# Caches have a multiple of so many slots.
_SLOTS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """Texts that are read alike: a context, then token by token.

  Attributes:
    tokens: (R, C + 1 + M) int32; the last M are predicted by paged steps.
    context: C, tokens that are read whole.
    scored: (R, M) bool, of which predictions something is said.
  """

  tokens: np.ndarray
  context: int
  scored: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """How much of a cache a token reads, and how pages are chosen.

  Attributes:
    keep: share of the pages, in (0, 1]; 1 is the dense step, without pages.
    choice: of `CHOICES`.
    page_size: slots of a page.
  """

  keep: float
  choice: str = KINDS[0]
  page_size: int = 16

  def __post_init__(self):
    """Raises InputError where a field is out of range."""
    if self.choice not in CHOICES:
      raise InputError(
        f"choice={self.choice}: give one of {', '.join(CHOICES)}"
      )
    _ = self.budget

  @property
  def budget(self) -> PageBudget:
    """Of `language_model.with_pages`."""
    # The latest pages get scores of their own, written as moments.
    kind = "moments" if self.choice == LATEST else self.choice
    return PageBudget(keep=self.keep, page_size=self.page_size, kind=kind)

  def shares(self, context: int, steps: int) -> tuple[float, float]:
    """Pages, and bytes of the cache, that a step reads in the mean.

    As shares of what a dense step reads of it. The summaries of all pages,
    two numbers of every channel of a page's keys, are charged to the bytes, but
    not to the latest pages, which are found without. Not charged is that the
    summary of the last page, which is read anyway, is written.

    Args:
      context: C.
      steps: that follow it, M.
    """
    if self.keep == 1:
      return 1.0, 1.0
    filled = (context + np.arange(steps)) // self.page_size + 1
    kept = np.maximum(np.asarray(ceil_share(self.keep, filled)), 2)
    share = float(np.mean(np.minimum(kept / filled, 1)))
    summaries = 0 if self.choice == LATEST else 1 / self.page_size
    return share, share + summaries


def windows(
  tokens: np.ndarray,
  *,
  context: int,
  scored: int,
  count: int,
  begin: int | None,
) -> Rows:
  """Separate windows at even distances over a text.

  Args:
    tokens: (n,) int32, of the text.
    context: C, with the begin token.
    scored: M, predictions a window.
    count: windows.
    begin: stands before every window, or None.

  Raises:
    InputError: the text is too short.
  """
  head = np.asarray([] if begin is None else [begin], np.int32)
  size = context + 1 + scored - len(head)
  most = len(tokens) // size
  if most < count:
    raise InputError(
      f"the text has {len(tokens)} tokens, {most} windows of {size}, not "
      f"{count}: give a longer one, or fewer --windows"
    )
  starts = np.arange(count) * (len(tokens) - size) // max(count - 1, 1)
  rows = [np.concatenate([head, tokens[at : at + size]]) for at in starts]
  shape = count, scored
  return Rows(
    tokens=np.stack(rows).astype(np.int32),
    context=context,
    scored=np.ones(shape, bool),
  )


def needles(
  tokens: np.ndarray, tokenizer: Tokenizer, *, context: int, count: int
) -> Rows:
  """Numbers that stand somewhere in a text, and are asked for behind it.

  The context is a piece of the text with one sentence in it that says a number
  of five digits, at even depths; behind it the number is asked for, and its
  digits alone are scored. The question is read with pages, too.

  Args:
    tokens: (n,) int32, of the text.
    tokenizer: of the model.
    context: C.
    count: numbers.

  Raises:
    InputError: the context is too short.
  """
  generator = np.random.default_rng(0)
  question, begin = tokenizer.encode(_QUESTION), tokenizer.bos_id
  head = np.asarray([] if begin is None else [begin], np.int32)
  rows, answers = [], []
  for index in range(count):
    low = 10 ** (_DIGITS - 1)
    number = int(generator.integers(low, 10 * low))
    needle = tokenizer.encode(_NEEDLE.format(number))
    room = context - len(needle) - len(head)
    if room < 1 or len(tokens) < room:
      raise InputError(f"--context={context}: no text is left around a number")
    start = index * (len(tokens) - room) // max(count - 1, 1)
    text, depth = (
      tokens[start : start + room],
      room * index // max(count - 1, 1),
    )
    both = tokenizer.encode(f"{_QUESTION} {number}")
    answers.append(len(both) - len(question))
    rows.append(
      np.concatenate([head, text[:depth], needle, text[depth:], both])
    )
  longest = max(map(len, rows))
  padded = np.zeros((count, longest), np.int32)
  scored = np.zeros((count, longest - context - 1), bool)
  for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
    padded[index, : len(row)] = row
    end = len(row) - context - 1
    scored[index, end - answer : end] = True
  return Rows(tokens=padded, context=context, scored=scored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """What a model says of rows, under one way to read its cache.

  Attributes:
    nll: (R,) nats, summed over a row's scored tokens.
    found: (R,) bool, whether every scored token was the likeliest.
  """

  nll: np.ndarray
  found: np.ndarray


def score(
  config: language_model.Config,
  params: language_model.Params,
  rows: Rows,
  readings: Sequence[Reading],
  *,
  batch: int,
  advance: Callable[[int], None] = lambda done: None,
) -> list[Scores]:
  """Scores rows under several ways to read the cache of one context.

  Args:
    config: of the model, a Transformer that `with_pages` takes.
    params: of the model.
    rows: to score.
    readings: ways to read.
    batch: rows that are read together.
    advance: told how many more rows are done.

  Returns:
    One a reading.

  Raises:
    InputError: the model has no pages, or its logits are not finite.
  """
  nll = np.zeros((len(readings), len(rows.tokens)))
  found = np.zeros(nll.shape, bool)
  start = rows.context
  more = -rows.scored.shape[1] % _STEPS
  after = np.pad(rows.tokens[:, start:], ((0, 0), (0, more)))
  scored = np.pad(rows.scored, ((0, 0), (0, more)))
  slots = -(-(start + after.shape[1]) // _SLOTS) * _SLOTS
  for first in range(0, len(rows.tokens), batch):
    part = np.arange(first, min(first + batch, len(rows.tokens)))
    # The last batch is filled up, so that nothing is compiled twice.
    filled = np.pad(part, (0, batch - len(part)), mode="edge")
    before = _begin(config, params, rows.tokens[filled, :start], slots)
    for index, reading in enumerate(readings):
      logprobs, best = _follow(config, params, before, after[filled], reading)
      logprobs, best = logprobs[: len(part)], best[: len(part)]
      if not np.isfinite(logprobs[scored[part]]).all():
        raise errors.not_finite()
      nll[index, part] = -np.sum(logprobs, -1, np.float64, where=scored[part])
      found[index, part] = np.all(best | ~scored[part], -1)
    advance(len(part))
  return [Scores(nll=a, found=b) for a, b in zip(nll, found, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _begin(config, params, tokens, slots):
  """The state behind tokens (B, C)."""
  lengths = jnp.full((len(tokens),), tokens.shape[1], jnp.int32)
  return language_model.prefill(
    config, params, tokens, lengths, cache_size=slots
  )[1]


def _follow(config, params, state, tokens, reading):
  """Log-probabilities (B, M) of tokens (B, M + 1) but the first one.

  Returns:
    Them, and whether each is the likeliest.
  """
  if reading.keep < 1:
    state = _paged(config, state, reading.budget)
  is_latest = reading.keep < 1 and reading.choice == LATEST
  found = []
  for at in range(0, tokens.shape[1] - 1, _STEPS):
    now = tokens[:, at : at + _STEPS + 1]
    state, *both = _some(config, params, state, now, is_latest)
    found.append(jax.device_get(both))
  return tuple(np.concatenate(one, axis=-1) for one in zip(*found))


_paged = jax.jit(language_model.with_pages, static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _some(config, params, state, tokens, is_latest):
  """`_follow` of a few tokens, and the state behind them."""

  def step(state, now):
    token, target = now
    state = with_latest(state) if is_latest else state
    logits, state = language_model.decode(config, params, token[:, None], state)
    logits = logits[:, 0]
    taken = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    logprobs = taken - jax.nn.logsumexp(logits, axis=-1)
    return state, (logprobs, jnp.argmax(logits, axis=-1) == target)

  each = tokens[:, :-1].T, tokens[:, 1:].T
  state, (logprobs, best) = jax.lax.scan(step, state, each)
  return state, logprobs.T, best.T


def with_latest(state: language_model.State) -> language_model.State:
  """The state with summaries by which later pages have higher scores.

  A mean of zero and a deviation that rises with the page give a query the
  score page * sum |q|.

  Args:
    state: of a `PagedCache` with moments.
  """
  cache = state.cache
  first = cache.summary.first
  page = jnp.arange(first.shape[2], dtype=first.dtype)
  second = jnp.broadcast_to(page[None, None, :, None, None], first.shape)
  summary = PageSummary(jnp.zeros_like(first), second, "moments")
  return dataclasses.replace(
    state, cache=dataclasses.replace(cache, summary=summary)
  )


def result_rows(
  task: str,
  rows: Rows,
  readings: Sequence[Reading],
  scores: Sequence[Scores],
) -> list[dict[str, Any]]:
  """Rows of a result file, each reading beside the first one.

  Moments stand beside bounds of the same share, too, where both were read.

  Args:
    task: "perplexity", or "needles".
    rows: that were scored.
    readings: of which the first one reads all pages.
    scores: of the readings.
  """
  counts, steps = rows.scored.sum(1), rows.scored.shape[1]
  made = []
  beside = {
    reading.keep: score.nll
    for reading, score in zip(readings, scores, strict=True)
    if reading.choice == "bounds"
  }
  for reading, score in zip(readings, scores, strict=True):
    if task == "needles":
      found = estimate("found", score.found)
    else:
      found = estimate("perplexity", score.nll, counts, math.exp, lambda x: x)
    difference = intervals.ratio(score.nll - scores[0].nll, counts)
    pages, size = reading.shares(rows.context, steps)
    dense = reading.keep == 1
    made.append(
      {
        "task": task,
        "method": "all pages" if dense else reading.choice,
        "budget": reading.keep,
        **dataclasses.asdict(found),
        "nats_more": difference.value,
        "nats_more_low": difference.low,
        "nats_more_high": difference.high,
        "context": rows.context,
        "scored_tokens": int(counts.sum()),
        "page_size": reading.page_size,
        "pages_read": pages,
        "cache_bytes": size,
      }
    )
    if reading.choice == "moments" and reading.keep in beside:
      over = intervals.ratio(score.nll - beside[reading.keep], counts)
      ends = {"minus_bounds_low": over.low, "minus_bounds_high": over.high}
      made[-1] |= {"minus_bounds": over.value} | ends
  return made
