import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ops import dispatch
from ops.causal_conv1d import (
  api,
  causal_conv1d,
  causal_conv1d_reference,
  causal_conv1d_step,
  mosaic_tpu,
  xla,
)

IMPLEMENTATIONS = ("xla", "mosaic_tpu")
# Padding at both ends and between segments, an id that comes back, segments
# shorter than the taps, a row of padding alone.
IDS = [
  [-1, -1, 4, 4, 4, 4, 4, -1, 9, 9, -1],
  [5, 5, 6, 5, 5, 5, 5, 5, 5, 5, 5],
  [-1] * 11,
  [-1, -1, -1, -1, -1, -1, -1, 2, 3, 3, -1],
]
SEGMENTS = np.asarray(IDS, np.int32)
BATCH, LENGTH = SEGMENTS.shape


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
  """Every implementation by its name; kernels are interpreted."""
  interpreted = functools.partial(mosaic_tpu.convolve, interpret=True)
  monkeypatch.setattr(mosaic_tpu, "convolve", interpreted)
  everywhere = dict.fromkeys(IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)
  return request.param


def reference(arrays, segment_ids, **options):
  return causal_conv1d_reference(
    **arrays, segment_ids=segment_ids, return_final_state=True, **options
  )


def make(taps=4, channels=6, dtype="float32", length=LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  arrays = {
    "x": draw(BATCH, length, channels),
    "weight": draw(channels, taps).astype("float32"),
    "bias": draw(channels).astype("float32"),
    "initial_state": draw(BATCH, taps - 1, channels),
  }
  cotangents = draw(BATCH, length, channels), draw(BATCH, taps - 1, channels)
  return arrays, cotangents


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def convolve(arrays, segment_ids, **options):
  return causal_conv1d(
    **arrays, segment_ids=segment_ids, return_final_state=True, **options
  )


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def both(arrays, segment_ids, cotangents, **options):
  """(y, final state) and gradients; one compilation for the two."""
  run = lambda some: convolve(some, segment_ids, **options)
  values, pull = jax.vjp(run, arrays)
  return values, pull(cotangents)[0]


def sources(segment_ids, shape, taps):
  """Where token t's tap k and the final state read [zero, state, x]."""
  batch, length = shape
  reads = np.zeros((batch, length, taps), int)
  state = np.tile(np.arange(1, taps), (batch, 1))
  for b in range(batch):
    segment = None
    for t in range(length):
      if segment_ids is not None:
        if segment_ids[b, t] < 0:
          continue
        if segment not in (None, segment_ids[b, t]):
          state[b] = 0
        segment = segment_ids[b, t]
      reads[b, t] = [*state[b], taps + t]
      state[b] = reads[b, t, 1:]
  return reads, state


def oracle_gradients(arrays, segment_ids, cotangents, activation):
  """In float64, by reading each tap from where the specification says."""
  x, weight, bias, state = (np.asarray(a, np.float64) for a in arrays.values())
  dpre, dlast = (np.asarray(c, np.float64) for c in cotangents)
  reads, last = sources(segment_ids, x.shape[:2], weight.shape[1])
  inputs = np.concatenate([np.zeros_like(x[:, :1]), state, x], axis=1)
  rows = np.arange(x.shape[0])[:, None]
  windows = inputs[rows[..., None], reads]
  if activation == "silu":
    pre = np.einsum("btkd,dk->btd", windows, weight) + bias
    gate = 1 / (1 + np.exp(-pre))
    dpre = dpre * gate * (1 + pre * (1 - gate))
  if segment_ids is not None:
    dpre = np.where(segment_ids[..., None] < 0, 0.0, dpre)
  dinputs = np.zeros_like(inputs)
  np.add.at(dinputs, (rows, last), dlast)
  np.add.at(
    dinputs, (rows[..., None], reads), dpre[:, :, None] * weight.T[None, None]
  )
  return {
    "x": dinputs[:, weight.shape[1] :],
    "weight": np.einsum("btkd,btd->dk", windows, dpre),
    "bias": dpre.sum((0, 1)),
    "initial_state": dinputs[:, 1 : weight.shape[1]],
  }


def assert_close(found, expected, dtype, length):
  """`length` products summed in float32, then rounded to `dtype`."""
  epsilon = float(jnp.finfo(jnp.dtype(dtype)).eps)
  scale = 4 * 2.0**-23 * np.sqrt(length) + epsilon
  tolerance = scale * max(1.0, np.abs(expected).max(initial=0.0))
  found = np.asarray(found, np.float64)
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


CASES = {
  "dense": ("bfloat16", "silu", False),
  "packed": ("float32", "silu", True),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_float64(case, implementation):
  dtype, activation, packed = CASES[case]
  arrays, cotangents = make(dtype=dtype)
  ids = SEGMENTS if packed else None
  options = {"activation": activation}
  (y, state), gradients = both(
    arrays, ids, cotangents, **options, implementation=implementation
  )
  assert y.dtype == state.dtype == dtype
  expected, last = reference(arrays, ids, **options)
  assert_close(y, expected, dtype, 4)
  np.testing.assert_array_equal(np.asarray(state, np.float64), last)
  expected = oracle_gradients(arrays, ids, cotangents, activation)
  assert gradients.keys() == expected.keys()
  for name, gradient in gradients.items():
    assert gradient.dtype == arrays[name].dtype
    assert_close(gradient, expected[name], gradient.dtype, BATCH * LENGTH)


@pytest.mark.parametrize("taps, length", [(1, 5), (2, 1), (7, 1), (7, 5)])
def test_any_taps_and_lengths(taps, length):
  arrays, cotangents = make(taps=taps, channels=3, length=length)
  ids = SEGMENTS[:, :length]
  (y, state), gradients = both(arrays, ids, cotangents)
  expected, last = reference(arrays, ids)
  assert_close(y, expected, "float32", taps)
  np.testing.assert_array_equal(np.asarray(state, np.float64), last)
  expected = oracle_gradients(arrays, ids, cotangents, None)
  for name, gradient in gradients.items():
    assert_close(gradient, expected[name], "float32", BATCH * length)


def test_kernel_over_many_blocks(monkeypatch):
  """Halos, ragged ends of tokens and channels, and sums over blocks."""
  small = mosaic_tpu.Config(length=128, channels=128)
  monkeypatch.setattr(mosaic_tpu, "_config", lambda *sizes: small)
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, weight, bias, state = draw(1, 270, 130), draw(130, 4), draw(130), None
  reach = rng.integers(-1, 4, size=(1, 270)).astype(np.int32)
  dy = draw(*x.shape)

  def run(convolve):
    y, pull = jax.vjp(lambda *a: convolve(*a, state, reach), x, weight, bias)
    return y, *pull(dy)

  found = run(lambda *a: mosaic_tpu.convolve(*a, True, True))
  expected = run(lambda *a: xla.convolve(*a, True))
  for value, wanted in zip(found, expected):
    assert_close(value, wanted, "float32", 270)


def test_split_equals_whole(implementation):
  arrays, _ = make()
  run = functools.partial(
    convolve, activation="silu", implementation=implementation
  )
  whole, last = run(arrays, None)
  first, state = run(arrays | {"x": arrays["x"][:, :4]}, None)
  rest = {"x": arrays["x"][:, 4:], "initial_state": state}
  second, end = run(arrays | rest, None)
  # Other lengths are other loops, in which products may be fused otherwise.
  assert_close(jnp.concatenate([first, second], 1), whole, "float32", 4)
  np.testing.assert_array_equal(end, last)


def test_packed_equals_separate(implementation):
  arrays, _ = make()
  run = functools.partial(
    convolve, activation="silu", implementation=implementation
  )
  ids = np.repeat(np.asarray([[0] * 4 + [1] * 7], np.int32), BATCH, axis=0)
  packed, last = run(arrays, ids)
  first, _ = run(arrays | {"x": arrays["x"][:, :4]}, None)
  fresh = {"initial_state": jnp.zeros_like(arrays["initial_state"])}
  second, end = run(arrays | fresh | {"x": arrays["x"][:, 4:]}, None)
  assert_close(jnp.concatenate([first, second], 1), packed, "float32", 4)
  np.testing.assert_array_equal(end, last)


def test_padding_may_hold_anything(implementation):
  arrays, cotangents = make()
  options = {"activation": "silu", "implementation": implementation}
  padding = (SEGMENTS < 0)[..., None]
  dirty = arrays | {"x": jnp.where(padding, jnp.nan, arrays["x"])}
  clean = arrays | {"x": jnp.where(padding, 0.0, arrays["x"])}
  found = both(dirty, SEGMENTS, cotangents, **options)
  wanted = both(clean, SEGMENTS, cotangents, **options)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert not np.any(np.where(padding, found[1]["x"], 0.0))


def test_without_bias_and_state(implementation):
  arrays, _ = make()
  bare = {"x": arrays["x"], "weight": arrays["weight"]}
  expected = causal_conv1d_reference(**bare, segment_ids=SEGMENTS)
  run = lambda some: causal_conv1d(
    **some, segment_ids=SEGMENTS, implementation=implementation
  )
  dy = jnp.ones_like(arrays["x"])
  both = jax.jit(lambda some: (run(some), jax.vjp(run, some)[1](dy)[0]))
  y, found = both(bare)
  assert_close(y, expected, "float32", 4)
  zeros = {
    "bias": jnp.zeros_like(arrays["bias"]),
    "initial_state": jnp.zeros_like(arrays["initial_state"]),
  }
  outer = dy, zeros["initial_state"]
  expected = oracle_gradients(bare | zeros, SEGMENTS, outer, None)
  for name, gradient in found.items():
    assert_close(gradient, expected[name], "float32", BATCH * LENGTH)


def test_vmap_and_remat(implementation):
  arrays, cotangents = make()
  options = {"activation": "silu", "implementation": implementation}
  several = jnp.stack([arrays["x"], 2 * arrays["x"]])

  @jax.jit
  @jax.vmap
  def mapped(x):
    run = lambda x: convolve(arrays | {"x": x}, SEGMENTS, **options)
    return jax.vjp(jax.checkpoint(run), x)[1](cotangents)[0]

  for x, gradient in zip(several, mapped(several)):
    _, single = both(arrays | {"x": x}, SEGMENTS, cotangents, **options)
    assert_close(gradient, single["x"], "float32", 4)


def test_sharded_equals_single():
  arrays, cotangents = make()
  mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)
  put = lambda value, *spec: jax.device_put(
    value, NamedSharding(mesh, PartitionSpec(*spec))
  )
  shards = {
    "x": put(arrays["x"], "data", None, "model"),
    "weight": put(arrays["weight"], "model"),
    "bias": put(arrays["bias"], "model"),
    "initial_state": put(arrays["initial_state"], "data", None, "model"),
  }
  ids = put(SEGMENTS, "data")
  options = {"activation": "silu", "implementation": "xla"}
  _, found = both(shards, ids, cotangents, **options)
  assert found["x"].sharding.spec == PartitionSpec("data", None, "model")
  _, expected = both(arrays, SEGMENTS, cotangents, **options)
  for name in found:
    assert_close(found[name], expected[name], "float32", BATCH * LENGTH)


@pytest.mark.parametrize("taps, tokens", [(1, 3), (4, 1), (4, 5)])
def test_steps_equal_the_sequence(taps, tokens):
  arrays, _ = make(taps=taps)
  x, weight, bias, state = arrays.values()
  whole, last = convolve(arrays, None, activation="silu")
  outputs = []
  for begin in range(0, LENGTH, tokens):
    some = x[:, begin : begin + tokens]
    y, states = causal_conv1d_step(
      *(some, weight, bias, state), activation="silu", return_all_states=True
    )
    again, state = causal_conv1d_step(
      *(some, weight, bias, state), activation="silu"
    )
    np.testing.assert_array_equal(y, again)
    assert states.shape == (BATCH, some.shape[1], taps - 1, 6)
    for t in range(some.shape[1]):
      _, expected = reference(arrays | {"x": x[:, : begin + t + 1]}, None)
      np.testing.assert_array_equal(np.asarray(states[:, t], float), expected)
    np.testing.assert_array_equal(states[:, -1], state)
    outputs.append(y)
  found = jnp.concatenate(outputs, 1)
  np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(state, last)


def test_a_step_keeps_the_dtype_of_its_state():
  arrays, _ = make(dtype="bfloat16")
  x, weight, bias, state = arrays.values()
  wide = state.astype(jnp.float32)
  y, new = causal_conv1d_step(x[:, :2], weight, bias, wide)
  assert (y.dtype, new.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("name", ["causal_conv1d_fwd", "causal_conv1d_bwd"])
def test_kernels_lower_for_tpus(name):
  arrays, cotangents = make()
  x, weight, bias, state = arrays.values()

  def run(x, weight, bias, state, ids, dy):
    call = lambda *a: mosaic_tpu.convolve(*a, ids, True)
    y, pull = jax.vjp(call, x, weight, bias, state)
    return y, pull(dy)

  lowered = jax.jit(run).trace(x, weight, bias, state, SEGMENTS, cotangents[0])
  text = lowered.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count(f'kernel_name = "{name}"') == 1


def test_the_kernel_says_why_not():
  reason = mosaic_tpu.supports()
  assert reason is None or "needs a TPU" in reason
  arrays, _ = make()
  if reason is not None:
    with pytest.raises(dispatch.UnsupportedError, match="needs a TPU"):
      causal_conv1d(arrays["x"], arrays["weight"], implementation="mosaic_tpu")


@pytest.mark.parametrize(
  "change, says",
  [
    ({"x": jnp.zeros((2, 6))}, "x is"),
    ({"x": jnp.zeros((BATCH, 0, 6))}, "no token"),
    ({"weight": jnp.zeros((5, 4))}, "weight is"),
    ({"bias": jnp.zeros((4,))}, "bias is"),
    ({"initial_state": jnp.zeros((BATCH, 4, 6))}, "state is"),
    ({"activation": "relu"}, "activation is 'relu'"),
    ({"segment_ids": jnp.zeros((BATCH, 3), jnp.int32)}, "segment_ids are"),
  ],
)
def test_bad_arguments_say_what_is_wrong(change, says):
  arrays, _ = make()
  with pytest.raises(ValueError, match=says) as error:
    causal_conv1d(**(arrays | change))
  assert "\n" not in str(error.value)
