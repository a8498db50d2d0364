"""The GPU kernels of the selective scan, interpreted and lowered on a CPU."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops.selective_scan import (
  api,
  mosaic_gpu,
  mosaic_gpu_tile,
  selective_scan,
  selective_scan_reference,
)
from ops.selective_scan.mosaic_gpu import BackwardConfig, Config, ForwardConfig
from tests.hopper_lowering import lowered
from tests.ops import sequence_op
from tests.ops.sequence_op import ACTIVATIONS, assert_close, tolerance

STATE = 16
SMALL = Config(
  ForwardConfig(tile=16, unroll=4, polynomial=1),
  BackwardConfig(unroll=4, flush=4),
)
# Padding in front, between and behind, a segment of one token.
IDS = [[-1] * 2 + [3] * 3 + [-1] + [3] + [7] + [4] * 4 + [-1]]


def make(seed, batch, length, channels=32, groups=1, size=STATE):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  return {
    "x": normal(batch, length, channels),
    "dt": normal(batch, length, channels),
    "A": -np.exp(normal(channels, size)),
    "B": normal(batch, length, groups, size),
    "C": normal(batch, length, groups, size),
    "D": normal(channels),
    "z": normal(batch, length, channels),
    "dt_bias": normal(channels),
    "initial_state": normal(batch, channels, size),
  }


def kernels(config):
  """The op by the GPU kernels."""

  def op(x, dt, A, B, C, *, segment_ids, return_final_state, **options):
    assert return_final_state
    names = ("D", "z", "dt_bias", "initial_state")
    arrays = (x, dt, A, B, C, *(options.get(name) for name in names))
    scan = functools.partial(mosaic_gpu.selective_scan, config=config)
    return api.apply(
      scan, arrays, segment_ids, dt_softplus=options["dt_softplus"]
    )

  return op


def compare(case, dtype, config, length, ids=None, extreme=False, **sizes):
  """Results and gradients against the recurrence in float64."""
  build = functools.partial(make, **sizes)
  exact, _ = sequence_op.make_case(build, case, dtype, 1, length)
  if extreme:
    exact["dt"][:, ::3], exact["A"][::2] = 100.0, -100.0
  ids = None if ids is None else jnp.asarray(ids, jnp.int32)
  arrays = {
    name: jnp.asarray(x, dtype if name in ACTIVATIONS else "float32")
    for name, x in exact.items()
  }
  rng = np.random.default_rng(7)
  dy = jnp.asarray(rng.normal(size=exact["x"].shape), dtype)
  dstate = jnp.asarray(rng.normal(size=(1, *exact["A"].shape)), "float32")
  # Most of the time goes into compiling the interpreter.
  pull = jax.jit(
    functools.partial(sequence_op.pull, kernels(config)),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    found, gradients = pull(arrays, ids, (dy, dstate))
  with jax.enable_x64(True):
    expected, expected_gradients = jax.jit(
      functools.partial(sequence_op.pull, sequence_op.scan_oracle)
    )(
      {name: jnp.asarray(exact[name]) for name in arrays},
      ids,
      (dy.astype("float64"), dstate.astype("float64")),
    )
  bound = tolerance(dtype, length * STATE)
  assert_close(found, expected, bound, case)
  assert_close(gradients, expected_gradients, bound, case)
  assert found[0].dtype == dtype and found[1].dtype == jnp.float32
  for name, gradient in gradients.items():
    assert gradient.dtype == arrays[name].dtype, name


def test_packed_padded_groups_and_odd_length():
  compare("full", "float32", SMALL, 13, IDS, channels=64, groups=2)


def test_blocks_of_64_channels_bfloat16():
  # Both states are saved inside of the forward kernel's one tile.
  config = Config(ForwardConfig(channels=64), BackwardConfig(channels=64))
  compare("full", "bfloat16", config, 32, channels=64)


def test_channels_and_states_that_fill_no_block():
  compare("full", "float32", SMALL, 13, IDS, channels=40, groups=2, size=12)


def test_extreme_steps_by_polynomials_without_options():
  forward = dataclasses.replace(SMALL.forward, polynomial=4)
  compare("bare", "float32", Config(forward, SMALL.backward), 32, extreme=True)


@pytest.mark.parametrize("low", [-1, -30, -126])
def test_exp2_polynomial(low):
  x = np.linspace(low, 0, 4001).astype(np.float32)
  found = np.asarray(mosaic_gpu_tile.exp2(jnp.asarray(x), polynomial=True))
  np.testing.assert_allclose(found, np.exp2(x.astype(np.float64)), rtol=5e-7)
  far = jnp.asarray([-1e3, -1e30, -np.inf], jnp.float32)
  assert np.all(mosaic_gpu_tile.exp2(far, polynomial=True) < 2e-38)


def test_softplus_and_sigmoid():
  x = np.linspace(-80, 120, 4001).astype(np.float32)
  wide = x.astype(np.float64)
  found = np.asarray(mosaic_gpu_tile.softplus(jnp.asarray(x)))
  # exp2 of a rounded product: 80 log2(e) has an error of 2^-18 in the exponent.
  np.testing.assert_allclose(found, np.logaddexp(0, wide), rtol=8e-6)
  found = np.asarray(mosaic_gpu_tile.sigmoid(jnp.asarray(x)))
  np.testing.assert_allclose(found, np.exp(-np.logaddexp(0, -wide)), rtol=8e-6)


def shapes(batch, length, channels, size=STATE, dtype="bfloat16"):
  return {
    name: jax.ShapeDtypeStruct(
      value.shape, dtype if name in ACTIVATIONS else "float32"
    )
    for name, value in make(0, batch, length, channels, size=size).items()
  }


@pytest.mark.parametrize(
  "shape, packed", [((8, 200, 1536), True), ((8, 64, 4096), False)]
)
def test_lowers_for_hopper(shape, packed):
  def run(marks, *arrays):
    scan = lambda *arrays: mosaic_gpu.selective_scan(
      *arrays, marks, dt_softplus=True
    )
    results, pullback = jax.vjp(scan, *arrays)
    return results, pullback(results)

  marks = jax.ShapeDtypeStruct(shape[:2], "int32") if packed else None
  text = lowered(run, marks, *shapes(*shape).values())
  assert text.count("custom_call @mosaic_gpu_v2") == 2
  for name in ("selective_scan_fwd", "selective_scan_bwd"):
    assert name in text


def test_vmap_and_eight_states_lower():
  def scan(x, dt, A, B, C):
    arguments = (x, dt, A, B, C, None, None, None, None, None)
    return mosaic_gpu.selective_scan(*arguments, dt_softplus=False)

  arrays = list(shapes(2, 64, 64, size=8).values())[:5]
  arrays[0] = jax.ShapeDtypeStruct((3, *arrays[0].shape), "bfloat16")
  text = lowered(jax.vmap(scan, in_axes=(0, None, None, None, None)), *arrays)
  assert text.count("custom_call @mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
  "size, channels, unroll, flush",
  [(8, 64, 4, 4), (16, 32, 4, 4), (16, 64, 8, 4), (32, 32, 8, 8)],
)
def test_layouts_of_other_configs_lower(size, channels, unroll, flush):
  config = Config(
    ForwardConfig(channels=channels, tile=16, unroll=unroll),
    BackwardConfig(channels=channels, unroll=unroll, flush=flush),
  )

  def run(*arrays):
    scan = lambda *arrays: mosaic_gpu.selective_scan(
      *arrays, None, dt_softplus=True, config=config
    )
    results, pullback = jax.vjp(scan, *arrays)
    return results, pullback(results)

  text = lowered(run, *shapes(2, 32, 64, size=size).values())
  assert text.count("custom_call @mosaic_gpu_v2") == 2


def test_config_fills_the_chip():
  choose = mosaic_gpu.choose_config
  assert choose(8, 1536, 1, STATE).forward.channels == 32
  assert choose(8, 4096, 1, STATE).forward.channels == 64
  assert choose(64, 4096, 128, STATE).forward.channels == 32
  eight = choose(1, 64, 1, 8)
  assert eight.forward.channels == eight.backward.channels == 64


def test_unsupported_shapes_have_reasons():
  def reason(channels=64, size=STATE, groups=1, **dtypes):
    arrays = make(0, 1, 4, channels, groups, size)
    arrays = {
      name: jax.ShapeDtypeStruct(a.shape, dtypes.get(name, "float32"))
      for name, a in arrays.items()
    }
    return mosaic_gpu.unsupported_shapes(*arrays.values())

  assert reason() is None
  assert "33 states a channel, more than 32" in reason(size=33)
  # Zeros fill up channels and states.
  assert reason(size=12) is None
  assert reason(channels=96, groups=2) is None
  assert reason(32, size=8) is None
  assert "z is float16" in reason(z="float16")


def test_needs_a_hopper_gpu():
  assert "needs an NVIDIA GPU" in mosaic_gpu.supports()
  arrays = [jnp.asarray(a, "float32") for a in make(0, 1, 4).values()][:5]
  with pytest.raises(ValueError, match="'mosaic_gpu' does not run here"):
    selective_scan(*arrays, implementation="mosaic_gpu")
  assert selective_scan_reference(*arrays).shape == (1, 4, 32)
