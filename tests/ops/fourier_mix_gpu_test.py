"""The GPU kernels of `fourier_mix` on a CPU: thread by thread, and lowered."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import dispatch, fourier_mix
from ops.fourier_mix import api, mosaic_gpu, xla
from tests.hopper_lowering import lowered


class Numbers:
  """`mosaic_gpu.Threads` with numbers of Python, one thread at a time."""

  def __init__(self):
    self.conditions, self.stored = [], 0

  add = plus = staticmethod(lambda a, b: a + b)
  minus = less_by = staticmethod(lambda a, b: a - b)
  times = staticmethod(lambda a, b: a * b)
  divided = staticmethod(divmod)
  less = staticmethod(lambda a, b: 0 <= a < b)
  same = staticmethod(lambda a, b: a == b)
  either = staticmethod(lambda a, b: a or b)
  where = staticmethod(lambda condition, a, b: a if condition else b)
  zero = staticmethod(lambda: 0.0)

  @contextlib.contextmanager
  def when(self, condition):
    self.conditions.append(condition)
    yield
    self.conditions.pop()

  def load(self, ref, at):
    if not all(self.conditions):
      return np.nan
    assert 0 <= at < len(ref)
    return ref[at]

  def load_each(self, ref, at):
    assert at % mosaic_gpu.EACH == 0 or not all(self.conditions)
    return [self.load(ref, at + k) for k in range(mosaic_gpu.EACH)]

  def store_each(self, ref, at, values):
    if all(self.conditions):
      assert at % mosaic_gpu.EACH == 0
      assert 0 <= at <= len(ref) - len(values)
      assert len(values) == mosaic_gpu.EACH
      ref[at : at + len(values)] = values
      self.stored += 1


def run(one, items, shape, arrays, *outs):
  """Runs a thread for each item, and some behind the last."""
  m, found = Numbers(), [np.full(np.prod(out), np.nan) for out in outs]
  refs = [array.ravel() for array in arrays] + found
  for row in range(shape[0]):
    for at in range(items + 3):
      one(m, at, row, refs, shape)
  # Nothing is left out, and nothing is stored twice.
  assert m.stored * mosaic_gpu.EACH == sum(value.size for value in found)
  return [value.reshape(out) for value, out in zip(found, outs)]


@pytest.mark.parametrize("length, channels", [(16, 32), (48, 16)])
def test_threads_fold_and_unfold(length, channels):
  shape = 2, length, channels
  x = np.random.default_rng(0).normal(size=shape)
  out = xla.padded_half(length), 2, xla.padded_half(channels)
  items = mosaic_gpu.fold_items(shape)
  parts = run(mosaic_gpu.fold_one, items, shape, [x], out, out)
  products = [
    np.einsum("kl,lbd,de->kbe", rows, part, columns)
    for part, rows, columns in zip(
      parts, xla.waves(length), xla.waves(channels)
    )
  ]
  items = mosaic_gpu.unfold_items(shape)
  (y,) = run(mosaic_gpu.unfold_one, items, shape, products, shape)
  np.testing.assert_allclose(y, np.fft.fft2(x).real, rtol=0, atol=1e-11)


def test_lowers_for_hopper(monkeypatch):
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)

  def both(x, dy):
    call = lambda x: fourier_mix(x, implementation="mosaic_gpu")
    y, pull = jax.vjp(call, x)
    return y, pull(dy), jax.vmap(call)(x)

  x = jax.ShapeDtypeStruct((3, 2, 64, 128), jnp.bfloat16)
  text = lowered(both, x, x)
  assert text.count("custom_call @mosaic_gpu_v2") >= 2
  for part in ("fold", "unfold"):
    assert f"fourier_mix_{part}_mosaic_gpu" in text


def test_unsupported_arrays_have_reasons():
  def reason(*shape, dtype="bfloat16"):
    return mosaic_gpu.unfit(jax.ShapeDtypeStruct(shape, dtype))

  assert reason(16, 32) is reason(64, 1024, 1024) is None
  assert "takes bfloat16, not float32" in reason(16, 32, dtype="float32")
  assert "multiples of 16" in reason(2, 24, 32)
  assert "multiples of 16" in reason(2, 32, 8)
  assert "an FFT is faster" in reason(4096, 4096)
  assert "2^31 - 1 values" in reason(2048, 1024, 1024)
  assert "2^31 - 1 values" in reason(0, 16, 32)
  assert "needs an NVIDIA GPU" in mosaic_gpu.supports()
