import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.selective_scan import (
  api,
  mosaic_tpu,
  selective_scan,
  selective_scan_reference,
  selective_scan_step,
  tuning,
  xla,
)
from tests.ops import sequence_op
from tests.ops.sequence_op import ACTIVATIONS, SequenceOp, assert_close

CHANNELS, GROUPS, STATE = 256, 2, 5
# More than one chunk of every implementation, and an unfinished one.
LENGTH, CUTS = 133, (1, 67)


def make(seed, batch, length, channels=CHANNELS, groups=GROUPS):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  return {
    "x": normal(batch, length, channels),
    "dt": normal(batch, length, channels),
    "A": -np.exp(normal(channels, STATE)),
    "B": normal(batch, length, groups, STATE),
    "C": normal(batch, length, groups, STATE),
    "D": normal(channels),
    "z": normal(batch, length, channels),
    "dt_bias": normal(channels),
    "initial_state": normal(batch, channels, STATE),
  }


def by(scan, **options):
  """`selective_scan` by an implementation with options of its own."""
  scan = functools.partial(scan, **options)

  def op(
    x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False,
    initial_state=None, return_final_state=False, segment_ids=None,
  ):  # fmt: skip
    arrays = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    y, state = api.apply(scan, arrays, segment_ids, dt_softplus=dt_softplus)
    return (y, state) if return_final_state else y

  return op


def sequence(op, **options):
  return SequenceOp(
    op=op,
    reference=selective_scan_reference,
    oracle=sequence_op.scan_oracle,
    **{"make": make, "length": LENGTH, "cuts": CUTS, **options},
  )


OPS = {
  "xla": sequence(functools.partial(selective_scan, implementation="xla")),
  "associative": sequence(
    by(xla.selective_scan, config=tuning.XlaConfig(4, associative=True))
  ),
  "mosaic_tpu": sequence(
    by(
      mosaic_tpu.selective_scan,
      config=mosaic_tpu.Config(channels=128, unroll=1),
      interpret=True,
    ),
    partitions=False,
  ),
}
# These are about what all implementations share.
COMMON = {"check_oracle_is_the_reference", "check_eager_without_state"}
CHECKS = {
  "xla": sequence_op.CHECKS,
  "associative": ["check_gradients_packed_and_padded"],
  "mosaic_tpu": [name for name in sequence_op.CHECKS if name not in COMMON],
}


@pytest.mark.parametrize(
  "implementation, check",
  [(name, check) for name, checks in CHECKS.items() for check in checks],
)
def test_contract(implementation, check):
  getattr(OPS[implementation], check)()


def test_memory_is_of_chunks():
  """No array has an entry a token, channel and state, forward or backward."""
  batch, length, channels, size = 1, 4096, 64, 16
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  x, B = of(batch, length, channels), of(batch, length, 1, size)
  op = functools.partial(selective_scan, implementation="xla")

  def pull(*arrays):
    y, pullback = jax.vjp(op, *arrays)
    return pullback(y)

  compiled = jax.jit(pull).lower(x, x, of(channels, size), B, B).compile()
  whole = 4 * batch * length * channels * size
  assert compiled.memory_analysis().temp_size_in_bytes < whole / 2


def test_unrolled_scan_is_the_scan():
  arrays, _ = sequence(None, length=10).case("bare")
  config = tuning.XlaConfig(chunk_size=4, unroll=3)
  run = lambda arrays, config: by(xla.selective_scan, config=config)(*arrays)
  y = jax.jit(run, static_argnums=1)(tuple(arrays.values()), config)
  expected = selective_scan_reference(*arrays.values())
  assert_close(y, expected, OPS["xla"].tolerance())


def test_tpu_kernels_on_partial_blocks_of_channels():
  """Neither the channels nor the tokens fill their blocks."""
  op = sequence(None, make=functools.partial(make, channels=200, groups=1))
  arrays, ids = op.case("packed")
  cotangents = arrays["x"], arrays["initial_state"]
  config = mosaic_tpu.Config(channels=128, unroll=1)
  kernel = by(mosaic_tpu.selective_scan, config=config, interpret=True)
  found, expected = (
    jax.jit(functools.partial(sequence_op.pull, op))(arrays, ids, cotangents)
    for op in (kernel, by(xla.selective_scan))
  )
  assert_close(found, expected, op.tolerance())


