"""The config of Mamba models and their hybrids, with the published sizes."""

import dataclasses
import itertools
from typing import Literal, Self

from models import config_checks
from models.errors import InputError, shown
from models.transformer_config import TransformerConfig

Kind = Literal["mamba1", "mamba2"]
_GPT_NEOX_TOKENS = 50277
_SIZES = (
  "vocab_size",
  "vocab_multiple",
  "num_layers",
  "d_model",
  "d_state",
  "d_conv",
  "head_dim",
  "num_groups",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayers:
  """The attention layers of a hybrid.

  Attributes:
    indices: which of the model's layers they are, in rising order.
    num_heads: H query heads.
    num_kv_heads: key/value heads; divides H.
    head_dim: size of a head.
    d_ff: width of the SwiGLU after the attention; 0 for none.
    rope_theta: base of the rotary frequencies.
  """

  indices: tuple[int, ...]
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int = 0
  rope_theta: float = 10000.0

  def __post_init__(self):
    """Checks the sizes; raises InputError."""
    config_checks.rising(
      "attention indices", self.indices, config_checks.MOST_LAYERS
    )
    config_checks.sizes(self, ["num_heads", "num_kv_heads", "head_dim"])
    config_checks.sizes(self, ["d_ff"], least=0)
    config_checks.positive("rope_theta", self.rope_theta)
    config_checks.heads(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Neighbouring layers of one kind, whose weights lie in one stack.

  Attributes:
    kind: "mamba" or "attention".
    start: index of the first layer.
    stop: index after the last layer.
  """

  kind: Literal["mamba", "attention"]
  start: int
  stop: int

  @property
  def num_layers(self) -> int:
    """Layers in the run."""
    return self.stop - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
  """Shape of a Mamba language model.

  Attributes:
    kind: "mamba1" (selective scan) or "mamba2" (state-space duality).
    vocab_size: tokens there are.
    vocab_multiple: the token table is padded to a multiple of it.
    num_layers: all layers, attention included.
    d_model: D.
    d_state: N, state size a channel.
    expand: inner width as a multiple of D, by which it is a whole number.
    d_conv: K, taps of the convolution.
    dt_rank: rank of Mamba-1's step size; None for ceil(D / 16).
    head_dim: P, channels a head of Mamba-2.
    num_groups: G, groups of heads of Mamba-2 that share B and C.
    norm_eps: of every norm.
    tie_embeddings: the head is the transposed token table.
    attention: the attention layers of a hybrid, or None.
    splits: layers that begin a stack though their kind goes on, in rising
      order: layers of one stack have the same number formats.
  """

  kind: Kind
  vocab_size: int
  num_layers: int
  d_model: int
  d_state: int
  vocab_multiple: int = 8
  expand: float = 2
  d_conv: int = 4
  dt_rank: int | None = None
  head_dim: int = 64
  num_groups: int = 1
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  attention: AttentionLayers | None = None
  splits: tuple[int, ...] = ()

  def __post_init__(self):
    """Checks what no array shape would; raises InputError."""
    if self.kind not in ("mamba1", "mamba2"):
      raise InputError(
        f"kind={shown(self.kind)} is neither 'mamba1' nor 'mamba2'"
      )
    config_checks.sizes(self, _SIZES)
    config_checks.positive("expand", self.expand, most=config_checks.MOST)
    config_checks.size("d_inner", self.d_inner)
    if self.dt_rank is not None:
      config_checks.sizes(self, ["dt_rank"])
    config_checks.positive("norm_eps", self.norm_eps, most=1)
    config_checks.switch("tie_embeddings", self.tie_embeddings)
    if self.kind == "mamba2" and self.d_inner % self.head_dim:
      raise InputError(
        f"d_inner={self.d_inner} is no multiple of head_dim={self.head_dim}"
      )
    if self.kind == "mamba2" and self.num_heads % self.num_groups:
      raise InputError(
        f"{self.num_heads} heads are no multiple of "
        f"num_groups={self.num_groups}"
      )
    config_checks.rising(
      "attention indices", self.attention_indices, self.num_layers
    )
    config_checks.rising("splits", self.splits, self.num_layers)

  @property
  def family(self) -> str:
    """The model's kind, for reports: mamba1, mamba2 or hybrid."""
    return "hybrid" if self.attention else self.kind

  @property
  def max_position(self) -> None:
    """Trained context length: nothing in the model bounds it."""
    return None

  @property
  def d_inner(self) -> int:
    """Channels of the state-space layer."""
    return round(self.expand * self.d_model)

  @property
  def num_heads(self) -> int:
    """H, heads of Mamba-2."""
    return self.d_inner // self.head_dim

  @property
  def rank(self) -> int:
    """R, rank of Mamba-1's step size."""
    return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank

  @property
  def conv_channels(self) -> int:
    """Channels of the convolution: x, and in Mamba-2 also B and C."""
    if self.kind == "mamba1":
      return self.d_inner
    return self.d_inner + 2 * self.num_groups * self.d_state

  @property
  def cached_heads(self) -> int:
    """Key/value heads of which every token's are kept; 0 for none."""
    return self.attention.num_kv_heads if self.attention else 0

  @property
  def keeps_context(self) -> bool:
    """Whether what it remembers grows with the text."""
    return self.attention is not None

  @property
  def has_token_kernel(self) -> bool:
    """Whether `ops.mamba2_step` computes its decoding step."""
    return self.family == "mamba2"

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the token table."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def attention_indices(self) -> tuple[int, ...]:
    """Indices of the attention layers."""
    return self.attention.indices if self.attention else ()

  @property
  def runs(self) -> tuple[Run, ...]:
    """The layers as runs of one kind, cut at the splits."""
    kinds = [
      (
        "attention" if i in self.attention_indices else "mamba",
        sum(split <= i for split in self.splits),
      )
      for i in range(self.num_layers)
    ]
    found, start = [], 0
    for (kind, _), group in itertools.groupby(kinds):
      stop = start + len(list(group))
      found.append(Run(kind=kind, start=start, stop=stop))
      start = stop
    return tuple(found)

  @property
  def attention_block(self) -> TransformerConfig:
    """The attention layers as `models.transformer` describes them."""
    a = self.attention
    return TransformerConfig(
      vocab_size=self.vocab_size,
      num_layers=len(a.indices),
      d_model=self.d_model,
      d_ff=a.d_ff,
      num_heads=a.num_heads,
      num_kv_heads=a.num_kv_heads,
      head_dim=a.head_dim,
      rope_theta=a.rope_theta,
      norm_eps=self.norm_eps,
    )

  @classmethod
  def tiny(cls, kind: str = "mamba2", **changes) -> Self:
    """A few small layers, for tests.

    Args:
      kind: "mamba1", "mamba2", or "hybrid": Mamba-2 with attention as its
        second of three layers.
      **changes: other fields.
    """
    sizes = {
      "kind": "mamba2" if kind == "hybrid" else kind,
      "vocab_size": 61,
      "num_layers": 2,
      "d_model": 32,
      "d_state": 8,
    }
    if kind != "mamba1":
      sizes |= {"d_state": 16, "head_dim": 16}
    if kind == "hybrid":
      sizes["num_layers"] = 3
      sizes["attention"] = AttentionLayers(
        indices=(1,), num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48
      )
    return cls(**(sizes | changes))

  @classmethod
  def mamba_130m(cls) -> Self:
    """state-spaces/mamba-130m."""
    return cls._mamba1(24, 768)

  @classmethod
  def mamba_370m(cls) -> Self:
    """state-spaces/mamba-370m."""
    return cls._mamba1(48, 1024)

  @classmethod
  def mamba_790m(cls) -> Self:
    """state-spaces/mamba-790m."""
    return cls._mamba1(48, 1536)

  @classmethod
  def mamba_1_4b(cls) -> Self:
    """state-spaces/mamba-1.4b."""
    return cls._mamba1(48, 2048)

  @classmethod
  def mamba_2_8b(cls) -> Self:
    """state-spaces/mamba-2.8b."""
    return cls._mamba1(64, 2560)

  @classmethod
  def mamba2_130m(cls) -> Self:
    """state-spaces/mamba2-130m."""
    return cls._mamba2(24, 768)

  @classmethod
  def mamba2_370m(cls) -> Self:
    """state-spaces/mamba2-370m."""
    return cls._mamba2(48, 1024)

  @classmethod
  def mamba2_780m(cls) -> Self:
    """state-spaces/mamba2-780m."""
    return cls._mamba2(48, 1536)

  @classmethod
  def mamba2_1_3b(cls) -> Self:
    """state-spaces/mamba2-1.3b."""
    return cls._mamba2(48, 2048)

  @classmethod
  def mamba2_2_7b(cls) -> Self:
    """state-spaces/mamba2-2.7b."""
    return cls._mamba2(64, 2560)

  @classmethod
  def mamba2_8b(cls) -> Self:
    """nvidia/mamba2-8b-3t-4k."""
    return dataclasses.replace(
      cls._mamba2(56, 4096),
      vocab_size=256000,
      vocab_multiple=128,
      num_groups=8,
      tie_embeddings=False,
    )

  @classmethod
  def _mamba1(cls, num_layers, d_model) -> Self:
    return cls(
      kind="mamba1",
      vocab_size=_GPT_NEOX_TOKENS,
      num_layers=num_layers,
      d_model=d_model,
      d_state=16,
    )

  @classmethod
  def _mamba2(cls, num_layers, d_model) -> Self:
    return cls(
      kind="mamba2",
      vocab_size=_GPT_NEOX_TOKENS,
      vocab_multiple=16,
      num_layers=num_layers,
      d_model=d_model,
      d_state=128,
    )
