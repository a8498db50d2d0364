"""The config of the encoders of T5Gemma and T5Gemma-2."""

import dataclasses
from typing import Any, Self

from models import config_checks
from models.errors import InputError, shown

_SIZES = (
  "vocab_size",
  "d_model",
  "d_ff",
  "num_heads",
  "num_kv_heads",
  "head_dim",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5GemmaConfig:
  """Shape of an encoder of T5Gemma (arXiv:2504.06225) or T5Gemma-2.

  Attributes:
    vocab_size: rows of the token table.
    d_model: D.
    d_ff: width of the gated MLPs.
    num_heads: H query heads.
    num_kv_heads: N key/value heads; divides H.
    head_dim: K.
    sliding: for each layer whether a token sees its neighbours alone.
    behind: how many tokens in front of it a token sees in sliding layers.
    ahead: how many behind it.
    query_scalar: attention scores are divided by its square root.
    softcap: scores are squashed to (-softcap, softcap); None leaves them.
    qk_norm: whether queries and keys are normed (T5Gemma-2).
    rope_theta: base of the rotary frequencies of the layers that see all.
    rope_factor: by which those frequencies are divided.
    sliding_rope_theta: base of those of sliding layers.
    norm_eps: of every RMSNorm.
  """

  vocab_size: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  sliding: tuple[bool, ...]
  behind: int
  ahead: int
  query_scalar: float
  softcap: float | None = None
  qk_norm: bool = False
  rope_theta: float = 10000.0
  rope_factor: float = 1.0
  sliding_rope_theta: float = 10000.0
  norm_eps: float = 1e-6

  def __post_init__(self):
    """Checks the sizes; raises InputError."""
    config_checks.sizes(self, _SIZES)
    config_checks.sizes(self, ["behind", "ahead"], least=0)
    for name in (
      "query_scalar",
      "rope_theta",
      "rope_factor",
      "sliding_rope_theta",
      "norm_eps",
    ):
      config_checks.positive(name, getattr(self, name))
    if self.softcap is not None:
      config_checks.positive("softcap", self.softcap)
    config_checks.switch("qk_norm", self.qk_norm)
    if not self.sliding or not all(isinstance(s, bool) for s in self.sliding):
      raise InputError(f"sliding={shown(self.sliding)} is no tuple of booleans")
    if self.num_layers > config_checks.MOST_LAYERS:
      raise InputError(f"{self.num_layers} layers are too many")
    config_checks.heads(self)

  @property
  def num_layers(self) -> int:
    """Layers."""
    return len(self.sliding)

  @classmethod
  def from_json(cls, described: dict[str, Any]) -> Self:
    """The config of what `dataclasses.asdict` gave, after JSON.

    Raises:
      InputError: a value does not do.
      TypeError: a field is missing or unknown.
    """
    return cls(**(described | {"sliding": tuple(described["sliding"])}))
