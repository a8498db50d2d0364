"""One door to every language model of the house.

A model is a config and a nested dict of parameters. `FAMILIES` says which
module computes a config; nobody else asks. Each of these modules has the same
functions with the same signatures: `init`, `abstract_params`, `num_params`,
`bind`, `hidden_states`, `init_state`, `prefill` and `decode`; what `bind`
gives has `head` and `logits`. A model one layer at a time, for methods that
change one knowing what it reads, is `before_layers`, `layer` for each of
`layers_of`, `after_layers`. The state between calls (keys and values,
recurrent states) is a pytree of the model's own, passed in and returned.

Shapes by axis letter: B batch, T tokens, D width, V vocabulary.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp

from models import attamba, mamba, module, transformer
from models.attamba_config import AttambaConfig
from models.caches.paged import PageBudget
from models.errors import InputError
from models.implementations import Implementations
from models.mamba_config import MambaConfig
from models.state_format import StateFormat
from models.transformer_config import TransformerConfig

FAMILIES = types.MappingProxyType(
  {
    TransformerConfig: transformer,
    MambaConfig: mamba,
    AttambaConfig: attamba,
  }
)
Config = TransformerConfig | MambaConfig | AttambaConfig
Params = module.Params
State = transformer.TransformerState | mamba.MambaState | attamba.AttambaState


def module_of(config: Config) -> types.ModuleType:
  """The module that computes `config`."""
  return FAMILIES[type(config)]


def init(
  config: Config, key: jax.Array, param_dtype: str | None = None
) -> Params:
  """Random parameters, stacked layers on axis 0; float32 if not said."""
  return module_of(config).init(config, key, param_dtype)


def abstract_params(config: Config) -> Params:
  """The shapes and dtypes of `init`, without its arrays."""
  return module_of(config).abstract_params(config)


def num_params(config: Config) -> int:
  """Parameters of a model, a tied table counted once."""
  return module_of(config).num_params(config)


def hidden_states(
  config: Config, params: Params, tokens: jax.Array, **options: Any
) -> jax.Array:
  """Hidden states (B, T, D) of `tokens` (B, T) in one causal pass.

  Takes the options of `transformer.hidden_states`.
  """
  return module_of(config).hidden_states(config, params, tokens, **options)


def layers_may_differ(config: Config) -> bool:
  """Whether layers of one kind can lie in several stacks: `config.splits`."""
  return hasattr(config, "splits")


def layers_of(config: Config) -> tuple[module.Layer, ...]:
  """All layers of a model, in their order."""
  return module_of(config).layers_of(config)


def before_layers(config: Config, params: Params, tokens: jax.Array) -> Any:
  """What the first layer reads of `tokens` (B, T), a pytree."""
  return module_of(config).before_layers(config, params, tokens)


def layer(config: Config, params: Params, kind: str, stream: Any) -> Any:
  """Maps what one layer reads to what the next one does.

  Args:
    config: of the model.
    params: of this layer alone, see `layers_of`.
    kind: of the layer.
    stream: of `before_layers` or of the layer before.
  """
  return module_of(config).layer(config, params, kind, stream)


def after_layers(config: Config, params: Params, stream: Any) -> jax.Array:
  """Hidden states (B, T, D) of what the last layer gives."""
  return module_of(config).after_layers(config, params, stream)


def prefill(
  config: Config,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  cache_size: int,
  state_format: StateFormat | None = None,
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
    state_format: of recurrent states; None for the model's own.

  Returns:
    Hidden states (B, T, D) after the final norm, arbitrary where there is
    padding, and the state.

  Raises:
    InputError: the format does not fit the model.
  """
  return module_of(config).prefill(
    config,
    params,
    tokens,
    lengths=lengths,
    cache_size=cache_size,
    state_format=state_format,
  )


def init_state(
  config: Config,
  batch: int,
  *,
  cache_size: int,
  dtype: jnp.dtype,
  state_format: StateFormat | None = None,
  params: Params | None = None,
) -> State:
  """The state of `batch` rows that have read nothing.

  Args:
    config: of the model.
    batch: rows.
    cache_size: tokens that a key/value cache has room for.
    dtype: of the passes to come.
    state_format: of recurrent states; None for what `params` say, which is
      float32 where they are not given or say nothing.
    params: of the model.

  Raises:
    InputError: the format does not fit the model.
  """
  return module_of(config).init_state(
    config,
    batch,
    cache_size=cache_size,
    dtype=dtype,
    state_format=state_format,
    params=params,
  )


def with_pages(config: Config, state: State, budget: PageBudget) -> State:
  """The state with a cache of which tokens read the best pages alone.

  Args:
    config: of the model, a Transformer.
    state: of `prefill` or `init_state`.
    budget: of the tokens to come, one of each row at a time.

  Raises:
    InputError: the model or its cache has no pages.
  """
  if not isinstance(config, TransformerConfig):
    raise InputError(
      "pages are of a Transformer's cache, which this model has none of: leave "
      "them out"
    )
  return transformer.with_pages(config, state, budget)


def decode(
  config: Config,
  params: Params,
  tokens: jax.Array,
  state: State,
  *,
  implementations: Implementations | None = None,
) -> tuple[jax.Array, State]:
  """Reads `tokens` (B, T), one or several, behind those of `state`.

  Returns:
    Float32 logits (B, T, V) and the new state.
  """
  return module_of(config).decode(
    config, params, tokens, state, implementations=implementations
  )


def logits(config: Config, params: Params, hidden: jax.Array) -> jax.Array:
  """Maps hidden states (..., D) to float32 logits (..., V)."""
  return module_of(config).bind(config, params).logits(hidden)


def head(config: Config, params: Params) -> jax.Array:
  """The output matrix (padded V, D), as `ops.token_logprob` takes it."""
  return module_of(config).bind(config, params).head()


def forward(
  config: Config, params: Params, tokens: jax.Array, **options: Any
) -> jax.Array:
  """Float32 logits (B, T, V) of `tokens` (B, T) in one causal pass.

  Takes the options of `transformer.hidden_states`.
  """
  hidden = hidden_states(config, params, tokens, **options)
  return logits(config, params, hidden)
