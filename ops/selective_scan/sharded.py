"""`selective_scan` on several devices: by rows, channels, and parts of a row.

A part is scanned twice: from an empty state, of which the last state alone is
wanted, and from the state in front of it. Its decays differ between states of a
channel, so that adding what that state gives would cost no less.
"""

import jax.numpy as jnp

from ops import passed_states, segments, sharding
from ops.ssd.api import activate

# A log decay behind which nothing is left.
_FORGET = -1e4


def selective_scan(op, arrays, *, dt_softplus, return_final_state, **options):
  """`selective_scan` under a mesh; arguments as of `ops.ssd.sharded.ssd`."""
  channels, groups = arrays["x"].shape[2], arrays["B"].shape[2]
  whole = groups > 1 and not sharding.is_cut("heads", channels, groups)
  heads = None if whole else "heads"
  rows = ("batch", "length", heads)
  of_row = ("batch", "length", heads if groups > 1 else None, None)
  dims = {
    "x": rows,
    "dt": rows,
    "A": (heads, None),
    "B": of_row,
    "C": of_row,
    "D": (heads,),
    "z": rows,
    "dt_bias": (heads,),
    "initial_state": ("batch", heads, None),
    "segment_ids": rows[:2],
  }
  options |= {"dt_softplus": dt_softplus}
  y, state = passed_states.scan(op, _part, arrays, dims, options)
  return (y, state) if return_final_state else y


def _part(op, options, *, x, dt, A, B, C, D, z, initial_state, resets, **more):
  ids = more["segment_ids"]
  _, own = op(x, dt, A, B, C, **more, **options)
  steps = segments.zero_padding(dt, ids).astype(jnp.float32)
  steps = activate(steps, more["dt_bias"], options["dt_softplus"])
  steps = segments.zero_padding(steps, ids).sum(1)
  log_decay = steps[..., None] * A.astype(jnp.float32)[None]
  if resets is not None:
    log_decay += jnp.where(resets.any(1), _FORGET, 0.0)[:, None, None]
  first = None if initial_state is None else initial_state.astype(jnp.float32)
  before, state = passed_states.states_before(log_decay, own, first)
  before = passed_states.kept(before, passed_states.goes_on(ids, resets))
  y, _ = op(x, dt, A, B, C, D=D, z=z, initial_state=before, **more, **options)
  return y, state
