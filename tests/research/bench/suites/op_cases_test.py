"""Least work by hand, and errors against planted mistakes."""

import dataclasses

import jax
import numpy as np
import pytest

from models.errors import InputError
from research.bench.suites import op_cases as cases
from research.bench.suites import op_passes as measure


def test_bytes_are_arrays_and_results_once():
  case = cases.build("causal_conv1d", "tiny:2x8", "bfloat16")
  x, parameters = 2 * (2 * 8 * 64), 4 * (64 * 4 + 64)
  (forward,), (backward,) = case.phases("fwd"), case.phases("bwd")
  assert forward.bytes == x + parameters + x
  # x, its gradient, and that of y; parameters and their gradients.
  assert backward.bytes == 3 * x + 2 * parameters
  assert case.phases("fwd+bwd") == (forward, backward)
  assert forward.exps == 2 * 8 * 64 and forward.flops == 0


def test_published_sizes():
  shape = lambda op, size: cases.build(op, f"{size}:1x1", "bfloat16").shape
  assert shape("ssd", "370m") == "B1 L1 H32 P64 G1 N128"
  assert shape("ssd", "1.3b") == "B1 L1 H64 P64 G1 N128"
  assert shape("ssd", "2.8b") == "B1 L1 H80 P64 G1 N128"
  assert shape("selective_scan", "1.3b") == "B1 L1 D4096 G1 N16"
  assert cases.SIZES["1.3b"].width == 2048


def test_operations_by_hand():
  (phase,) = cases.build("ssd", "tiny:2x8", "bfloat16").phases("fwd")
  assert phase.flops == 4 * (2 * 8) * 4 * 16 * 8
  case = cases.build("selective_scan", "tiny:2x8", "float32")
  assert case.exps == (2 * 8 * 64 * (4 + 3),) * 2
  case = cases.build("token_logprob", "tiny:2x8", "float32")
  assert case.phases("fwd")[0].flops == 2 * 16 * 32 * 300
  assert case.phases("bwd")[0].flops == 6 * 16 * 32 * 300
  # Five stages of four multiplications and additions a pair; blocks of 8.
  case = cases.build("butterfly_matmul", "tiny:2x8", "float32")
  assert case.flops == (16 * 5 * 16 * 8, 2 * 16 * 5 * 16 * 8)
  # Four stacks of 5 stages, and one of 7 for 128 channels.
  case = cases.build("butterfly_ffn", "tiny:2x8", "float32")
  assert case.flops[0] == 16 * (4 * 5 * 16 + 7 * 64) * 8
  case = cases.build("monarch_matmul", "tiny:2x8", "float32")
  assert case.flops == (2 * 16 * 2 * 32 * 8, 4 * 16 * 2 * 32 * 8)
  case = cases.build("fourier_mix", "tiny:2x8", "float32")
  assert case.flops == (2.5 * 2 * 8 * 32 * 8,) * 2
  # Four chunks of two tokens, two tokens and the token itself, of eight heads.
  case = cases.build("chunked_attention_step", "tiny:2x8", "float32")
  keys = 2 * 4 * (4 + 2 + 1)
  assert case.flops[0] == 4 * 16 * keys
  assert case.phases("fwd")[0].bytes == 4 * 16 * (2 * keys + 2 * 2 * 4)
  # Two of four pages of two slots are read, and all four summaries; that of the
  # last page is written. Four heads of 16 share two key heads.
  case = cases.build("paged_sparse_attention", "tiny:3x8", "float32")
  assert case.flops[0] == 4 * 3 * 4 * 16 * (4 + 4)
  kept, summaries, own = (3 * 2 * 16 * n for n in (2 * 4, 2 * (4 + 1), 2 * 2))
  assert case.phases("fwd")[0].bytes == 4 * (kept + summaries + own)


@pytest.mark.parametrize("op", cases.BUILDERS)
def test_ops_agree_with_their_references_and_plain_forms(op):
  case = cases.build(op, "tiny:2x8", "float32")
  call = measure.prepare(lambda a: case.call(a, "xla"), [case.arrays], "fwd")
  y = measure.y_of(call()[0])
  assert measure.forward_error(case, y) < 1e-5
  assert measure.forward_error(case, 1.01 * y) == pytest.approx(0.01, rel=0.1)
  if case.plain is not None:
    arrays = case.plain_arrays() if case.plain_arrays else case.arrays
    assert measure.forward_error(case, jax.jit(case.plain)(arrays)) < 1e-5
  else:
    assert not case.differentiable


