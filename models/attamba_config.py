"""The config of Attamba: attention over chunks that a compressor makes."""

import dataclasses
import itertools
from typing import Self

from models import config_checks
from models.errors import InputError, shown
from models.mamba_config import MambaConfig

# Where a chunk ends: by its place in the text, by what the tokens are, or by
# what the first layer makes of them.
REGULAR = ("uniform", "cyclic", "random")
BY_TOKEN = ("token_class", "surprise")
BY_LAYER = ("first_ssm", "first_attention")
BOUNDARIES = REGULAR + BY_TOKEN + BY_LAYER
# What makes one key of a chunk. Those of the second group keep it beside the
# keys of its tokens, the others take the last token's.
SHARED = ("ssm", "stride", "none")
POOLED = ("mean", "gated_pool", "overlapping_gated_pool")
COMPRESSORS = SHARED + POOLED
SEMANTICS = ("paper", "released")
_SIZES = (
  "vocab_size",
  "vocab_multiple",
  "num_layers",
  "d_model",
  "d_ff",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "d_state",
  "ssm_channels",
  "ssm_head_dim",
  "d_conv",
  "max_position",
)
_SWITCHES = ("sink", "share_kv", "keep_projections", "carry", "tie_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Neighbouring layers whose chunks have one size, in one stack.

  Attributes:
    start: index of the first layer.
    stop: index after the last layer.
    size: P, tokens of a chunk.
  """

  start: int
  stop: int
  size: int

  @property
  def num_layers(self) -> int:
    """Layers in the run."""
    return self.stop - self.start


def one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
  """Raises InputError where `value` is none of the valid names."""
  if value not in valid:
    raise InputError(f"{name}={shown(value)}: take from {', '.join(valid)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttambaConfig:
  """Shape of an Attamba language model (arXiv:2411.17685).

  Attributes:
    vocab_size: V, tokens there are.
    vocab_multiple: the token table is padded to a multiple of it.
    num_layers: blocks.
    d_model: D.
    d_ff: width of the SwiGLU.
    num_heads: H query heads.
    num_kv_heads: N key/value heads; divides H.
    head_dim: K.
    chunk_sizes: P, tokens of a chunk: one number for all layers, or one each.
    window: L, earlier tokens that a token sees one by one.
    boundaries: where chunks end. "uniform": every P tokens. "cyclic": the same,
      each layer some tokens earlier than the one before. "random": at a random
      place of every P tokens, which layer and place in the text decide.
      "token_class" and "surprise": where the tokens' costs (the parameter
      `chunk_costs`) have summed up to one, with P / 2 to 2 P tokens a chunk.
      "first_ssm" and "first_attention": the same by costs that the first layer
      finds, whose own chunks are uniform: the mean step size of its keys'
      state space, or how much a token attends to itself.
    compressor: what makes a chunk's key and value. "ssm": Mamba-2 layers that
      begin anew with each chunk. "stride": none, the chunk's last token stands
      for it. "mean": of its tokens. "gated_pool": of its tokens, weighed by a
      softmax a channel. "overlapping_gated_pool": the same of the chunk and
      the one before it. "none": there are no chunks but the sink, which leaves
      attention to a sliding window.
    top_chunks: of the chunks in sight a token sees so many, those whose keys
      score highest by all heads that share them; 0 for all. The keys are the
      index: all of them are read, of values only the chosen.
    sink: token 0 is a chunk of its own.
    share_kv: values are the rotated keys, and outputs are rotated back.
    keep_projections: W_K and W_V behind the state spaces, which without them
      give keys and values themselves; other compressors always have them.
    carry: a state space begins anew one chunk earlier, so that its state spans
      a chunk and the one before.
    d_state: N of the state spaces.
    ssm_channels: their channels, a multiple of `ssm_head_dim`.
    ssm_head_dim: channels of their heads.
    d_conv: taps of their convolution.
    rope_theta: base of the rotary frequencies.
    norm_eps: of every norm.
    tie_embeddings: the head is the transposed token table.
    max_position: trained context length.
    seed: of random boundaries.
    semantics: "paper", or "released": what the published code computes in place
      of state spaces (`models.attamba_released`), and its offsets of cyclic
      boundaries. There is no decoding of it.
  """

  vocab_size: int
  num_layers: int
  d_model: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  chunk_sizes: tuple[int, ...]
  window: int
  boundaries: str = "cyclic"
  compressor: str = "ssm"
  top_chunks: int = 0
  sink: bool = True
  share_kv: bool = False
  keep_projections: bool = False
  carry: bool = False
  d_state: int = 32
  ssm_channels: int = 256
  ssm_head_dim: int = 32
  d_conv: int = 4
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  max_position: int = 2048
  vocab_multiple: int = 1
  seed: int = 0
  semantics: str = "paper"

  def __post_init__(self):
    """Checks what no array shape would; raises InputError."""
    config_checks.sizes(self, _SIZES)
    config_checks.sizes(self, ["window", "seed", "top_chunks"], least=0)
    config_checks.positive("rope_theta", self.rope_theta)
    config_checks.positive("norm_eps", self.norm_eps, most=1)
    for name in _SWITCHES:
      config_checks.switch(name, getattr(self, name))
    config_checks.heads(self)
    one_of("boundaries", self.boundaries, BOUNDARIES)
    one_of("compressor", self.compressor, COMPRESSORS)
    one_of("semantics", self.semantics, SEMANTICS)
    if self.top_chunks and self.compressor == "none":
      raise InputError(
        f"top_chunks={self.top_chunks}: compressor='none' has no chunks to "
        "choose from: leave it out"
      )
    self._check_chunks()
    if self.boundaries == "first_ssm" and self.compressor != "ssm":
      raise InputError(
        f"boundaries='first_ssm' need compressor='ssm', not {self.compressor!r}"
      )
    if self.compressor == "ssm":
      self._check_ssm()
    elif self.carry or self.keep_projections:
      name = "carry" if self.carry else "keep_projections"
      raise InputError(
        f"{name}=True is of compressor='ssm', not of {self.compressor!r}: "
        "leave it out"
      )

  def _check_chunks(self):
    sizes = self.chunk_sizes
    if not isinstance(sizes, tuple) or len(sizes) not in (1, self.num_layers):
      raise InputError(
        f"chunk_sizes={shown(sizes)}: give one size, or one for each of "
        f"{self.num_layers} layers"
      )
    for size in sizes:
      config_checks.size("chunk_sizes", size)
      if size > self.max_position:
        raise InputError(
          f"chunk_sizes={shown(sizes)}: a chunk of {size} tokens is longer "
          f"than a text of max_position={self.max_position}: take smaller ones"
        )

    if self.semantics == "released" and (
      self.compressor != "ssm" or self.carry or self.boundaries not in REGULAR
    ):
      raise InputError(
        "semantics='released' are of compressor='ssm' without carry, with "
        f"boundaries {', '.join(REGULAR)}: change them"
      )

  def _check_ssm(self):
    if self.ssm_channels % self.ssm_head_dim:
      raise InputError(
        f"ssm_channels={self.ssm_channels} is no multiple of "
        f"ssm_head_dim={self.ssm_head_dim}"
      )
    if not self.keep_projections and self.kv_width != self.d_model:
      raise InputError(
        f"keys of {self.num_kv_heads} heads of {self.head_dim} channels are "
        f"not as wide as d_model={self.d_model}: change them, or set "
        "keep_projections"
      )

  @property
  def family(self) -> str:
    """The model's kind, for reports."""
    return "attamba"

  @property
  def cached_heads(self) -> int:
    """Key/value heads of which every token's are kept; 0 for none."""
    return 0

  @property
  def keeps_context(self) -> bool:
    """Whether what it remembers grows with the text."""
    return True

  @property
  def has_token_kernel(self) -> bool:
    """Whether a kernel takes part in its decoding step: in attention."""
    return True

  @property
  def kv_width(self) -> int:
    """Channels of all keys of a token."""
    return self.num_kv_heads * self.head_dim

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the token table."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def runs(self) -> tuple[Run, ...]:
    """The layers as runs of one chunk size."""
    sizes = self.chunk_sizes
    sizes = sizes * self.num_layers if len(sizes) == 1 else sizes
    # The layer that finds costs is by itself.
    alone = self.boundaries in BY_LAYER
    keys = [(size, alone and not i) for i, size in enumerate(sizes)]
    found, start = [], 0
    for (size, _), group in itertools.groupby(keys):
      stop = start + len(list(group))
      found.append(Run(start=start, stop=stop, size=size))
      start = stop
    return tuple(found)

  @property
  def mixer(self) -> MambaConfig:
    """A state space as `models.mamba_blocks` describes it."""
    return MambaConfig(
      kind="mamba2",
      vocab_size=self.vocab_size,
      num_layers=self.num_layers,
      d_model=self.d_model,
      d_state=self.d_state,
      expand=self.ssm_channels / self.d_model,
      head_dim=self.ssm_head_dim,
      d_conv=self.d_conv,
      norm_eps=self.norm_eps,
    )

  @property
  def num_gates(self) -> int:
    """Gates of a token: one, and one for the chunk behind its own."""
    kinds = {"gated_pool": 1, "overlapping_gated_pool": 2}
    return kinds.get(self.compressor, 0)

  def least_size(self, size: int) -> int:
    """Tokens that a chunk of size P has at least, over many chunks."""
    return size if self.boundaries in REGULAR else max(size // 2, 1)

  def most_size(self, size: int) -> int:
    """Tokens that a chunk of size P has at most."""
    return size if self.boundaries in ("uniform", "cyclic") else 2 * size

  def most_chunks(self, size: int, tokens: int) -> int:
    """Chunks that end among the first tokens of a text, at most."""
    if self.compressor == "none":
      return int(self.sink)
    return min(-(-tokens // self.least_size(size)) + self.sink, tokens)

  @classmethod
  def tiny(cls, **changes) -> Self:
    """Two small layers, for tests."""
    sizes = {
      "vocab_size": 64,
      "num_layers": 2,
      "d_model": 32,
      "d_ff": 48,
      "num_heads": 4,
      "num_kv_heads": 4,
      "head_dim": 8,
      "chunk_sizes": (4,),
      "window": 3,
      "d_state": 8,
      "ssm_channels": 16,
      "ssm_head_dim": 8,
      "max_position": 256,
    }
    return cls(**(sizes | changes))

  @classmethod
  def attamba_p4(cls) -> Self:
    """The published P = 4, L = 32, but for its tokenizer's 32,000 tokens."""
    return cls._published(4, 32)

  @classmethod
  def attamba_p8(cls) -> Self:
    """The same with P = 8, L = 64."""
    return cls._published(8, 64)

  @classmethod
  def _published(cls, size, window) -> Self:
    return cls(
      vocab_size=32000,
      num_layers=8,
      d_model=512,
      d_ff=1536,
      num_heads=8,
      num_kv_heads=8,
      head_dim=64,
      chunk_sizes=(size,),
      window=window,
      tie_embeddings=False,
    )
