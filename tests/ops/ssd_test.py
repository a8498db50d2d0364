import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ops import dispatch
from ops.ssd import api, mosaic_tpu, ssd, ssd_reference, ssd_step, tuning, xla
from tests.ops import sequence_op
from tests.ops.sequence_op import SequenceOp, assert_close, tolerance

HEADS, CHANNELS, GROUPS, STATE = 4, 3, 2, 5


def make(seed, batch, length, channels=CHANNELS, state_size=STATE):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  return {
    "x": normal(batch, length, HEADS, channels),
    "dt": normal(batch, length, HEADS),
    "A": -np.exp(normal(HEADS)),
    "B": normal(batch, length, GROUPS, state_size),
    "C": normal(batch, length, GROUPS, state_size),
    "D": normal(HEADS, channels),
    "z": normal(batch, length, HEADS, channels),
    "dt_bias": normal(HEADS),
    "initial_state": normal(batch, HEADS, channels, state_size),
  }


OPS = {
  "xla": SequenceOp(
    op=functools.partial(ssd, chunk_size=16, implementation="xla"),
    reference=ssd_reference,
    oracle=sequence_op.ssd_oracle,
    make=make,
  ),
  "mosaic_tpu": SequenceOp(
    op=functools.partial(
      api.apply,
      functools.partial(mosaic_tpu.forward, interpret=True),
      chunk_size=16,
    ),
    reference=ssd_reference,
    oracle=sequence_op.ssd_oracle,
    make=functools.partial(make, channels=64, state_size=128),
    partitions=False,
  ),
}


@pytest.mark.parametrize("check", sequence_op.CHECKS)
@pytest.mark.parametrize("implementation", OPS)
def test_contract(implementation, check):
  getattr(OPS[implementation], check)()


def small(batch=2, length=20, seed=0, names=sequence_op.BARE):
  """Arrays as models hand them over, float32."""
  arrays = make(seed, batch, length)
  return {name: jnp.asarray(arrays[name], jnp.float32) for name in names}


def test_sizes_of_its_own_and_a_scalar_skip():
  """No chunk size, one group, D a number a head, more tokens than a chunk."""
  length, heads = 50, 2
  arrays = small(1, length)
  for name, size in zip(arrays, (heads, heads, heads, 1, 1)):
    axis = 0 if name == "A" else 2
    arrays[name] = lax.slice_in_dim(arrays[name], 0, size, axis=axis)
  arrays["dt"] = jnp.abs(arrays["dt"])
  D = jnp.asarray([0.5, -2.0])
  found = jax.jit(ssd)(*arrays.values(), D=D)
  assert tuning.xla_chunk_size(length, CHANNELS, STATE, "cpu") < length
  expected = ssd_reference(*map(np.asarray, arrays.values()), D=np.asarray(D))
  assert_close(found, expected, tolerance("float32", length * STATE))


