"""The contract of `rms_norm`, for every implementation that runs here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ops import dispatch
from ops.rms_norm import api, rms_norm, rms_norm_reference

EPS = 1e-5
FORMS = "plain", "gated", "residual"
# An odd number of rows, of which some are small.
SHAPE = (3, 7, 12)

IMPLEMENTATIONS = [n for n, f in api.IMPLEMENTATIONS.items() if f() is None]


def make(form, dtype="float32", shape=SHAPE, seed=0, gate_dtype=None):
  """The arrays by name, and cotangents of what the form returns."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  x = draw(*shape) * np.exp(draw(*shape[:-1], 1))
  arrays = {
    "x": jnp.asarray(x, dtype),
    "scale": jnp.asarray(1 + 0.3 * draw(shape[-1]), jnp.float32),
  }
  if form == "gated":
    arrays["gate"] = jnp.asarray(2 * draw(*shape), gate_dtype or dtype)
  dh = jnp.asarray(draw(*shape), dtype)
  if form != "residual":
    return arrays, dh
  arrays["residual"] = jnp.asarray(draw(*shape), jnp.float32)
  return arrays, (dh, jnp.asarray(draw(*shape), jnp.float32))


def oracle_gradients(arrays, cotangents, num_groups=1):
  """Gradients in float64, of a row at a time."""
  wide = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
  outer = [np.asarray(c, np.float64) for c in jax.tree.leaves(cotangents)]
  x, scale = wide["x"], wide["scale"]
  z = wide.get("gate")
  gate = 1.0 if z is None else 1 / (1 + np.exp(-z))
  v = x + wide.get("residual", 0.0)
  v = v if z is None else v * z * gate
  by_group = lambda a: a.reshape(*a.shape[:-1], num_groups, -1)
  squares = np.mean(by_group(v) ** 2, -1, keepdims=True)
  root = 1 / np.sqrt(squares + EPS)
  normed = by_group(v) * root
  g = by_group(outer[0] * scale)
  dv = root * (g - normed * np.mean(g * normed, -1, keepdims=True))
  dv = dv.reshape(x.shape)
  dscale = (outer[0] * normed.reshape(x.shape)).reshape(-1, x.shape[-1]).sum(0)
  if z is not None:
    slope = gate * (1 + z * (1 - gate))
    return {"x": dv * z * gate, "scale": dscale, "gate": dv * x * slope}
  if "residual" in arrays:
    dv = dv + outer[1]
    return {"x": dv, "scale": dscale, "residual": dv}
  return {"x": dv, "scale": dscale}


def assert_close(found, expected, dtype, length=1):
  """Rounded in `dtype` a few times, after sums of `length` float32 values."""
  eps = float(jnp.finfo(jnp.dtype(dtype)).eps)
  eps += 2.0**-23 * np.sqrt(length)
  largest = max(1.0, np.abs(expected).max())
  found = np.asarray(found, np.float64)
  np.testing.assert_allclose(found, expected, rtol=0, atol=4 * eps * largest)


def check(arrays, cotangents, dtype, num_groups=1, run=None):
  """Compares values and gradients with float64."""
  run = run or functools.partial(rms_norm, num_groups=num_groups, eps=EPS)

  @jax.jit
  def both(arrays):
    values, pull = jax.vjp(lambda a: run(**a), arrays)
    return values, pull(cotangents)[0]

  values, gradients = both(arrays)
  expected = rms_norm_reference(**arrays, num_groups=num_groups, eps=EPS)
  channels, rows = arrays["x"].shape[-1], arrays["x"][..., 0].size
  for value, wanted in zip(
    jax.tree.leaves(values), jax.tree.leaves(expected), strict=True
  ):
    assert_close(value, wanted, value.dtype, channels)
  assert jax.tree.leaves(values)[0].dtype == dtype
  wanted = oracle_gradients(arrays, cotangents, num_groups)
  assert gradients.keys() == wanted.keys()
  for name, gradient in gradients.items():
    assert gradient.dtype == arrays[name].dtype
    length = rows if name == "scale" else channels
    kind = dtype if name == "scale" else gradient.dtype
    assert_close(gradient, wanted[name], kind, length)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_match_float64(
  form, groups, dtype, implementation
):
  arrays, cotangents = make(form, dtype)
  run = functools.partial(
    rms_norm, num_groups=groups, eps=EPS, implementation=implementation
  )
  check(arrays, cotangents, dtype, groups, run)


