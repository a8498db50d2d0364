"""The config of FABNet, and of the models that it is compared with."""

import dataclasses
from typing import Any, Self

from models import config_checks
from models.errors import InputError, shown
from models.mamba_config import MambaConfig

MATRICES = ("dense", "butterfly", "monarch", "block_diagonal", "low_rank")
POSITIONS = ("learned", "rotary", "none")
POOLS = ("mean", "cls")
_COUNTS = ("fourier_layers", "mamba_layers", "attention_layers")
_SWITCHES = (
  "attention_first",
  "tied_butterflies",
  "fourier_norm",
  "mask_padding",
  "pairs",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FABNetConfig:
  """Shape of an encoder that classifies sequences.

  Blocks are pre-norm: a mixer of tokens and then an FFN. FABNet
  (https://arxiv.org/abs/2209.09570) has FBfly blocks, which mix by Fourier
  transforms, and behind them ABfly blocks, which attend; all matrices of both
  are butterflies. FNet, Transformers and a Mamba-2 in both directions are the
  same parts with other numbers.

  Attributes:
    vocab_size: V, tokens, padding (0) and what masks others included.
    num_classes: C.
    max_length: L, tokens of the longest sequence.
    d_model: D.
    d_ff: F, width of the FFNs and of the head.
    num_heads: H of attention.
    fourier_layers: blocks that mix by Fourier transforms.
    mamba_layers: blocks of Mamba-2 in both directions.
    attention_layers: blocks that attend.
    attention_first: as in the released code for accuracies; the paper has them
      last, as its code for speed has.
    ffn: matrices of the FFNs, one of `MATRICES`.
    projections: matrices of queries, keys, values and the output.
    attention_ffn: matrices of the FFNs of blocks that attend; None for `ffn`.
    tied_butterflies: groups of a butterfly's stage share their matrices.
    rank: of "low_rank".
    blocks: of "monarch" (None for some sqrt(D)) and "block_diagonal".
    positions: "learned"; "rotary", in attention alone; "none".
    fourier_norm: divides transforms by sqrt(L D); the paper does not.
    mask_padding: padding is zero to transforms, unseen by attention and left
      out of means. The released code lets it mix in.
    pool: "mean" of the tokens, or "cls", a token in front (the last is lost).
    pairs: two sequences are told apart, as in retrieval.
    d_state: of Mamba-2.
    mamba_head_dim: of Mamba-2; divides 2 D.
    norm_eps: of every norm.
  """

  vocab_size: int
  num_classes: int
  max_length: int
  d_model: int
  d_ff: int
  num_heads: int = 2
  fourier_layers: int = 0
  mamba_layers: int = 0
  attention_layers: int = 0
  attention_first: bool = False
  ffn: str = "dense"
  projections: str = "dense"
  attention_ffn: str | None = None
  tied_butterflies: bool = False
  rank: int | None = None
  blocks: int | None = None
  positions: str = "learned"
  fourier_norm: bool = False
  mask_padding: bool = True
  pool: str = "mean"
  pairs: bool = False
  d_state: int = 16
  mamba_head_dim: int = 16
  norm_eps: float = 1e-6

  def __post_init__(self):
    """Checks what no array shape would; raises InputError."""
    config_checks.sizes(
      self,
      ["vocab_size", "num_classes", "max_length", "d_model", "d_ff"]
      + ["num_heads", "d_state", "mamba_head_dim"],
    )
    config_checks.sizes(self, _COUNTS, least=0)
    if not 1 <= self.num_layers <= config_checks.MOST_LAYERS:
      raise InputError(
        f"{' + '.join(_COUNTS)} = {self.num_layers}: a model has from 1 to "
        f"{config_checks.MOST_LAYERS} blocks"
      )
    for name in _SWITCHES:
      config_checks.switch(name, getattr(self, name))
    config_checks.positive("norm_eps", self.norm_eps, most=1)
    for name, known in (
      ("ffn", MATRICES),
      ("projections", MATRICES),
      ("attention_ffn", (None, *MATRICES)),
      ("positions", POSITIONS),
      ("pool", POOLS),
    ):
      if getattr(self, name) not in known:
        raise InputError(
          f"{name}={shown(getattr(self, name))} is unknown: take one of "
          f"{list(known)}"
        )
    self._check_heads()
    self._check_blocks()

  def _check_heads(self):
    if self.attention_layers and self.d_model % self.num_heads:
      raise InputError(
        f"num_heads={self.num_heads} does not divide d_model={self.d_model}"
      )
    rotates = self.attention_layers and self.positions == "rotary"
    if rotates and self.head_dim % 2:
      raise InputError(
        f"d_model={self.d_model} by num_heads={self.num_heads} makes heads of "
        f"{self.head_dim}, which is odd: rotary positions need pairs"
      )
    if self.mamba_layers and 2 * self.d_model % self.mamba_head_dim:
      raise InputError(
        f"mamba_head_dim={self.mamba_head_dim} does not divide "
        f"2 * d_model={2 * self.d_model}"
      )

  def _check_blocks(self):
    kinds = self.matrices
    for name, needing in (("rank", ["low_rank"]), ("blocks", MATRICES[2:4])):
      value = getattr(self, name)
      if value is not None:
        config_checks.size(name, value)
        if not kinds & set(needing):
          raise InputError(
            f"{name}={value} is of {' and '.join(needing)}, and no matrix of "
            f"the model is: its matrices are {sorted(kinds)}"
          )
      elif kinds & {"low_rank", "block_diagonal"} & set(needing):
        raise InputError(f"{name} is missing: {needing[-1]} matrices need it")
    widths = (self.d_model, self.d_ff)
    if "block_diagonal" in kinds and any(w % self.blocks for w in widths):
      raise InputError(
        f"blocks={self.blocks} does not divide d_model={self.d_model} and "
        f"d_ff={self.d_ff}"
      )

  @property
  def matrices(self) -> set[str]:
    """The kinds of matrices in its blocks."""
    kinds = {self.ffn} if self.fourier_layers or self.mamba_layers else set()
    if self.attention_layers:
      kinds |= {self.projections, self.ffn_of("attention")}
    return kinds

  @property
  def num_layers(self) -> int:
    """Blocks of all kinds."""
    return self.fourier_layers + self.mamba_layers + self.attention_layers

  @property
  def head_dim(self) -> int:
    """K, channels of a head."""
    return self.d_model // self.num_heads

  @property
  def runs(self) -> tuple[tuple[str, int], ...]:
    """(kind, blocks) of each stack of blocks, in order."""
    found = [
      ("fourier", self.fourier_layers),
      ("mamba", self.mamba_layers),
      ("attention", self.attention_layers),
    ]
    if self.attention_first:
      found = found[::-1]
    return tuple((kind, count) for kind, count in found if count)

  def ffn_of(self, kind: str) -> str:
    """The matrices of the FFN of a block of a kind."""
    own = self.attention_ffn if kind == "attention" else None
    return own or self.ffn

  @property
  def mamba(self) -> MambaConfig:
    """The part that the mixers of `models.mamba_blocks` read."""
    return MambaConfig(
      kind="mamba2",
      vocab_size=self.vocab_size,
      num_layers=self.num_layers,
      d_model=self.d_model,
      d_state=self.d_state,
      head_dim=self.mamba_head_dim,
      norm_eps=self.norm_eps,
    )

  def released(self) -> Self:
    """The same as the released code for accuracies builds it.

    Blocks that attend come first and are dense, padding mixes in, transforms
    are not normalised.
    """
    return dataclasses.replace(
      self,
      attention_first=True,
      projections="dense",
      attention_ffn="dense" if self.attention_layers else None,
      mask_padding=False,
      fourier_norm=False,
    )

  @classmethod
  def tiny(cls, **changes: Any) -> Self:
    """One FBfly and one ABfly block, for tests."""
    sizes = {
      "vocab_size": 18,
      "num_classes": 10,
      "max_length": 16,
      "d_model": 8,
      "d_ff": 16,
      "fourier_layers": 1,
      "attention_layers": 1,
      "ffn": "butterfly",
      "projections": "butterfly",
    }
    return cls(**(sizes | changes))