def test_passes_return_the_same_gradients():
  case = cases.build("causal_conv1d", "tiny:1x8", "float32")
  function = lambda arrays: case.call(arrays, "xla")
  ((y, both),) = measure.prepare(function, [case.arrays], "fwd+bwd")()
  ((alone,),) = measure.prepare(function, [case.arrays], "bwd")()
  assert both.keys() == {"x", "weight", "bias"}
  for name in both:
    np.testing.assert_allclose(alone[name], both[name], rtol=0, atol=1e-5)
  assert measure.forward_error(case, y) < 1e-5


@pytest.mark.parametrize("which", ["fwd", "bwd", "fwd+bwd"])
def test_a_call_takes_all_sets(which):
  case = cases.build("causal_conv1d", "tiny:1x8", "float32")
  doubled = {name: 2 * value for name, value in case.arrays.items()}
  function = lambda arrays: case.call(arrays, "xla")
  call = measure.prepare(function, [case.arrays, doubled], which)
  first, second = (measure.compared(out, which) for out in call())
  again, _ = (measure.compared(out, which) for out in call())
  assert measure.full_error(second, first) > 0.1
  assert measure.full_error(again, first) == 0
  sets = [case.arrays, doubled]
  assert measure.passes_of(sets, "cpu") == 2
  assert measure.passes_of(sets, "gpu") == 8
  assert measure.passes_of([*sets, case.arrays], "gpu") == 9
  more = measure.prepare(function, sets, which, passes=4)()
  assert measure.full_error(measure.compared(more[2], which), first) == 0
  assert measure.full_error(measure.compared(more[3], which), second) == 0


@pytest.mark.parametrize(
  "dtype, low, high", [("float32", 0.0, 1e-5), ("bfloat16", 1e-4, 0.03)]
)
@pytest.mark.parametrize(
  "op", ["ssd", "selective_scan", "causal_conv1d", "fourier_mix"]
)
def test_the_whole_shape_against_float32(op, dtype, low, high):
  case = cases.build(op, "tiny:2x80", dtype)
  function = lambda arrays: case.call(arrays, "xla")
  for which in ("fwd", "bwd", "fwd+bwd"):
    call = measure.prepare(function, [case.arrays], which)
    found = measure.compared(call()[0], which)
    expected = measure.whole(case, which != "fwd")
    assert low <= measure.full_error(found, expected) <= high


def test_what_lies_behind_the_first_tokens_is_seen():
  case = cases.build("causal_conv1d", "tiny:2x80", "float32")
  call = measure.prepare(lambda a: case.call(a, "xla"), [case.arrays], "fwd")
  y = call()[0].at[1, 70:].set(0.0)
  found = measure.Errors(case).of("xla", "fwd", y)
  assert found["error"] < 1e-5 and 0.1 < found["error_full"] < 0.5


def test_large_shapes_have_no_whole_reference(monkeypatch):
  case = cases.build("causal_conv1d", "tiny:1x8", "float32")
  monkeypatch.setattr(measure, "_WHOLE_CPU", 511)
  assert measure.whole(case, False) is None
  y = measure.y_of(case.call(case.arrays, "xla"))
  found = measure.Errors(case).of("xla", "fwd", y)
  assert found["error"] < 1e-5 and found["error_full"] is None


def test_a_failing_reference_is_said_and_tried_once(monkeypatch):
  tried = []

  def fail(case, backward):
    tried.append(backward)
    raise RuntimeError("out of\nmemory")

  monkeypatch.setattr(measure, "whole", fail)
  case = cases.build("causal_conv1d", "tiny:1x8", "float32")
  errors = measure.Errors(case)
  y = measure.y_of(case.call(case.arrays, "xla"))
  for _ in range(2):
    found = errors.of("xla", "fwd", y)
    assert found["error"] < 1e-5 and found["error_full"] is None
    assert found["no_error_full"] == "out of memory"
  assert tried == [False]


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
