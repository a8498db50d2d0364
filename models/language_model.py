"""One view of every language model of the house: read, append, logits.

A model is a config and a nested dict of parameters; its config says which
module computes it. Shapes by axis letter: B batch, T tokens, D width,
V vocabulary. The state between calls (keys and values, recurrent states) is a
pytree of the model's own, passed in and returned.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import mamba, transformer
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig

Config = TransformerConfig | MambaConfig
Params = dict[str, Any]
State = transformer.KVCache | mamba.MambaState


def family(config: Config) -> str:
  """The model's kind: transformer, mamba1, mamba2, or hybrid."""
  if isinstance(config, TransformerConfig):
    return "transformer"
  return "hybrid" if config.attention else config.kind


def max_length(config: Config) -> int | None:
  """Tokens that the model was trained on in one row; None: no bound."""
  return getattr(config, "max_position", None)


def hidden_states(
  config: Config, params: Params, tokens: jax.Array
) -> jax.Array:
  """Hidden states (B, T, D) of `tokens` (B, T) in one causal pass."""
  if isinstance(config, MambaConfig):
    return mamba.hidden_states(config, params, tokens)
  model = transformer.bind(config, params)
  return model(
    model.embed(tokens),
    transformer.token_positions(tokens),
    transformer.causal_attend(keep=False),
  )[0]


def read(
  config: Config,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  cache_size: int,
) -> tuple[jax.Array, State]:
  """Reads rows of different length from an empty state.

  Rows are padded on the right: nothing causal sees what comes later, and the
  state is that behind the last token of each row, so a row's numbers are those
  it has alone. (On the left, padding would take cache slots and a mask.)

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, T) int32; what stands behind a row's length does not matter.
    lengths: (B,) int32, 1 to T.
    cache_size: tokens that a key/value cache has room for, at least T.

  Returns:
    Hidden states (B, T, D) after the final norm, arbitrary where there is
    padding, and the state.
  """
  if isinstance(config, MambaConfig):
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return mamba.prefill(
      config,
      params,
      tokens,
      cache_size=cache_size,
      segment_ids=jnp.where(steps < lengths[:, None], 0, -1),
    )
  hidden, cache = transformer.prefill(
    config, params, tokens, cache_size=cache_size
  )
  # The slots of padding are written over before a mask lets them be seen.
  return hidden, dataclasses.replace(cache, length=lengths)


def append(
  config: Config, params: Params, tokens: jax.Array, state: State
) -> tuple[jax.Array, State]:
  """Reads `tokens` (B, T), one or several, behind those of `state`.

  Returns:
    Float32 logits (B, T, V) and the new state.
  """
  model = mamba if isinstance(config, MambaConfig) else transformer
  return model.decode(config, params, tokens, state)


def logits(config: Config, params: Params, hidden: jax.Array) -> jax.Array:
  """Maps hidden states (..., D) to float32 logits (..., V)."""
  model = mamba if isinstance(config, MambaConfig) else transformer
  return model.bind(config, params).logits(hidden)