@pytest.mark.parametrize("tokens", [1, 9])
def test_step_follows_the_recurrence(tokens):
  arrays = small(length=tokens, names=sequence_op.FULL)
  *tensors, D, z, dt_bias, state = arrays.values()
  options = dict(D=D, dt_bias=dt_bias)
  step = jax.jit(ssd_step, static_argnames=("dt_softplus", "return_all_states"))
  y, states = step(
    *tensors, state, z=z, **options, dt_softplus=True, return_all_states=True
  )
  assert states.dtype == jnp.float32
  bound = tolerance("float32", tokens * STATE)
  for t in {1, tokens // 2 + 1, tokens}:
    part = [v if v.ndim == 1 else v[:, :t] for v in tensors]
    expected = ssd_reference(
      *part,
      z=z[:, :t],
      **options,
      dt_softplus=True,
      initial_state=state,
      return_final_state=True,
    )
    assert_close((y[:, :t], states[:, t - 1]), expected, bound, f"token {t}")
  last = step(*tensors, state, z=z, **options, dt_softplus=True)
  assert_close(last, (y, states[:, -1]), bound)


def test_prefill_and_steps_are_one_sequence():
  arrays = small(length=21)
  arrays["dt"] = jnp.abs(arrays["dt"])
  tokens = lambda piece: [
    v if name == "A" else v[:, piece] for name, v in arrays.items()
  ]
  whole = ssd_reference(*tokens(slice(None)), return_final_state=True)
  prefill = jax.jit(functools.partial(ssd, return_final_state=True))
  y, state = prefill(*tokens(slice(0, 16)))
  pieces = [y]
  for piece in (slice(16, 17), slice(17, 21)):
    y, state = jax.jit(ssd_step)(*tokens(piece), state)
    pieces.append(y)
  found = jnp.concatenate(pieces, axis=1), state
  assert_close(found, whole, tolerance("float32", 21 * STATE))
  cast = [v.astype(jnp.bfloat16) for v in tokens(slice(16, 17))]
  y, state = jax.jit(ssd_step)(*cast, state)
  assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def test_decays_keep_their_digits_behind_large_ones():
  """Decays of -128 among mild ones: a plain float32 sum is 20 times worse."""
  size = 128
  rng = np.random.default_rng(0)
  log_decay = -rng.uniform(0, 0.1, (1, 1, size, 1, 1))
  log_decay[:, :, ::3] = -rng.uniform(64, 128, (1, 1, -(-size // 3), 1, 1))
  log_decay = log_decay.astype(np.float32)
  exact = np.cumsum(log_decay.astype(np.float64).reshape(size))
  causal = np.tril(np.ones((size, size), bool))

  def decays(sums):
    return np.exp(np.where(causal, sums[:, None] - sums[None], -np.inf))

  error = lambda found: np.abs(found - decays(exact)).max()
  pairs, from_start, to_end, _ = xla._decays(jnp.asarray(log_decay))
  # Only what the remainders sum up to is rounded, in steps at random.
  fine = np.cumsum(log_decay - np.round(log_decay), dtype=np.float64)
  bound = 2.0**-24 * size**0.5 * max(1.0, np.abs(fine).max())
  assert error(np.asarray(pairs).reshape(size, size)) <= bound
  assert np.abs(np.ravel(from_start) - np.exp(exact)).max() <= bound
  assert np.abs(np.ravel(to_end) - np.exp(exact[-1] - exact)).max() <= bound
  plain = np.cumsum(log_decay.reshape(size), dtype=np.float32)
  assert error(decays(plain)) > 20 * bound


@pytest.mark.parametrize("implementation", OPS)
def test_what_is_forgotten_has_no_gradient(implementation):
  """exp(-120) is 0: not one rounding error reaches A or the initial state."""
  suite = OPS[implementation]
  arrays, _ = suite.case("full")
  arrays["dt"] = jnp.full_like(arrays["dt"], 100.0)
  arrays["dt_bias"] = jnp.zeros_like(arrays["dt_bias"])
  arrays["A"] = jnp.full_like(arrays["A"], -1.2)
  cotangents = sequence_op.cotangents_like(arrays, "float32")
  cotangents = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), cotangents)
  _, gradients = suite.pull_rematerialized(arrays, None, cotangents)
  np.testing.assert_array_equal(gradients["A"], 0)
  np.testing.assert_array_equal(gradients["initial_state"], 0)
  assert np.abs(gradients["dt"]).min() > 0


def test_kernels_name_their_reasons():
  arrays = small()
  for name, needs in [("mosaic_tpu", "a TPU"), ("mosaic_gpu", "an NVIDIA GPU")]:
    line = f"ssd: '{name}' does not run here: needs {needs}.*; usable: xla"
    with pytest.raises(dispatch.UnsupportedError, match=line):
      ssd(*arrays.values(), implementation=name)
  with pytest.raises(ValueError, match="no implementation 'triton'"):
    ssd(*arrays.values(), implementation="triton")


def test_chunk_sizes_follow_the_shapes():
  size = tuning.xla_chunk_size
  assert [size(4096, 64, 128, where) for where in ("cpu", "gpu")] == [64, 128]
  assert size(4096, 64, 16, "tpu") == 32
  assert [size(length, 64, 128, "gpu") for length in (65, 64, 3)] == [
    128,
    64,
    16,
  ]


def test_the_tpu_kernel_says_which_shapes_it_takes(monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  supports = api.IMPLEMENTATIONS["mosaic_tpu"]
  shape = jax.ShapeDtypeStruct
  x = lambda h, p: shape((1, 8, h, p), jnp.bfloat16)
  B = lambda g, n: shape((1, 8, g, n), jnp.bfloat16)
  assert supports() is None
  for h, p, g, n in [(24, 64, 1, 128), (128, 64, 8, 128), (3, 20, 1, 16)]:
    assert supports(x(h, p), B(g, n)) is None
  assert "128 channels in a group" in supports(x(4, 32), B(4, 128))
  assert "N % 128 = 0" in supports(x(8, 64), B(2, 64))
  assert "multiple of 16" in supports(x(8, 64), B(1, 64), chunk_size=24)
  sizes = (24, 1, 64), (80, 1, 64), (128, 8, 64), (4, 2, 64), (1, 1, 8)
  assert [tuning.tpu_heads(*size) for size in sizes] == [8, 8, 8, 2, 1]


@pytest.mark.parametrize(
  "name, shape, line",
  [
    ("x", (2, 20, 4), r"x is \(2, 20, 4\)"),
    ("dt", (2, 20, 3), r"ssd: dt is \(2, 20, 3\), but x .* need \(2, 20, 4\)"),
    ("A", (3,), "A is"),
    ("B", (2, 20, 3, STATE), "4 heads do not fall into 3 groups"),
    ("C", (2, 20, GROUPS, 9), "C is"),
    ("D", (HEADS, 1), "D is"),
    ("z", (2, 19, HEADS, CHANNELS), "z is"),
    ("dt_bias", (1,), "dt_bias is"),
    ("initial_state", (2, HEADS, STATE, CHANNELS), "state is"),
    ("segment_ids", (20, 2), "segment_ids are"),
  ],
)
def test_shapes_are_checked(name, shape, line):
  arrays = small() | {name: jnp.zeros(shape)}
  tensors = [arrays.pop(name) for name in sequence_op.BARE]
  with pytest.raises(ValueError, match=line):
    ssd(*tensors, **arrays)


def test_more_checks():
  arrays = small()
  with pytest.raises(ValueError, match="chunk_size is 0"):
    ssd(*arrays.values(), chunk_size=0)
  with pytest.raises(ValueError, match="no tokens"):
    ssd(*(v if v.ndim == 1 else v[:, :0] for v in arrays.values()))
  arrays["x"] = arrays["x"].astype(jnp.float16)
  with pytest.raises(ValueError, match="float16, not bfloat16 or float32"):
    ssd(*arrays.values())
