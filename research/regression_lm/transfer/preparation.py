"""Texts and numbers of a transfer comparison in tokens, before training."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from models.numbers import Normalized, TargetCodec
from models.regression_lm_config import RegressionLMConfig
from research.predictors import text_forms
from research.predictors.text_forms import Facts
from research.regression_lm.batched_training import Pairs, Pool
from research.regression_lm.expected import Grid
from research.regression_lm.likelihood import Model
from research.regression_lm.transfer.setup import Setup
from research.text import tokenizing


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Models and texts before training.

  Attributes:
    model: of all members.
    pool: texts of all forms, one form behind the other.
    first: form -> its first text in the pool.
    names: of tasks, in the pool's order.
    written: (numbers, T) ids of every number.
    grid: of expected values.
  """

  model: Model
  pool: Pool
  first: dict[str, int]
  names: list[str]
  written: np.ndarray
  grid: Grid


def prepare(setup: Setup, facts: Facts) -> Prepared:
  """Tokenizes all texts.

  The BPE is learned from the texts of all rows: they are the whole space, and
  no number is among them.
  """
  tasks = [*setup.sources, *setup.targets]
  used = list(dict.fromkeys(task.form for task in tasks))
  generator = np.random.default_rng(7)
  texts, first = [], {}
  for form in used:
    if form not in facts.forms:
      raise InputError(f"there is no form {form!r}, but {list(facts.forms)}")
    first[form] = len(texts)
    for fields in facts.forms[form]:
      texts.append(text_forms.views(fields, setup.views, generator))
  names = [f"{task.column.replace('_', ' ')} :" for task in tasks]
  plain = [several[0] for several in texts] + names * 100
  tokenizer = tokenizing.train_bpe(plain, setup.vocab_size)
  pool = Pool.read(tokenizer, texts, names, setup.max_length)
  codec = TargetCodec(format=Normalized(base=10, digits=setup.digits))
  config = RegressionLMConfig.named(
    "tiny",
    vocab_size=tokenizer.vocab_size,
    target_vocab_size=len(codec.tokens),
    target_length=codec.length,
    **setup.size,
  )
  count = 10**setup.digits
  ranks = np.arange(count) / count
  written = codec.encode([[rank] for rank in ranks])
  chosen = np.unique(np.linspace(0, count - 1, setup.grid).round().astype(int))
  grid = Grid(
    ids=jnp.asarray(written[chosen][None]),
    scores=jnp.asarray(_standard(ranks[chosen])[None]),
  )
  model = Model(config=config, codec=codec)
  return Prepared(model, pool, first, names, written, grid)


def _standard(ranks: np.ndarray) -> np.ndarray:
  """Ranks with mean 0 and spread 1, float32."""
  return ((ranks - 0.5) * np.sqrt(12)).astype(np.float32)


class Builder:
  """Gathers pairs of all members."""

  def __init__(self, prepared: Prepared):
    """Starts with none."""
    self._prepared, self._parts, self._count = prepared, [], 0

  def add(self, task: int, form: str, rows: np.ndarray, ranks: np.ndarray):
    """Adds the numbers of a task; the indices (len(rows),) of its pairs."""
    written = self._prepared.written
    place = np.minimum((ranks * len(written)).round(), len(written) - 1)
    self._parts.append(
      (
        rows + self._prepared.first[form],
        np.full(len(rows), task),
        written[place.astype(int)],
        _standard(ranks)[:, None],
      )
    )
    self._count += len(rows)
    return np.arange(self._count - len(rows), self._count)

  def pairs(self) -> Pairs:
    """All of them."""
    rows, tasks, targets, scores = map(np.concatenate, zip(*self._parts))
    ids = lambda x: jnp.asarray(x, jnp.int32)
    return Pairs(ids(rows), ids(tasks), ids(targets), jnp.asarray(scores))