@pytest.mark.parametrize(
  "tokens, dtype", [(1, "float32"), (3, "bfloat16"), (9, "float32")]
)
def test_steps_continue_a_sequence(tokens, dtype):
  op = sequence(None, make=functools.partial(make, channels=12), length=9)
  arrays, _ = op.case("full", dtype)
  exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
  y, _ = sequence_op.call(selective_scan_reference, exact, None)
  state, outputs, states = arrays.pop("initial_state"), [], []
  step = jax.jit(
    functools.partial(
      selective_scan_step, dt_softplus=True, return_all_states=True
    )
  )
  for start in range(0, 9, tokens):
    part = {
      name: x[:, start : start + tokens] if name in ACTIVATIONS else x
      for name, x in arrays.items()
    }
    out, after = step(state=state, **part)
    assert out.dtype == dtype and after.dtype == jnp.float32
    outputs.append(out)
    states.append(after)
    state = after[:, -1]
  assert_close(jnp.concatenate(outputs, 1), y, op.tolerance(dtype))
  for t, state in enumerate(jnp.concatenate(states, 1).swapaxes(0, 1)):
    part = {
      name: x[:, : t + 1] if name in ACTIVATIONS else x
      for name, x in exact.items()
    }
    _, expected = sequence_op.call(selective_scan_reference, part, None)
    assert_close(state, expected, op.tolerance(dtype), f"state {t}")


def test_last_state_is_the_last_of_all_states():
  arrays, _ = sequence(None, length=3).case("bare")
  state = jnp.ones((2, CHANNELS, STATE), jnp.bfloat16)
  y, states = selective_scan_step(
    *arrays.values(), state, return_all_states=True
  )
  same, last = selective_scan_step(*arrays.values(), state)
  np.testing.assert_array_equal(y, same)
  np.testing.assert_array_equal(states[:, -1], last)


WRONG = {
  "no_batch": ({"x": (8, 4)}, "not \\(B, L, D\\)"),
  "groups": ({"B": (1, 8, 3, 2), "C": (1, 8, 3, 2)}, "4 channels"),
  "empty": ({"x": (1, 0, 4)}, "has no tokens"),
  "dt": ({"dt": (1, 8, 1)}, "dt is \\(1, 8, 1\\)"),
  "A": ({"A": (4,)}, "A is \\(4,\\)"),
  "C": ({"C": (1, 8, 2, 2)}, "C is"),
  "D": ({"D": (1, 4)}, "D is"),
  "z": ({"z": (1, 4)}, "z is"),
  "dt_bias": ({"dt_bias": (1,)}, "dt_bias is"),
  "initial_state": ({"initial_state": (1, 2, 4)}, "state is"),
  "segment_ids": ({"segment_ids": (8,)}, "segment_ids"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_named(name):
  shapes = {
    "x": (1, 8, 4),
    "dt": (1, 8, 4),
    "A": (4, 2),
    "B": (1, 8, 1, 2),
    "C": (1, 8, 1, 2),
  }
  wrong, message = WRONG[name]
  with pytest.raises(ValueError, match=message) as found:
    selective_scan(**{k: jnp.zeros(s) for k, s in (shapes | wrong).items()})
  assert "\n" not in str(found.value)


def test_other_dtypes_are_refused():
  arrays, _ = sequence(None, length=1).case("bare")
  arrays["x"] = arrays["x"].astype(jnp.float16)
  with pytest.raises(ValueError, match="x is float16"):
    selective_scan(**arrays)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_kernels_say_what_they_need(implementation):
  arrays, _ = sequence(None, length=1).case("bare")
  with pytest.raises(ValueError, match="needs an? .*; usable: xla"):
    selective_scan(**arrays, implementation=implementation)


def test_tpu_kernels_say_which_shapes_they_need(monkeypatch):
  monkeypatch.setattr(mosaic_tpu.dispatch, "needs_tpu", lambda: None)
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

  def reason(channels, groups, size):
    x, B = of(1, 8, channels), of(1, 8, groups, size)
    return mosaic_tpu.supports(x, x, of(channels, size), B, B)

  assert reason(200, 1, 16) is None and reason(256, 2, 128) is None
  assert "channels a group" in reason(384, 2, 16)
  assert "N <= 128" in reason(128, 1, 129)


def test_tpu_blocks_fill_a_group():
  for channels, groups, size, wide in [
    (1536, 1, 16, 512),
    (640, 1, 16, 128),
    (200, 1, 16, 256),
    (1536, 2, 16, 384),
    (4096, 1, 64, 128),
    (4096, 1, 128, 128),
  ]:
    assert tuning.tpu_channels(channels, groups, size) == wide
