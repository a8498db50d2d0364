"""What a cross-validation over KernelBench trains and judges."""

import dataclasses
from collections.abc import Sequence

from research.regression_lm.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is trained and judged.

  Attributes:
    options: of every model and its training.
    runs: whose timings are judged; all are learned from.
    folds: parts of the problems, each held out once.
    members: models of each fold, whose answers are pooled.
    renamings: forms of a program with other names, beside its own.
    made_up: programs of a second task (`made_up_programs`), which half of every
      batch is of; 0 for none.
    peers: judge the peers too.
    limit: problems at most, for a trial; 0 takes all.
  """

  options: Options
  runs: Sequence[str]
  folds: int = 5
  members: int = 2
  renamings: int = 3
  made_up: int = 0
  peers: bool = True
  limit: int = 0
