import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.quantized import round_to_nearest
from ops.quantized import dequantize, formats
from research.quantization import gptq

D, F = 32, 6


def nearest(kernel, form):
  return round_to_nearest(jnp.asarray(kernel), gptq.fitting(form, D))


@pytest.fixture(scope="module")
def problem():
  """Activations whose channels depend on each other, and a kernel."""
  generator = np.random.default_rng(0)
  mixing = generator.normal(size=(D, D)) / D**0.5
  x = generator.normal(size=(400, D)) @ (mixing + 0.3 * np.eye(D))
  return np.float32(x), np.float32(generator.normal(size=(D, F)))


def reference(kernel, gram, group, damp, top=7):
  """Frantar et al. 2022, algorithm 1, row by row in float64."""
  w = np.array(kernel, np.float64)
  size = len(w)
  shifted = gram + damp * np.mean(np.diag(gram)) * np.eye(size)
  upper = np.linalg.cholesky(np.linalg.inv(shifted)).T
  for i in range(size):
    if i % group == 0:
      scales = np.abs(w[i : i + group]).max(axis=0) / top
    near = np.clip(np.round(w[i] / scales), -top, top) * scales
    error = (w[i] - near) / upper[i, i]
    w[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
    w[i] = near
  return w


@pytest.mark.parametrize("group", [8, 32])
def test_it_is_the_algorithm_of_the_paper(problem, group):
  x, kernel = problem
  gram = x.astype(np.float64).T @ x
  found = gptq.gptq(
    jnp.asarray(kernel),
    gptq.factor(jnp.asarray(gram, jnp.float32)),
    formats.get(f"int4:{group}"),
  )
  found.check()
  wanted = reference(kernel, gram, group, 0.01)
  # A value at a tie may go the other way, and what follows with it.
  same = np.isclose(np.asarray(dequantize(found)), wanted, atol=1e-4)
  assert same.mean() > 0.98


@pytest.mark.parametrize(
  "form",
  [
    "int4:16",
    "sf4:8",
    "mxfp4:16",
    "nvfp4",
    "bitmod3:16",
    "razer4",
    "fp4_ea:row",
  ],
)
def test_it_errs_less_than_the_nearest_levels_on_what_it_saw(problem, form):
  x, kernel = problem
  form = formats.get(form)
  upper = gptq.factor(jnp.asarray(x.T @ x))
  error = lambda q: np.linalg.norm(x @ (np.asarray(dequantize(q)) - kernel))
  found = gptq.gptq(jnp.asarray(kernel), upper, form)
  found.check()
  assert found.format == form
  assert error(found) < 0.8 * error(nearest(kernel, form))


def test_channels_apart_are_rounded_to_the_nearest(problem):
  _, kernel = problem
  form = formats.get("int4")
  # Beside a dead channel, which has no entry of its own.
  gram = jnp.diag(jnp.arange(D, dtype=jnp.float32))
  found = gptq.gptq(jnp.asarray(kernel), gptq.factor(gram), form)
  wanted = nearest(kernel, form)
  assert wanted.format.group == D
  jax.tree.map(np.testing.assert_array_equal, found.values, wanted.values)


def test_groups_fit_the_axis():
  form = formats.get("int4")
  assert gptq.fitting(form, 384).group == 128
  assert gptq.fitting(form, 48).group == 16
  assert gptq.fitting(formats.get("int8"), 48).group == "row"
