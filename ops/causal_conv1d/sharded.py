"""`causal_conv1d` on several devices: by rows, channels, and parts of a row.

A part sees the last K - 1 inputs of the one before it.
"""

import functools

import jax

from ops import passed_states, segments, sharding


def causal_conv1d(op, arrays, *, return_final_state, **options):
  """`causal_conv1d` under a mesh.

  Rows that come with a state, or whose last state is wanted, stay whole.

  Args:
    op: the public `causal_conv1d`.
    arrays: by the names of its arguments, None where not given.
    return_final_state: as there.
    **options: other options of it.
  """
  x, taps = arrays["x"], arrays["weight"].shape[1]
  parts = sharding.sizes().get(sharding.SEQUENCE, 1)
  cuts = (
    sharding.is_cut("length", x.shape[1])
    and arrays["initial_state"] is None
    and not return_final_state
    and x.shape[1] // parts >= taps - 1
  )
  rows = ("batch", "length" if cuts else None, "heads")
  state = ("batch", None, "heads")
  dims = {
    "x": rows,
    "weight": ("heads", None),
    "bias": ("heads",),
    "initial_state": state,
    "segment_ids": rows[:2],
  }
  out = rows
  if return_final_state:
    options |= {"return_final_state": True}
    out = (rows, state)
  run = functools.partial(_whole, op, options)
  if cuts:
    run = functools.partial(_part, op, options)
    dims["resets"], arrays = rows[:2], arrays | {"resets": None}
    if arrays["segment_ids"] is not None:
      arrays["resets"] = segments.resets(arrays["segment_ids"])
  return sharding.over_devices(run, arrays, dims, out)


def _whole(op, options, *, x, weight, bias, **arrays):
  return op(x, weight, bias, **arrays, **options)


def _part(op, options, *, x, weight, bias, resets, segment_ids, **_):
  own = {"segment_ids": segment_ids}
  # Of this call the last inputs alone are used, so nothing is convolved.
  last = op(x, weight, bias, return_final_state=True, **own, **options)[1]
  parts = jax.lax.axis_size(sharding.SEQUENCE)
  # The first device gets zeros, which are what stands in front of a row.
  state = jax.lax.ppermute(
    last, sharding.SEQUENCE, [(i, i + 1) for i in range(parts - 1)]
  )
  state = passed_states.kept(state, passed_states.goes_on(segment_ids, resets))
  return op(x, weight, bias, initial_state=state, **own, **options)
