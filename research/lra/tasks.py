"""The tasks of Long Range Arena, by name.

Without JAX, so that flags are checked at once.
"""

import dataclasses
import pathlib

from models.errors import InputError

# Ids of bytes and pixels lie below; this one stands where others are hidden.
BYTE_MASK = 256
LISTOPS_MASK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One task.

  Attributes:
    name: of the task.
    classes: that sequences belong to.
    mask_token: id that hides another in self-pretraining, the last of all.
    length: tokens of a sequence at most, as the benchmark has it.
    pairs: sequences come in pairs.
    side: of an image in pixels, or None for text.
    advice: where the data is to be had; None where it is generated.
  """

  name: str
  classes: int
  mask_token: int
  length: int
  pairs: bool = False
  side: int | None = None
  advice: str | None = None

  @property
  def vocab_size(self) -> int:
    """Tokens, the mask included."""
    return self.mask_token + 1

  def check(self, path: str | None) -> None:
    """Raises InputError where the data must be given and is not there."""
    advice = f": {self.advice}" if self.advice else ""
    if path is None and self.advice:
      raise InputError(f"--task={self.name} has no data of its own{advice}")
    if path is not None and not pathlib.Path(path).expanduser().exists():
      raise InputError(f"--data={path}: no such folder{advice}")

  def check_length(self, length: int) -> None:
    """Raises InputError where a sequence would be a part of an image."""
    pixels = (self.side or 0) ** 2
    if length < pixels:
      raise InputError(
        f"--length={length} cuts images of {pixels} pixels: give {pixels}"
      )


TASKS = {
  task.name: task
  for task in (
    Task(name="listops", classes=10, mask_token=LISTOPS_MASK, length=2048),
    Task(
      name="text",
      classes=2,
      mask_token=BYTE_MASK,
      length=4096,
      advice=(
        "give --data=FOLDER with aclImdb/ of "
        "https://ai.stanford.edu/~amaas/data/sentiment, or a .jsonl of split, "
        "label and text"
      ),
    ),
    Task(
      name="retrieval",
      classes=2,
      mask_token=BYTE_MASK,
      length=4096,
      pairs=True,
      advice=(
        "give --data=FOLDER with new_aan_pairs.{train,eval,test}.tsv of "
        "https://github.com/google-research/long-range-arena (lra_release)"
      ),
    ),
    Task(
      name="image",
      classes=10,
      mask_token=BYTE_MASK,
      length=1024,
      side=32,
      advice=(
        "give --data=FOLDER with cifar-10-batches-bin/ of "
        "https://www.cs.toronto.edu/~kriz/cifar.html, or "
        "cifar10_gray_{train,test}_{x,y}.npy"
      ),
    ),
    Task(
      name="pathfinder32",
      classes=2,
      mask_token=BYTE_MASK,
      length=1024,
      side=32,
    ),
  )
}
