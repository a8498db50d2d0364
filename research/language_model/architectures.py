"""What training needs of a model: sizes, parameters, hidden states, head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import language_model
from models.attamba_config import AttambaConfig
from models.errors import InputError
from models.implementations import Implementations
from models.mamba_config import AttentionLayers, MambaConfig
from models.transformer_config import TransformerConfig
from research.language_model.options import Options

Config = language_model.Config
Params = language_model.Params


def config_of(options: Options, vocab_size: int) -> Config:
  """The model that options describe.

  Args:
    options: of the run.
    vocab_size: ids of the tokenizer.

  Raises:
    InputError: sizes do not fit each other.
  """
  sizes = options.sizes()
  if "heads" in sizes and sizes["d_model"] % sizes["heads"]:
    raise InputError(
      f"--d_model={sizes['d_model']} is no multiple of "
      f"--heads={sizes['heads']}: change one"
    )
  if "heads" in sizes and (sizes["d_model"] // sizes["heads"]) % 2:
    raise InputError(
      f"--d_model={sizes['d_model']} and --heads={sizes['heads']} make heads "
      "of an odd width, which rotary positions cannot turn: change one"
    )
  try:
    if options.arch == "transformer":
      return _transformer(options, sizes, vocab_size)
    if options.arch == "attamba":
      return _attamba(options, sizes, vocab_size)
    return _mamba(options, sizes, vocab_size)
  except ValueError as error:
    raise InputError(f"sizes of --arch={options.arch}: {error}") from error


def _transformer(options, sizes, vocab_size) -> TransformerConfig:
  if not sizes["d_ff"]:
    raise InputError("--d_ff=0 is for hybrids: give the width of the MLP")
  return TransformerConfig(
    **_attending(options, sizes, vocab_size),
    float32_stream=True,
    scaled_outputs=True,
  )


def _attending(options, sizes, vocab_size) -> dict[str, Any]:
  """What configs of models say that attend in every layer."""
  return {
    "vocab_size": vocab_size,
    "vocab_multiple": options.vocab_multiple,
    "num_layers": sizes["layers"],
    "d_model": sizes["d_model"],
    "d_ff": sizes["d_ff"],
    "num_heads": sizes["heads"],
    "num_kv_heads": sizes["kv_heads"],
    "head_dim": sizes["d_model"] // sizes["heads"],
    "tie_embeddings": options.tie_embeddings,
    "max_position": options.length,
  }


def _mamba(options, sizes, vocab_size) -> MambaConfig:
  attention = None
  if options.arch == "hybrid":
    every = sizes["attention_every"]
    attention = AttentionLayers(
      indices=tuple(range(every - 1, sizes["layers"], every)),
      num_heads=sizes["heads"],
      num_kv_heads=sizes["kv_heads"],
      head_dim=sizes["d_model"] // sizes["heads"],
      d_ff=sizes["d_ff"],
    )
  mamba2 = {}
  if options.arch != "mamba1":
    mamba2 = {"head_dim": sizes["head_dim"], "num_groups": sizes["groups"]}
  return MambaConfig(
    kind="mamba1" if options.arch == "mamba1" else "mamba2",
    vocab_size=vocab_size,
    vocab_multiple=options.vocab_multiple,
    num_layers=sizes["layers"],
    d_model=sizes["d_model"],
    d_state=sizes["d_state"],
    tie_embeddings=options.tie_embeddings,
    attention=attention,
    **mamba2,
  )


def _attamba(options, sizes, vocab_size) -> AttambaConfig:
  parts = sizes["chunk_size"].split(",")
  if not all(part.isdecimal() for part in parts):
    raise InputError(
      f"--chunk_size={sizes['chunk_size']}: write whole numbers, such as 4 or "
      "4,128"
    )
  chunks = tuple(map(int, parts))
  if sizes["layers"] % len(chunks):
    raise InputError(
      f"--chunk_size={sizes['chunk_size']}: {len(chunks)} sizes do not repeat "
      f"evenly in --layers={sizes['layers']}: change one"
    )
  if len(chunks) > 1:
    chunks *= sizes["layers"] // len(chunks)
  names = ("window", "boundaries", "compressor", "top_chunks", "sink",
           "share_kv", "keep_projections", "carry", "semantics", "d_state",
           "ssm_channels")  # fmt: skip
  return AttambaConfig(
    **_attending(options, sizes, vocab_size),
    chunk_sizes=chunks,
    ssm_head_dim=sizes["head_dim"],
    seed=options.seed,
    **{name: sizes[name] for name in names},
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A model as it is trained.

  Attributes:
    config: its sizes.
    dtype: of activations; weights, and the residual stream of what
      `config_of` describes, are float32.
    implementations: of the ops; a Transformer has only attention.
    remat: compute layers again in the backward pass.
    document_mask: tokens see their own document alone.
    unroll: layers in one iteration of the scan over them, which divides them;
      0 for all.
  """

  config: Config
  dtype: str = "float32"
  implementations: Implementations = Implementations()
  remat: bool = False
  document_mask: bool = True
  unroll: int = 1

  def init(self, key: jax.Array) -> Params:
    """Random float32 parameters."""
    return language_model.init(self.config, key)

  def hidden(
    self, params: Params, tokens: jax.Array, segment_ids: jax.Array
  ) -> jax.Array:
    """Hidden states (B, L, D) after the final norm, in `dtype`.

    Args:
      params: of `init`; each layer casts its own.
      tokens: (B, L) int32.
      segment_ids: (B, L) int32, negative for padding.
    """
    # Where documents do not count, padding fills whole rows that do not either.
    segments = segment_ids if self.document_mask else None
    return language_model.hidden_states(
      self.config,
      params,
      tokens,
      segment_ids=segments,
      dtype=jnp.dtype(self.dtype),
      implementations=self.implementations,
      remat=self.remat,
      unroll=self.unroll or self.config.num_layers,
    )

  def head(self, params: Params) -> jax.Array:
    """The table (V, D) whose rows score the tokens."""
    return language_model.head(self.config, params)