@pytest.mark.parametrize("form", FORMS)
def test_another_dtype_is_rounded_last(form):
  arrays, _ = make(form)
  wide = jax.tree.leaves(rms_norm(**arrays, eps=EPS))[0]
  narrow = jax.tree.leaves(rms_norm(**arrays, eps=EPS, dtype="bfloat16"))[0]
  np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_a_plain_norm_is_rounded_before_its_scale():
  arrays, _ = make("plain", "bfloat16")
  ones = jnp.ones_like(arrays["scale"])
  normed = rms_norm(arrays["x"], ones, eps=EPS)
  expected = normed * arrays["scale"].astype(jnp.bfloat16)[None, None]
  np.testing.assert_array_equal(rms_norm(**arrays, eps=EPS), expected)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_and_remat(form):
  arrays, cotangents = make(form)
  scale = arrays.pop("scale")

  def loss(arrays):
    run = jax.checkpoint(lambda a: rms_norm(**a, scale=scale, eps=EPS))
    values = jax.vmap(run)(arrays)
    products = jax.tree.map(lambda v, c: jnp.sum(v * c), values, cotangents)
    return sum(jax.tree.leaves(products))

  found = jax.jit(jax.grad(loss))(arrays)
  expected = oracle_gradients(arrays | {"scale": scale}, cotangents)
  for name, gradient in found.items():
    assert_close(gradient, expected[name], "float32", SHAPE[-1])


@pytest.mark.parametrize("form", FORMS)
def test_sharded_equals_single(form):
  arrays, _ = make(form, shape=(4, 3, 8))
  mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
  put = lambda v: jax.device_put(
    v, NamedSharding(mesh, PartitionSpec(*("data",) * (v.ndim > 1)))
  )
  run = jax.jit(functools.partial(rms_norm, eps=EPS))
  found = run(**jax.tree.map(put, arrays))
  for value, wanted in zip(
    jax.tree.leaves(found), jax.tree.leaves(run(**arrays)), strict=True
  ):
    assert_close(value, np.asarray(wanted), "float32", 8)


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 0, 4), (1, 1)])
def test_few_rows(shape):
  arrays, _ = make("residual", shape=shape)
  h, total = rms_norm(**arrays, eps=EPS)
  assert h.shape == total.shape == shape


@pytest.mark.parametrize(
  "change, says",
  [
    ({"scale": jnp.ones(3)}, "are not"),
    ({"gate": jnp.ones((3, 7, 1))}, "gate is"),
    ({"residual": jnp.ones(SHAPE, jnp.bfloat16)}, "not float32"),
    ({"residual": jnp.ones((7, 12))}, "residual is"),
    ({"gate": jnp.ones(SHAPE), "residual": jnp.ones(SHAPE)}, "not both"),
    ({"num_groups": 5}, "num_groups is 5"),
    ({"num_groups": 0}, "num_groups is 0"),
  ],
)
def test_bad_arguments_say_what_is_wrong(change, says):
  arrays, _ = make("plain")
  with pytest.raises(ValueError, match=says) as error:
    rms_norm(**(arrays | change), eps=EPS)
  assert "\n" not in str(error.value)


def test_only_what_exists():
  arrays, _ = make("plain")
  with pytest.raises(dispatch.UnsupportedError, match="usable: xla"):
    rms_norm(**arrays, eps=EPS, implementation="mosaic_gpu")
