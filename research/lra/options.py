"""All options of a training run on Long Range Arena; no JAX here.

Scripts make a flag of every field. What is None comes from the task's and the
model's own sizes (`architectures.py`).
"""

import dataclasses
from typing import Any

from models.errors import InputError
from research.core.options import option
from research.lra.tasks import TASKS

MODELS = (
  "fabnet",
  "fnet",
  "transformer",
  "mamba2",
  "monarch",
  "low_rank",
  "block_diagonal",
)
DTYPES = ("float32", "bfloat16")
LEVELS = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of a run; every attribute is described by its metadata."""

  task: str = option("listops", "what is learned", choices=tuple(TASKS))
  model: str = option(
    "fabnet",
    "kind of model; monarch, low_rank and block_diagonal are FABNet with such "
    "FFNs of as many parameters",
    choices=MODELS,
  )
  length: int | None = option(
    None, "tokens of a sequence at most; the task's if not given", lower=16
  )
  examples: int | None = option(
    None, "training sequences used; all if not given", lower=16
  )
  level: str = option(
    "hard", "of generated pathfinder32: 6, 9 or 14 dashes", choices=LEVELS
  )
  data_seed: int = option(0, "of generated data", lower=0)

  d_model: int | None = option(None, "width", lower=2, upper=1 << 14)
  d_ff: int | None = option(None, "width of FFNs", lower=2, upper=1 << 16)
  layers: int | None = option(None, "blocks", lower=1, upper=256)
  attention_layers: int | None = option(
    None, "blocks of them that attend, such as FABNet's ABfly", lower=0
  )
  heads: int | None = option(None, "heads of attention", lower=1, upper=1024)
  blocks: int | None = option(
    None, "of block_diagonal and monarch matrices", lower=1
  )
  rank: int | None = option(None, "of low_rank matrices", lower=1)
  tied_butterflies: bool = option(
    False, "groups of a butterfly's stage share their matrices"
  )
  positions: str = option(
    "learned",
    "of tokens; rotary ones are seen by attention alone",
    choices=("learned", "rotary", "none"),
  )
  pool: str = option("mean", "what is classified", choices=("mean", "cls"))
  mask_padding: bool = option(
    True, "padding mixes with nothing; the released code lets it"
  )
  fourier_norm: bool = option(
    True, "Fourier transforms are divided by the root of their size"
  )
  released: bool = option(
    False,
    "as the released code: attention first and dense, padding mixed in, "
    "transforms as they are",
  )

  steps: int = option(
    5000, "updates, those of --pretrain_share included", lower=1
  )
  batch: int = option(32, "sequences of an update", lower=1)
  warmup: int = option(500, "updates of linear warm-up", lower=0)
  weight_decay: float = option(0.0, "of matrices", lower=0.0, upper=10.0)
  clip_norm: float = option(
    1.0, "norm of a gradient at most; 0 leaves it", lower=0.0
  )
  dropout: float = option(0.1, "share dropped", lower=0.0, upper=0.9)
  eval_every: int = option(
    500, "updates between evaluations on validation data", lower=1
  )
  augment: bool = option(
    False, "images are mirrored, shifted, and those of dashes turned"
  )
  pretrain_share: float = option(
    0.0,
    "share of all updates that restore hidden tokens of the training inputs "
    "first (self-pretraining)",
    lower=0.0,
    upper=0.95,
  )
  mask_rate: float = option(
    0.3, "share of tokens hidden in self-pretraining", lower=0.01, upper=0.95
  )
  dtype: str = option("float32", "of the work of blocks", choices=DTYPES)

  def __post_init__(self):
    """Checks what concerns several fields; raises InputError."""
    if self.augment and TASKS[self.task].side is None:
      raise InputError(
        f"--augment is for images, and --task={self.task} has none: leave it "
        "out"
      )
    if self.pretrain_share and self.pool == "cls":
      raise InputError(
        "--pretrain_share restores a token from the state in its place, which "
        "--pool=cls shifts: take --pool=mean"
      )
    if self.pretrain_steps >= self.steps:
      raise InputError(
        f"--pretrain_share={self.pretrain_share} of --steps={self.steps} "
        "leaves no update to learn the classes: give more steps"
      )
    if self.attention_layers and self.model not in ("fabnet", "fnet"):
      raise InputError(
        f"--attention_layers is for fabnet and fnet: --model={self.model} has "
        "blocks of one kind"
      )

  def to_json(self) -> dict[str, Any]:
    """The options as JSON values."""
    return dataclasses.asdict(self)

  @property
  def sequence_length(self) -> int:
    """Tokens of a sequence at most."""
    return self.length or TASKS[self.task].length

  @property
  def pretrain_steps(self) -> int:
    """Updates of self-pretraining, of `steps` in all."""
    return round(self.pretrain_share * self.steps)
