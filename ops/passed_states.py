"""States that go from one device to the next, where a row is cut in parts.

A part maps the state in front of it to the one behind it by h' = a h + s, where
a are the decays of all its tokens and s is what the part alone, from an empty
state, comes to. One gather of all (a, s) tells every device its state.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ops import segments, sharding


def scan(
  op: Callable[..., tuple[jax.Array, jax.Array]],
  part: Callable[..., tuple[jax.Array, jax.Array]],
  arrays: Mapping[str, jax.Array | None],
  dims: Mapping[str, tuple[str | None, ...]],
  options: Mapping[str, Any],
) -> tuple[jax.Array, jax.Array]:
  """Runs a scan under a mesh, which may cut rows, channels and tokens.

  Args:
    op: the public op, for devices that hold whole rows.
    part: for a part of each row: takes op, its options, and arrays by name,
      `resets` among them, which are `ops.segments.resets` of whole rows.
    arrays: arguments by name, x (B, L, ...) among them; None where not given.
    dims: logical names of their axes.
    options: of the op, without `return_final_state`.

  Returns:
    y (B, L, ...) like x, and the last state (B, ...) float32.
  """
  options = {**options, "return_final_state": True}
  dims, arrays = dict(dims), dict(arrays)
  run = functools.partial(_whole, op, options)
  if sharding.is_cut("length", arrays["x"].shape[1]):
    run = functools.partial(part, op, options)
    ids = arrays["segment_ids"]
    dims["resets"] = dims["segment_ids"]
    arrays["resets"] = None if ids is None else segments.resets(ids)
  results = dims["x"], dims["initial_state"]
  return sharding.over_devices(run, arrays, dims, results)


def _whole(op, options, *, x, dt, A, B, C, **arrays):
  return op(x, dt, A, B, C, **arrays, **options)


def states_before(
  log_decay: jax.Array, own: jax.Array, first: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """The state in front of a device's part of a row, and that behind the row.

  Args:
    log_decay: log a, float32, at most 0, of a shape that broadcasts to `own`
      when axes are added behind it.
    own: s, (B, ...) float32.
    first: state in front of the row, (B, ...), or None.

  Returns:
    Both like `own`; the second is the same on all devices.
  """
  log_decay = jnp.broadcast_to(
    log_decay.reshape(log_decay.shape + (1,) * (own.ndim - log_decay.ndim)),
    (*own.shape[:-1], log_decay.shape[-1] if log_decay.ndim == own.ndim else 1),
  )
  both = jnp.concatenate([own, log_decay], axis=-1)
  both = jax.lax.all_gather(both, sharding.SEQUENCE)
  place = jax.lax.axis_index(sharding.SEQUENCE)
  state = jnp.zeros_like(own) if first is None else first
  before = state
  for part in range(both.shape[0]):
    before = jnp.where(place == part, state, before)
    added, decay = jnp.split(both[part], [own.shape[-1]], axis=-1)
    state = jnp.exp(decay) * state + added
  return before, state


def goes_on(segment_ids: jax.Array | None, resets: jax.Array | None):
  """Whether a part's first token goes on from the part before it, (B,).

  Args:
    segment_ids: (B, l) of the part, or None.
    resets: (B, l) of the part, `ops.segments.resets` of the whole row.
  """
  if segment_ids is None:
    return None
  first = jnp.argmax(~segments.is_padding(segment_ids), axis=1)
  return ~jnp.take_along_axis(resets, first[:, None], axis=1, mode="clip")[:, 0]


def kept(state: jax.Array, goes_on: jax.Array | None) -> jax.Array:
  """The state (B, ...), zero in rows that do not go on from it."""
  if goes_on is None:
    return state
  shape = (-1, *(1,) * (state.ndim - 1))
  return jnp.where(goes_on.reshape(shape), state, jnp.zeros((), state.dtype))
