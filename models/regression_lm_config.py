"""The config of regression language models, with named sizes."""

import dataclasses
from typing import Any, Self

from models import config_checks
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.t5gemma_config import T5GemmaConfig
from models.transformer_config import TransformerConfig

ENCODERS = ("transformer", "mamba2", "favor", "linear")
T5GEMMA = "t5gemma"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionLMConfig:
  """Shape of an encoder of text and a decoder of numbers.

  Attributes:
    vocab_size: tokens of the text.
    target_vocab_size: V, tokens of the targets, control tokens included.
    target_length: T, tokens of a row of targets.
    encoder: "transformer"; "mamba2", in both directions; "favor", linear
      attention by random features (FAVOR+), or "linear", by elu + 1;
      "t5gemma", which is that of `t5gemma`.
    t5gemma: shape of that encoder, whose width may differ from D; else None.
    d_model: D.
    d_ff: width of the gated MLPs.
    num_heads: H query heads.
    num_kv_heads: N key/value heads; divides H.
    head_dim: K.
    encoder_layers: blocks over the text.
    decoder_layers: blocks over the targets.
    rope_theta: base of the rotary frequencies.
    norm_eps: of every RMSNorm.
    num_features: M, random features a head of "favor".
    d_state: of "mamba2".
    mamba_head_dim: channels a head of "mamba2"; divides 2 D.
    embed_std: standard deviation of random embeddings. Small ones drown at
      first in what the layers add.
  """

  vocab_size: int
  target_vocab_size: int
  target_length: int
  encoder: str = "transformer"
  t5gemma: T5GemmaConfig | None = None
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  encoder_layers: int
  decoder_layers: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-6
  num_features: int = 128
  d_state: int = 64
  mamba_head_dim: int = 64
  embed_std: float = 0.02

  def __post_init__(self):
    """Checks the sizes; raises InputError."""
    if (self.encoder == T5GEMMA) != (self.t5gemma is not None):
      raise InputError(
        f"encoder={self.encoder!r}: {T5GEMMA!r} comes with the weights of an "
        "encoder, and with nothing else: give their folder"
      )
    if self.encoder not in (*ENCODERS, T5GEMMA):
      raise InputError(
        f"encoder={self.encoder!r} is unknown: take one of {list(ENCODERS)}"
      )
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int:
        config_checks.sizes(self, [field.name])
      if field.type is float:
        config_checks.positive(field.name, value)
    config_checks.heads(self)
    if self.encoder == "mamba2" and 2 * self.d_model % self.mamba_head_dim:
      raise InputError(
        f"mamba_head_dim={self.mamba_head_dim} does not divide "
        f"2 * d_model={2 * self.d_model}"
      )

    if self.t5gemma is not None:
      for name, value in self._of_t5gemma(self.t5gemma).items():
        if getattr(self, name) != value:
          raise InputError(
            f"{name}={getattr(self, name)!r}, the encoder's is {value}: leave "
            "it out"
          )

  @staticmethod
  def _of_t5gemma(encoder: T5GemmaConfig) -> dict[str, int]:
    """What an encoder settles."""
    return {
      "vocab_size": encoder.vocab_size,
      "encoder_layers": encoder.num_layers,
    }

  @property
  def text_width(self) -> int:
    """Width of the encoder's states."""
    return self.t5gemma.d_model if self.t5gemma else self.d_model

  @property
  def attention(self) -> TransformerConfig:
    """The part that the blocks of `models.transformer` read."""
    return TransformerConfig(
      vocab_size=self.vocab_size,
      num_layers=self.encoder_layers,
      d_model=self.d_model,
      d_ff=self.d_ff,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      rope_theta=self.rope_theta,
      norm_eps=self.norm_eps,
    )

  @property
  def mamba(self) -> MambaConfig:
    """The part that the mixers of `models.mamba_blocks` read."""
    return MambaConfig(
      kind="mamba2",
      vocab_size=self.vocab_size,
      num_layers=self.encoder_layers,
      d_model=self.d_model,
      d_state=self.d_state,
      head_dim=self.mamba_head_dim,
      norm_eps=self.norm_eps,
    )

  @classmethod
  def named(cls, size: str, **changes: Any) -> Self:
    """A config of a named size.

    Args:
      size: a key of `SIZES`.
      **changes: vocabularies and lengths, and what differs from the size.

    Raises:
      InputError: the size is unknown, or a value does not do.
    """
    if size not in SIZES:
      raise InputError(f"size {size!r} is unknown: take one of {list(SIZES)}")
    return cls(**(SIZES[size] | changes))

  @classmethod
  def on_t5gemma(
    cls, encoder: T5GemmaConfig, size: str, **changes: Any
  ) -> Self:
    """A decoder of a named size on a given encoder; see `named`."""
    settled = {"encoder": T5GEMMA, "t5gemma": encoder}
    return cls.named(size, **(cls._of_t5gemma(encoder) | changes | settled))

  @classmethod
  def from_json(cls, described: dict[str, Any]) -> Self:
    """The config of what `dataclasses.asdict` gave, after JSON.

    Raises:
      InputError: a value does not do.
      TypeError: a field is missing or unknown.
    """
    described = dict(described)
    if described.get("t5gemma") is not None:
      described["t5gemma"] = T5GemmaConfig.from_json(described["t5gemma"])
    return cls(**described)

  @classmethod
  def tiny(cls, **changes: Any) -> Self:
    """One small layer on each side, for tests."""
    sizes = {"vocab_size": 50, "target_vocab_size": 14, "target_length": 7}
    return cls.named("tiny", **(sizes | changes))


def _size(
  encoder_layers, decoder_layers, d_model, d_ff, heads, head_dim=64, **more
) -> dict[str, int]:
  return {
    "encoder_layers": encoder_layers,
    "decoder_layers": decoder_layers,
    "d_model": d_model,
    "d_ff": d_ff,
    "num_heads": heads,
    "num_kv_heads": heads,
    "head_dim": head_dim,
  } | more


# Millions of parameters with 8,192 text tokens: mini 2, small 9, base 40,
# medium 118, large 294. Most decoders are shallow: they write some ten tokens.
SIZES: dict[str, dict[str, int]] = {
  "tiny": _size(
    1, 1, 16, 24, 2, 8, num_features=16, d_state=8, mamba_head_dim=8
  ),
  "mini": _size(2, 2, 128, 344, 4, 32, num_features=64, d_state=32),
  "small": _size(4, 4, 256, 688, 8, 32),
  "base": _size(8, 2, 512, 1536, 8),
  "medium": _size(12, 2, 768, 2304, 12),
  "large": _size(17, 3, 1024, 3072, 16),
}
