"""`ssd` on several devices: by rows, by heads, and by parts of a row.

A part is scanned from an empty state; what the state in front of it adds is one
product more, since it decays by factors of the tokens alone.
"""

import jax
import jax.numpy as jnp

from ops import passed_states, segments, sharding
from ops.ssd import api

_STATE = ("batch", "heads", None, None)


def ssd(op, arrays, *, dt_softplus, return_final_state, **options):
  """`ssd` under a mesh.

  Args:
    op: the public `ssd`.
    arrays: by the names of its arguments, None where not given.
    dt_softplus: as there.
    return_final_state: as there.
    **options: other options of it.
  """
  heads, groups = arrays["x"].shape[2], arrays["B"].shape[2]
  of_groups = "heads" if groups > 1 else None
  whole = groups > 1 and not sharding.is_cut("heads", heads, groups)
  heads = None if whole else "heads"
  rows = ("batch", "length", heads, None)
  of_row = ("batch", "length", None if whole else of_groups, None)
  dims = {
    "x": rows,
    "dt": rows[:3],
    "A": (heads,),
    "B": of_row,
    "C": of_row,
    "D": (heads, None) if _ndim(arrays["D"]) == 2 else (heads,),
    "z": rows,
    "dt_bias": (heads,),
    "initial_state": ("batch", heads, None, None),
    "segment_ids": rows[:2],
  }
  options |= {"dt_softplus": dt_softplus}
  y, state = passed_states.scan(op, _part, arrays, dims, options)
  return (y, state) if return_final_state else y


def _ndim(x):
  return None if x is None else x.ndim


def _part(
  op, options, *, x, dt, A, B, C, z, initial_state, resets, segment_ids, **more
):
  y, own = op(x, dt, A, B, C, segment_ids=segment_ids, **more, **options)
  steps = segments.zero_padding(dt, segment_ids).astype(jnp.float32)
  steps = api.activate(steps, more["dt_bias"], options["dt_softplus"])
  steps, C = (segments.zero_padding(v, segment_ids) for v in (steps, C))
  log_decay = jnp.maximum(steps * A.astype(jnp.float32)[None, None], api.FORGET)
  if resets is not None:
    log_decay = jnp.where(resets[:, :, None], api.FORGET, log_decay)
  decays = jnp.cumsum(log_decay, axis=1)
  first = None if initial_state is None else initial_state.astype(jnp.float32)
  before, state = passed_states.states_before(decays[:, -1], own, first)
  b, length, groups, size = C.shape
  read = jnp.einsum(
    "blgn,bgrpn->blgrp",
    C.astype(x.dtype),
    before.reshape(b, groups, -1, *before.shape[2:]).astype(x.dtype),
    preferred_element_type=jnp.float32,
  )
  y = y.astype(jnp.float32) + jnp.exp(decays)[..., None] * read.reshape(y.shape)
  if z is not None:
    y = y * jax.nn.silu(z.astype(jnp.float32))
  return y.astype(x.dtype), state
