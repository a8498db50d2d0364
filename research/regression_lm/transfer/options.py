"""Settings of the models of `transfer`."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from models import input_files
from models.errors import InputError
from research.core.options import from_json, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What may be chosen; every attribute is described by its metadata."""

  encoder_layers: int = option(2, "blocks over the text", lower=1)
  d_model: int = option(64, "width, of heads of 16", lower=16, upper=4096)
  vocab_size: int = option(512, "of the BPE", lower=257)
  max_length: int = option(128, "tokens of a text", lower=1)
  digits: int = option(2, "decimal digits of a rank", lower=1, upper=4)
  grid: int = option(33, "numbers of expected values", lower=2, upper=1000)
  ensemble: int = option(8, "models, their chances averaged", lower=1)
  views: int = option(8, "orders of the fields in training", lower=1)
  test_views: int = option(4, "orders that are averaged", lower=1)
  steps_root: float = option(
    30.0, "updates for N examples are this times the root of N", lower=0.1
  )
  batch: int = option(32, "examples of an update", lower=1)
  learning_rate: float = option(3e-3, "peak", lower=0.0)
  weight_decay: float = option(0.05, "of matrices", lower=0.0)
  dropout: float = option(
    0.1, "share of what a layer adds that is dropped", lower=0.0, upper=0.9
  )
  expected_value: float = option(1.0, "weight of RAFT", lower=0.0)
  ranking: float = option(1.0, "weight of the ranking loss", lower=0.0)
  folds: int = option(
    5, "of the examples, that calibrate intervals; 0 for none", lower=0
  )
  pretrain_steps: int = option(2000, "updates on the sources", lower=1)
  pretrain_batch: int = option(256, "examples of one", lower=1)
  pretrain_rate: float = option(2e-3, "peak", lower=0.0)

  def __post_init__(self):
    """Checks width, views and folds; raises InputError."""
    if self.d_model % 16:
      raise InputError(f"d_model={self.d_model} is no multiple of 16")
    if self.folds == 1:
      raise InputError("folds=1: one fold leaves no examples: take 0, or more")
    if self.test_views > self.views:
      raise InputError(
        f"test_views={self.test_views} are more than views={self.views}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
  """Settings that a comparison tried, and how good they were.

  Attributes:
    score: mean of a measure over the targets.
    settings: of the models.
    targets: columns that were predicted.
  """

  score: float
  settings: Settings
  targets: list[str]

  @classmethod
  def of_result(cls, path: str | pathlib.Path) -> Self:
    """Reads a result file of `transfer_rlm.py`.

    Raises:
      InputError: it is none.
    """
    advice = "name a result of transfer_rlm.py with --settings_from"
    result = input_files.read_json(path, advice=advice)
    with input_files.errors_at(path, advice, "is no such result"):
      return cls(
        score=float(result["score"]),
        settings=from_json(Settings, result["settings"]),
        targets=sorted({row["target"] for row in result["rows"]}),
      )


def best_of(
  paths: Sequence[str],
  targets: Sequence[str],
  measure: str,
  given: Mapping[str, Any],
) -> tuple[Settings, dict[str, Any]]:
  """The settings of the best result, and how they were chosen.

  Args:
    paths: of results.
    targets: columns to predict, as flags name them; none may have a say.
    measure: that the scores are of, for the second value.
    given: settings by name that stand in for those of the result.

  Raises:
    InputError: a file is no result, or is of a target.
  """
  found = {}
  for path in paths:
    tried = Tried.of_result(path)
    if set(tried.targets) & {name.partition(":")[0] for name in targets}:
      raise InputError(f"{path}: is of the target, which must have no say")
    found[pathlib.Path(path).name] = tried
  best = max(found, key=lambda name: found[name].score)
  how = {
    name: {
      "score": tried.score,
      "targets": tried.targets,
      **dataclasses.asdict(tried.settings),
    }
    for name, tried in found.items()
  }
  return dataclasses.replace(found[best].settings, **given), {
    "how": f"best mean {measure} on other targets",
    "best": best,
    "tried": how,
  }
