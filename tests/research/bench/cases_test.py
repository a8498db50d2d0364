"""Least work by hand, and errors against planted mistakes."""

import dataclasses

import jax
import numpy as np
import pytest

from models.errors import InputError
from research.bench import cases, measure


def test_bytes_are_arrays_and_results_once():
  case = cases.build("causal_conv1d", "tiny:2x8", "bfloat16")
  x, parameters = 2 * (2 * 8 * 64), 4 * (64 * 4 + 64)
  (forward,), (backward,) = case.phases("fwd"), case.phases("bwd")
  assert forward.bytes == x + parameters + x
  # x, its gradient, and that of y; parameters and their gradients.
  assert backward.bytes == 3 * x + 2 * parameters
  assert case.phases("fwd+bwd") == (forward, backward)
  assert forward.exps == 2 * 8 * 64 and forward.flops == 0


def test_operations_by_hand():
  (phase,) = cases.build("ssd", "tiny:2x8", "bfloat16").phases("fwd")
  assert phase.flops == 4 * (2 * 8) * 4 * 16 * 8
  case = cases.build("selective_scan", "tiny:2x8", "float32")
  assert case.exps == (2 * 8 * 64 * (4 + 3),) * 2
  case = cases.build("token_logprob", "tiny:2x8", "float32")
  assert case.phases("fwd")[0].flops == 2 * 16 * 32 * 300
  assert case.phases("bwd")[0].flops == 6 * 16 * 32 * 300


@pytest.mark.parametrize("op", cases.BUILDERS)
def test_ops_agree_with_their_references_and_plain_forms(op):
  case = cases.build(op, "tiny:2x8", "float32")
  y = measure.y_of(
    measure.prepare(lambda a: case.call(a, "xla"), case.arrays, "fwd")()
  )
  assert measure.forward_error(case, y) < 1e-5
  assert measure.forward_error(case, 1.01 * y) == pytest.approx(0.01, rel=0.1)
  if case.plain is not None:
    assert measure.forward_error(case, jax.jit(case.plain)(case.arrays)) < 1e-5
  else:
    assert not case.differentiable


def test_passes_return_the_same_gradients():
  case = cases.build("causal_conv1d", "tiny:1x8", "float32")
  function = lambda arrays: case.call(arrays, "xla")
  y, both = measure.prepare(function, case.arrays, "fwd+bwd")()
  (alone,) = measure.prepare(function, case.arrays, "bwd")()
  assert both.keys() == {"x", "weight", "bias"}
  for name in both:
    np.testing.assert_allclose(alone[name], both[name], rtol=0, atol=1e-5)
  assert measure.forward_error(case, y) < 1e-5


def test_a_wrong_gradient_is_seen():
  case = cases.build("causal_conv1d", "tiny:1x8", "float32")
  assert measure.backward_error(case, "xla") < 1e-5

  def wrong(arrays, implementation):
    bias = arrays["bias"] - 0.1 * arrays["bias"]
    bias = bias + jax.lax.stop_gradient(0.1 * arrays["bias"])
    return case.call({**arrays, "bias": bias}, implementation)

  # A tenth of one of three gradients, along a random direction.
  error = measure.backward_error(dataclasses.replace(case, call=wrong), "xla")
  assert 1e-3 < error < 0.5


@pytest.mark.parametrize(
  "op, shape, says",
  [
    ("sort", "tiny:1x8", "ops=sort: take from selective_scan"),
    ("ssd", "large:1x8", "SIZE one of tiny"),
    ("ssd", "tiny:8", "write SIZE:BxL"),
    ("ssd", "tiny:0x8", "write SIZE:BxL"),
  ],
)
def test_unknown_names(op, shape, says):
  with pytest.raises(InputError, match=says):
    cases.build(op, shape, "float32")
