"""The device's half of decoding: one call begins, then each makes some steps.

The loop knows no method. What a batch draws stays on the device, and its state
is donated, so a call moves some integers to the host and no cache. A call is
compiled once for a batch shape.
Shapes by axis letter: B batch, T tokens of a prompt, S steps of a call,
M tokens of a step.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Stands for a token where the logits are NaN or infinite.
BROKEN = -1


class Method(Protocol):
  """How tokens are found: a frozen dataclass, as it is static under `jit`.

  A step gives each row the next `accepted` >= 1 of its M tokens: one where
  tokens are drawn in turn, several where some are guessed and tested, or a
  block. `params` are those of all models that the method needs. The state is a
  pytree of its own, in which no row depends on another: keys and values,
  recurrent states behind the accepted tokens, keys of random draws.

  Attributes:
    width: M, the same for all steps.
  """

  width: int

  def begin(
    self,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    cache_size: int,
  ) -> tuple[jax.Array, jax.Array, Any]:
    """Reads prompts and makes the first step.

    Args:
      params: of the method's models.
      tokens: (B, T) int32 prompts, padded on the right.
      lengths: (B,) int32, 1 to T.
      keys: (B,) keys, one a row, or one () for the whole batch.
      cache_size: prompt and continuation together have at most so many tokens.

    Returns:
      The same as `step`.
    """
    ...

  def step(self, params: Any, state: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Finds the next tokens of every row.

    Returns:
      Tokens (B, M) int32, `BROKEN` where logits are not finite; how many of
      them count (B,) int32, 1 to M; and the new state.
    """
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """A batch in the midst of being continued.

  Attributes:
    state: of the method.
    done: (B,) bool, rows that had an end token; nothing of them counts.
  """

  state: Any
  done: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What some steps found.

  Attributes:
    tokens: (B, S, M) int32.
    accepted: (B, S) int32, how many of them count, 0 to M.
  """

  tokens: jax.Array
  accepted: jax.Array

  def rows(self) -> list[np.ndarray]:
    """The tokens that count, (n,) of each row; waits for the device."""
    tokens, accepted = jax.device_get((self.tokens, self.accepted))
    counts = np.arange(tokens.shape[-1]) < accepted[..., None]
    return [row[which] for row, which in zip(tokens, counts, strict=True)]


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("cache_size", "end_ids")
)
def begin(
  method: Method,
  params: Any,
  tokens: jax.Array,
  lengths: jax.Array,
  keys: jax.Array,
  *,
  cache_size: int,
  end_ids: tuple[int, ...] = (),
) -> tuple[Batch, Found]:
  """Reads the prompts and makes the first step of each.

  Args:
    method: how tokens are found.
    params: of the method's models.
    tokens: (B, T) int32 prompts, padded on the right.
    lengths: (B,) int32, 1 to T.
    keys: (B,) keys, one a row, or one () for the whole batch.
    cache_size: prompt and continuation together have at most so many tokens.
    end_ids: tokens after which a row is done.

  Returns:
    The batch, and the tokens found (S = 1).
  """
  *found, state = method.begin(
    params, tokens, lengths, keys, cache_size=cache_size
  )
  batch = Batch(state=state, done=jnp.zeros(len(tokens), bool))
  batch, found = _taken(batch, *found, end_ids)
  return batch, jax.tree.map(lambda x: x[:, None], found)


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("steps", "end_ids"),
  donate_argnums=2,
)
def advance(
  method: Method,
  params: Any,
  batch: Batch,
  *,
  steps: int,
  end_ids: tuple[int, ...] = (),
) -> tuple[Batch, Found]:
  """Makes `steps` more steps of every row; takes the memory of `batch`.

  Returns:
    The batch, and the tokens found (S = `steps`).
  """

  def step(batch: Batch, _):
    *found, state = method.step(params, batch.state)
    return _taken(dataclasses.replace(batch, state=state), *found, end_ids)

  batch, found = jax.lax.scan(step, batch, length=steps)
  return batch, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def _taken(
  batch: Batch, tokens: jax.Array, accepted: jax.Array, end_ids: tuple[int, ...]
) -> tuple[Batch, Found]:
  """Counts tokens (B, M) up to the first end of a row, and none behind it."""
  places = jnp.arange(tokens.shape[1])[None]
  ends = jnp.zeros(tokens.shape, bool)
  if end_ids:
    ends = jnp.isin(tokens, jnp.asarray(end_ids, jnp.int32))
    ends &= places < accepted[:, None]
  ended = ends.any(axis=1)
  accepted = jnp.where(ended, ends.argmax(axis=1) + 1, accepted)
  accepted = jnp.where(batch.done, 0, accepted).astype(jnp.int32)
  batch = dataclasses.replace(batch, done=batch.done | ended)
  return batch, Found(tokens=tokens, accepted=accepted)
