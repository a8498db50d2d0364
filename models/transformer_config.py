"""The decoder's config, with the published sizes of its families."""

import dataclasses
from typing import Self

from models import config_checks
from models.errors import InputError, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """Llama-3 frequency scaling of rotary embeddings (Llama 3.1 report).

  Attributes:
    factor: how much low frequencies are slowed down.
    low_freq_factor: wavelengths above `original_max_position /
      low_freq_factor` are scaled by `factor`.
    high_freq_factor: wavelengths below `original_max_position /
      high_freq_factor` are kept.
    original_max_position: context length of the original training.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position: int

  def __post_init__(self):
    """Checks the numbers; raises InputError."""
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
      config_checks.positive(name, getattr(self, name))
    config_checks.sizes(self, ["original_max_position"])
    if self.high_freq_factor <= self.low_freq_factor:
      raise InputError(
        f"high_freq_factor={self.high_freq_factor} is not above "
        f"low_freq_factor={self.low_freq_factor}"
      )


_LLAMA31 = RopeScaling(
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position=8192,
)
_LLAMA32 = dataclasses.replace(_LLAMA31, factor=32.0)
# What the sizes of Gemma 3 with a vision tower have in common.
_GEMMA3_LARGE = {
  "vocab_size": 262208,
  "rope_factor": 8.0,
  "max_position": 131072,
  "behind": 1023,
}
_SIZES = (
  "vocab_size",
  "d_model",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "max_position",
  "vocab_multiple",
)
_SWITCHES = (
  "tie_embeddings",
  "qkv_bias",
  "qk_norm",
  "float32_stream",
  "scaled_outputs",
  "post_norms",
  "scaled_embeddings",
)
ACTIVATIONS = ("silu", "gelu")


def gemma3_sliding(num_layers: int, period: int = 6) -> tuple[bool, ...]:
  """Which layers of Gemma 3 slide: all but the last of every `period`."""
  return tuple((layer + 1) % period != 0 for layer in range(num_layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Shape of a decoder.

  Attributes:
    vocab_size: tokens there are.
    num_layers: L.
    d_model: D.
    d_ff: width of the gated MLP.
    num_heads: H query heads.
    num_kv_heads: N key/value heads; divides H.
    head_dim: K.
    rope_theta: base of the rotary frequencies.
    rope_scaling: Llama-3 scaling or None.
    rope_factor: positions are divided by it (linear scaling).
    norm_eps: of every RMSNorm.
    tie_embeddings: the head is the transposed token table.
    qkv_bias: biases on q, k and v (Qwen2.5).
    qk_norm: RMSNorm over each head of q and k (Qwen3).
    max_position: trained context length.
    vocab_multiple: the token table is padded to a multiple of it.
    float32_stream: the residual stream is float32 whatever the dtype of the
      layers' work, as Mamba's is.
    scaled_outputs: what writes to the stream starts smaller, by the square
      root of all such writes (GPT-2, section 2.3); for random weights alone.
    sliding: for each layer whether a token sees the nearest ones alone (Gemma
      3, arXiv:2503.19786, section 2); empty where every layer sees all.
    behind: how many tokens in front of it a token sees in sliding layers.
    sliding_rope_theta: base of the rotary frequencies of sliding layers, whose
      positions are neither divided nor scaled.
    query_scalar: attention scores are divided by its square root; None for K.
    activation: of the gated MLP: "silu", or "gelu" by tanh (Gemma).
    post_norms: attention and MLP have a norm behind them too (Gemma).
    scaled_embeddings: embedded tokens are multiplied by sqrt(D) (Gemma).
  """

  vocab_size: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rope_factor: float = 1.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  qkv_bias: bool = False
  qk_norm: bool = False
  max_position: int = 2048
  vocab_multiple: int = 1
  float32_stream: bool = False
  scaled_outputs: bool = False
  sliding: tuple[bool, ...] = ()
  behind: int = 0
  sliding_rope_theta: float = 10000.0
  query_scalar: float | None = None
  activation: str = "silu"
  post_norms: bool = False
  scaled_embeddings: bool = False

  def __post_init__(self):
    """Checks what no array shape would; raises InputError."""
    config_checks.sizes(self, _SIZES)
    config_checks.sizes(self, ["num_layers", "d_ff"], least=0)
    config_checks.sizes(self, ["behind"], least=0)
    for name in ("rope_theta", "rope_factor", "sliding_rope_theta"):
      config_checks.positive(name, getattr(self, name))
    if self.query_scalar is not None:
      config_checks.positive("query_scalar", self.query_scalar)
    config_checks.positive("norm_eps", self.norm_eps, most=1)
    for name in _SWITCHES:
      config_checks.switch(name, getattr(self, name))
    config_checks.heads(self)
    if self.activation not in ACTIVATIONS:
      raise InputError(
        f"activation={shown(self.activation)} is none of "
        f"{', '.join(ACTIVATIONS)}"
      )
    self._check_sliding()

  def _check_sliding(self):
    is_tuple = isinstance(self.sliding, tuple)
    if not is_tuple or not all(isinstance(s, bool) for s in self.sliding):
      raise InputError(f"sliding={shown(self.sliding)} is no tuple of booleans")
    if self.sliding and len(self.sliding) != self.num_layers:
      raise InputError(
        f"sliding has {len(self.sliding)} entries for {self.num_layers} layers"
      )
    if self.sliding and not any(self.sliding):
      raise InputError("sliding names no layer: leave it out")
    if self.sliding and not self.behind:
      raise InputError("behind=0: a token of sliding layers sees itself alone")

  @property
  def family(self) -> str:
    """The model's kind, for reports."""
    return "transformer"

  @property
  def cached_heads(self) -> int:
    """Key/value heads of which every token's are kept; 0 for none."""
    return self.num_kv_heads

  @property
  def keeps_context(self) -> bool:
    """Whether what it remembers grows with the text."""
    return True

  @property
  def has_token_kernel(self) -> bool:
    """Whether `ops.transformer_step` computes its decoding step."""
    plain = self.activation == "silu" and not self.sliding
    scale = self.query_scalar in (None, self.head_dim)
    return plain and scale and not self.post_norms

  @property
  def num_sliding(self) -> int:
    """Layers in which a token sees the nearest ones alone."""
    return sum(self.sliding)

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the token table."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @classmethod
  def tiny(cls, **changes) -> Self:
    """Two small layers, for tests."""
    sizes = {
      "vocab_size": 64,
      "num_layers": 2,
      "d_model": 32,
      "d_ff": 48,
      "num_heads": 4,
      "num_kv_heads": 2,
      "head_dim": 8,
      "max_position": 256,
    }
    return cls(**(sizes | changes))

  @classmethod
  def transformer_63m(cls) -> Self:
    """As many parameters, layers and heads as `AttambaConfig.attamba_p4`."""
    return cls(
      vocab_size=32000,
      num_layers=8,
      d_model=512,
      d_ff=1752,
      num_heads=8,
      num_kv_heads=8,
      head_dim=64,
      tie_embeddings=False,
      max_position=2048,
    )

  @classmethod
  def smollm2_135m(cls) -> Self:
    """SmolLM2-135M."""
    return cls._smollm2(30, 576, 1536, 9, 3)

  @classmethod
  def smollm2_360m(cls) -> Self:
    """SmolLM2-360M."""
    return cls._smollm2(32, 960, 2560, 15, 5)

  @classmethod
  def smollm2_1_7b(cls) -> Self:
    """SmolLM2-1.7B."""
    return dataclasses.replace(
      cls._smollm2(24, 2048, 8192, 32, 32), rope_theta=130000.0
    )

  @classmethod
  def llama3_2_1b(cls) -> Self:
    """Llama-3.2-1B."""
    return cls._llama3(16, 2048, 8192, 32, 64, _LLAMA32, tied=True)

  @classmethod
  def llama3_2_3b(cls) -> Self:
    """Llama-3.2-3B."""
    return cls._llama3(28, 3072, 8192, 24, 128, _LLAMA32, tied=True)

  @classmethod
  def llama3_1_8b(cls) -> Self:
    """Llama-3.1-8B."""
    return cls._llama3(32, 4096, 14336, 32, 128, _LLAMA31, tied=False)

  @classmethod
  def qwen2_5_0_5b(cls) -> Self:
    """Qwen2.5-0.5B."""
    return cls._qwen2_5(24, 896, 4864, 14, 2, 64, vocab_size=151936)

  @classmethod
  def qwen2_5_1_5b(cls) -> Self:
    """Qwen2.5-1.5B."""
    return cls._qwen2_5(28, 1536, 8960, 12, 2, 128, vocab_size=151936)

  @classmethod
  def qwen2_5_7b(cls) -> Self:
    """Qwen2.5-7B."""
    return dataclasses.replace(
      cls._qwen2_5(28, 3584, 18944, 28, 4, 128, vocab_size=152064),
      tie_embeddings=False,
      max_position=131072,
    )

  @classmethod
  def qwen3_0_6b(cls) -> Self:
    """Qwen3-0.6B."""
    return cls._qwen3(28, 1024, 3072, 16)

  @classmethod
  def qwen3_1_7b(cls) -> Self:
    """Qwen3-1.7B."""
    return cls._qwen3(28, 2048, 6144, 16)

  @classmethod
  def qwen3_4b(cls) -> Self:
    """Qwen3-4B."""
    return cls._qwen3(36, 2560, 9728, 32)

  @classmethod
  def qwen3_8b(cls) -> Self:
    """Qwen3-8B."""
    return dataclasses.replace(
      cls._qwen3(36, 4096, 12288, 32), tie_embeddings=False
    )

  @classmethod
  def tiny_gemma(cls, **changes) -> Self:
    """Three small layers of Gemma 3, two of them sliding, for tests."""
    own = {
      "num_layers": 3,
      "sliding": (True, True, False),
      "behind": 4,
      "rope_theta": 1000000.0,
      "query_scalar": 10.0,
      "norm_eps": 1e-6,
      "qk_norm": True,
      "activation": "gelu",
      "post_norms": True,
      "scaled_embeddings": True,
    }
    return cls.tiny(**(own | changes))

  @classmethod
  def gemma3_270m(cls) -> Self:
    """Gemma-3-270M."""
    return cls._gemma3(18, 640, 2048, 4, 1)

  @classmethod
  def gemma3_1b(cls) -> Self:
    """Gemma-3-1B."""
    return cls._gemma3(26, 1152, 6912, 4, 1)

  @classmethod
  def gemma3_4b(cls) -> Self:
    """Gemma-3-4B, its text model."""
    return cls._gemma3(34, 2560, 10240, 8, 4, **_GEMMA3_LARGE)

  @classmethod
  def gemma3_12b(cls) -> Self:
    """Gemma-3-12B, its text model."""
    return cls._gemma3(48, 3840, 15360, 16, 8, **_GEMMA3_LARGE)

  @classmethod
  def gemma3_27b(cls) -> Self:
    """Gemma-3-27B, its text model."""
    own = _GEMMA3_LARGE | {"head_dim": 128, "query_scalar": 168.0}
    return cls._gemma3(62, 5376, 21504, 32, 16, **own)

  @classmethod
  def _smollm2(cls, layers, width, ff, heads, kv_heads) -> Self:
    return cls(
      vocab_size=49152,
      num_layers=layers,
      d_model=width,
      d_ff=ff,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=64,
      rope_theta=100000.0,
      max_position=8192,
    )

  @classmethod
  def _llama3(cls, layers, width, ff, heads, head_dim, scaling, tied) -> Self:
    return cls(
      vocab_size=128256,
      num_layers=layers,
      d_model=width,
      d_ff=ff,
      num_heads=heads,
      num_kv_heads=8,
      head_dim=head_dim,
      rope_theta=500000.0,
      rope_scaling=scaling,
      tie_embeddings=tied,
      max_position=131072,
    )

  @classmethod
  def _qwen2_5(
    cls, layers, width, ff, heads, kv_heads, head_dim, vocab_size
  ) -> Self:
    return cls(
      vocab_size=vocab_size,
      num_layers=layers,
      d_model=width,
      d_ff=ff,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=head_dim,
      rope_theta=1000000.0,
      norm_eps=1e-6,
      qkv_bias=True,
      max_position=32768,
    )

  @classmethod
  def _qwen3(cls, layers, width, ff, heads) -> Self:
    return cls(
      vocab_size=151936,
      num_layers=layers,
      d_model=width,
      d_ff=ff,
      num_heads=heads,
      num_kv_heads=8,
      head_dim=128,
      rope_theta=1000000.0,
      norm_eps=1e-6,
      qk_norm=True,
      max_position=40960,
    )

  @classmethod
  def _gemma3(cls, layers, width, ff, heads, kv_heads, **changes) -> Self:
    own = {
      "vocab_size": 262144,
      "num_layers": layers,
      "d_model": width,
      "d_ff": ff,
      "num_heads": heads,
      "num_kv_heads": kv_heads,
      "head_dim": 256,
      "rope_theta": 1000000.0,
      "norm_eps": 1e-6,
      "qk_norm": True,
      "max_position": 32768,
      "sliding": gemma3_sliding(layers),
      "behind": 511,
      "query_scalar": 256.0,
      "activation": "gelu",
      "post_norms": True,
      "scaled_embeddings": True,
    }
    return cls(**(own | changes))
