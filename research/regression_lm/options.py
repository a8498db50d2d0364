"""All options of a training run; scripts make a flag of every field."""

import dataclasses
from typing import Any

from models.errors import InputError
from models.numbers import P10, Ieee, Normalized, NumberFormat
from models.regression_lm_config import ENCODERS, SIZES
from research.core.options import SCHEDULES, option

NUMBERS = ("ieee", "p10", "normalized")
OPTIMIZERS = ("adamw", "muon")
EXPORTS = ("best", "last")
SCALES = ("value", "rank")
_SIZE_FIELDS = (
  "encoder",
  "encoder_layers",
  "decoder_layers",
  "d_model",
  "d_ff",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "embed_std",
)
# What comes with the weights of an encoder.
_OF_WEIGHTS = ("encoder", "encoder_layers", "tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
  """What is minimised.

  Attributes:
    z_loss: weight of the squared log normalizer (PaLM, section 5).
    expected_value: weight of the squared error of the expected value over a
      grid (RAFT, Lukasik et al. 2024, eq. 7).
    ranking: weight of the pairwise logistic loss of expected values (RankNet,
      Burges et al. 2005).
    dropout: share of what a layer adds that is dropped.
  """

  z_loss: float = 0.0
  expected_value: float = 0.0
  ranking: float = 0.0
  dropout: float = 0.0

  @property
  def needs_grid(self) -> bool:
    """Whether a grid of numbers is part of the loss."""
    return bool(self.expected_value or self.ranking)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of a run; every attribute is described by its metadata."""

  size: str = option("small", "named sizes", choices=tuple(SIZES))
  encoder: str = option("transformer", "of the text", choices=ENCODERS)
  encoder_layers: int | None = option(
    None, "blocks over the text; those of --size if not given", lower=1
  )
  decoder_layers: int | None = option(
    None, "blocks over the numbers", lower=1, upper=1024
  )
  d_model: int | None = option(None, "width", lower=8, upper=65536)
  d_ff: int | None = option(None, "width of the MLPs", lower=8)
  num_heads: int | None = option(None, "query heads", lower=1, upper=1024)
  num_kv_heads: int | None = option(
    None, "key and value heads", lower=1, upper=1024
  )
  head_dim: int | None = option(None, "size of a head", lower=2, upper=1024)

  embed_std: float | None = option(
    None,
    "standard deviation of random embeddings; 1 learns numbers sooner",
    lower=1e-6,
    upper=100.0,
  )
  tokenizer: str = option(
    "bytes",
    "of the text: bytes, bpe or sentencepiece (learned from the training"
    " texts), a hub id, or the path of a tokenizer.json or of a .model file",
  )
  vocab_size: int = option(
    4096, "of a tokenizer that is learned", lower=257, upper=1 << 20
  )
  max_length: int = option(
    2048, "tokens that a text is cut to", lower=1, upper=1 << 20
  )
  numbers: str = option("ieee", "how numbers are written", choices=NUMBERS)
  base: int = option(10, "of the digits, but for p10", lower=2, upper=1024)
  mantissa_digits: int = option(
    4, "significant digits of a number", lower=1, upper=50
  )
  exponent_digits: int = option(1, "of ieee", lower=1, upper=3)
  exponent_range: int = option(10, "of p10", lower=0, upper=300)
  special: bool = option(
    False, "also write NaN, infinities and INVALID (failed measurements)"
  )

  steps: int = option(1000, "updates", lower=1, upper=10**8)
  batch: int = option(
    64, "examples of an update, over all devices", lower=1, upper=1 << 20
  )
  optimizer: str = option("adamw", "of the weights", choices=OPTIMIZERS)
  learning_rate: float = option(1e-3, "peak", lower=0.0, upper=10.0)
  schedule: str = option("cosine", "of the rate", choices=SCHEDULES)
  warmup: int = option(100, "updates of linear warmup", lower=0, upper=10**7)
  final_share: float = option(
    0.05, "of the peak at the end", lower=0.0, upper=1.0
  )
  decay_share: float = option(
    0.2, "of the updates in which wsd falls", lower=0.0, upper=1.0
  )
  weight_decay: float = option(0.01, "of matrices", lower=0.0, upper=10.0)
  clip_norm: float = option(
    1.0, "of the gradient; 0 leaves it", lower=0.0, upper=1e6
  )
  dropout: float = option(
    0.0, "share of what a layer adds that is dropped", lower=0.0, upper=0.9
  )
  z_loss: float = option(
    0.0, "weight of the squared log normalizer", lower=0.0, upper=1.0
  )
  expected_value: float = option(
    0.0, "weight of the expected-value loss (RAFT)", lower=0.0, upper=1e4
  )
  ranking: float = option(
    0.0, "weight of the pairwise ranking loss", lower=0.0, upper=1e4
  )
  scale: str = option(
    "rank", "of the expected value and the ranking", choices=SCALES
  )
  grid: int = option(
    32, "numbers that an expected value is over", lower=2, upper=4096
  )
  dtype: str = option(
    "float32",
    "of activations; weights and sums are float32",
    choices=("float32", "bfloat16"),
  )
  remat: bool = option(
    False, "compute every layer again in the backward pass, to save memory"
  )
  eval_every: int = option(100, "updates", lower=1, upper=10**8)
  early_stopping: int = option(
    0,
    "evaluations without a better validation loss before the end; 0 for none",
    lower=0,
    upper=10**6,
  )
  freeze_encoder: bool = option(
    False, "leave the encoder as it is, and train the decoder alone"
  )
  export: str = option(
    "best",
    "which weights become the model: of the best validation loss, or the last",
    choices=EXPORTS,
  )
  seed: int = option(0, "of everything", lower=0, upper=2**31 - 1)

  def __post_init__(self):
    """Checks options against each other.

    Raises:
      InputError: they do not fit.
    """
    self.number_format()

  def number_format(self) -> NumberFormat:
    """How numbers are written.

    Raises:
      InputError: its sizes do not do.
    """
    if self.numbers == "p10":
      return P10(
        digits=self.mantissa_digits,
        exponent_range=self.exponent_range,
        special=self.special,
      )
    if self.numbers == "normalized":
      return Normalized(
        base=self.base, digits=self.mantissa_digits, special=self.special
      )
    if self.numbers != "ieee":
      raise InputError(f"--numbers={self.numbers!r}: take one of {NUMBERS}")
    return Ieee(
      base=self.base,
      exponent_digits=self.exponent_digits,
      mantissa_digits=self.mantissa_digits,
      special=self.special,
    )

  def sizes(self) -> dict[str, Any]:
    """The sizes that differ from those of `size`."""
    return {
      name: getattr(self, name)
      for name in _SIZE_FIELDS
      if getattr(self, name) is not None
    }

  def decoder_sizes(self) -> dict[str, Any]:
    """Those for an encoder that comes with its weights and its tokenizer.

    Raises:
      InputError: another encoder or tokenizer was asked for.
    """
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in _OF_WEIGHTS and value != field.default:
        raise InputError(
          f"--{field.name}={value}: --encoder_weights bring their own: leave "
          "it out"
        )
    return {k: v for k, v in self.sizes().items() if k not in _OF_WEIGHTS}

  def loss(self) -> LossOptions:
    """What is minimised."""
    return LossOptions(
      z_loss=self.z_loss,
      expected_value=self.expected_value,
      ranking=self.ranking,
      dropout=self.dropout,
    )
