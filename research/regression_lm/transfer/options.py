"""Settings of the models of `transfer`, and the setup that they make."""

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

from models.errors import InputError
from research.predictors.text_forms import Facts
from research.regression_lm.batched_training import Updates
from research.regression_lm.learn import LossOptions
from research.regression_lm.transfer.setup import Setup, Task


def _option(default: Any, text: str, **bounds: Any) -> Any:
  """A field that a script turns into a flag."""
  return dataclasses.field(
    default=default, metadata={"text": text, "bounds": bounds}
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What may be chosen; every attribute is described by its metadata."""

  encoder_layers: int = _option(2, "blocks over the text", lower=1)
  d_model: int = _option(64, "width, of heads of 16", lower=16, upper=4096)
  vocab_size: int = _option(512, "of the BPE", lower=257)
  max_length: int = _option(128, "tokens of a text", lower=1)
  digits: int = _option(2, "decimal digits of a rank", lower=1, upper=4)
  grid: int = _option(33, "numbers of expected values", lower=2, upper=1000)
  ensemble: int = _option(8, "models, their chances averaged", lower=1)
  views: int = _option(8, "orders of the fields in training", lower=1)
  test_views: int = _option(4, "orders that are averaged", lower=1)
  steps_root: float = _option(
    30.0, "updates for N examples are this times the root of N", lower=0.1
  )
  batch: int = _option(32, "examples of an update", lower=1)
  learning_rate: float = _option(3e-3, "peak", lower=0.0)
  weight_decay: float = _option(0.05, "of matrices", lower=0.0)
  dropout: float = _option(
    0.1, "share of what a layer adds that is dropped", lower=0.0, upper=0.9
  )
  expected_value: float = _option(1.0, "weight of RAFT", lower=0.0)
  ranking: float = _option(1.0, "weight of the ranking loss", lower=0.0)
  pretrain_steps: int = _option(2000, "updates on the sources", lower=1)
  pretrain_batch: int = _option(256, "examples of one", lower=1)
  pretrain_rate: float = _option(2e-3, "peak", lower=0.0)

  def __post_init__(self):
    """Checks the width; raises InputError."""
    if self.d_model % 16:
      raise InputError(f"d_model={self.d_model} is no multiple of 16")
    if self.test_views > self.views:
      raise InputError(
        f"test_views={self.test_views} are more than views={self.views}"
      )


def setup(settings: Settings, *, sizes: Sequence[int], **rest: Any) -> Setup:
  """The comparison that settings and data make.

  Args:
    settings: of the models.
    sizes: numbers of examples.
    **rest: fields of `Setup` that say which rows and tasks.
  """
  s = settings
  heads = s.d_model // 16
  loss = LossOptions(
    expected_value=s.expected_value, ranking=s.ranking, dropout=s.dropout
  )
  # The batch stays as it is where examples are fewer, so that one program
  # serves all sizes: they come again in other views.
  training = {
    size: Updates(
      steps=math.ceil(s.steps_root * math.sqrt(size)),
      batch=s.batch,
      learning_rate=s.learning_rate,
      weight_decay=s.weight_decay,
      loss=loss,
    )
    for size in sizes
  }
  return Setup(
    sizes=sizes,
    ensemble=s.ensemble,
    views=s.views,
    test_views=s.test_views,
    size={
      "encoder_layers": s.encoder_layers,
      "d_model": s.d_model,
      "d_ff": 2 * s.d_model,
      "num_heads": heads,
      "num_kv_heads": heads,
      "head_dim": 16,
    },
    vocab_size=s.vocab_size,
    max_length=s.max_length,
    digits=s.digits,
    grid=s.grid,
    pretraining=Updates(
      steps=s.pretrain_steps,
      batch=s.pretrain_batch,
      learning_rate=s.pretrain_rate,
      warmup=100,
      weight_decay=0.01,
    ),
    training=training,
    **rest,
  )


def tasks(
  facts: Facts, names: Sequence[str], leave_out: Sequence[str] = ()
) -> list[Task]:
  """Tasks by "column" or "column:form"; "lat_*" stands for many columns.

  Without a form it is the set's first.

  Raises:
    InputError: there is no such column or form.
  """
  hidden = {name.partition(":")[0] for name in leave_out}
  found = []
  for name in names:
    column, _, form = name.partition(":")
    form = form or next(iter(facts.forms))
    if form not in facts.forms:
      raise InputError(f"there is no form {form!r}, but {list(facts.forms)}")
    columns = [column]
    if "*" in column:
      columns = fnmatch.filter(facts.columns, column) or [column]
    for column in columns:
      facts.column(column)
      if column not in hidden:
        found.append(Task(column=column, form=form))
  return found
