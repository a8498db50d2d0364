"""Options as frozen dataclasses, of which scripts make flags."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

SCHEDULES = ("cosine", "wsd", "constant")


def option(default: Any, text: str, **bounds: Any) -> Any:
  """A field that `experiments/option_flags.py` turns into a flag.

  Args:
    default: of the field and the flag.
    text: what --help says.
    **bounds: "lower" and "upper" of a number, or "choices" of a word.
  """
  return dataclasses.field(
    default=default, metadata={"text": text, "bounds": bounds}
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
  """How `loop.run` carries a run out.

  Attributes:
    workdir: folder of the run; made if absent.
    flags: what decides the numbers, as JSON values. A workdir takes no other
      flags afterwards.
    checkpoint_every: updates between checkpoints; the last is always saved.
    log_every: updates between lines of metrics.
    keep: checkpoints kept.
    progress: show progress on stderr.
    shown: names of the metrics that it shows.
  """

  workdir: pathlib.Path
  flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  checkpoint_every: int = 500
  log_every: int = 10
  keep: int = 3
  progress: bool = True
  shown: tuple[str, ...] = ("loss",)
