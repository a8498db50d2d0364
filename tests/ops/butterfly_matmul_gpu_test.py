"""The GPU kernels of `butterfly_matmul` on a CPU: interpreted, lowered."""

import functools
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ops import butterfly_matmul, dispatch
from ops.butterfly_matmul import (
  api,
  butterfly_matmul_reference,
  mosaic_gpu,
  mosaic_gpu_exchange,
  mosaic_gpu_gradients,
  mosaic_gpu_product,
  mosaic_gpu_resident,
  tuning,
  twiddle_shape,
)
from tests.hopper_lowering import lowered
from tests.ops import butterfly_matmul_test as contract
from tests.ops.complex_arrays import assert_alike, wide
from tests.ops.sequence_op import assert_close, tolerance


@pytest.fixture
def interpreted(monkeypatch):
  """`implementation="mosaic_gpu"` as the interpreter runs it.

  A warpgroup multiplies tiles of 8 rows in two thread blocks, so that few rows
  make several tiles.
  """
  small = mosaic_gpu_product.Config(rows=8, workers=1, blocks=2)
  walk = mosaic_gpu_gradients.Config(rows=16, stages=2, workers=1, blocks=2)
  monkeypatch.setattr(
    mosaic_gpu, "CONFIGS", dict.fromkeys(mosaic_gpu.CONFIGS, small)
  )
  for name in ("blocks_config", "mixes_config"):
    monkeypatch.setattr(mosaic_gpu_gradients, name, lambda n: walk)
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)
  run = functools.partial(
    mosaic_gpu.forward, interpret=plgpu.InterpretGPUParams()
  )
  monkeypatch.setattr(mosaic_gpu, "forward", run)
  contract.program.cache_clear()
  yield
  contract.program.cache_clear()


# "groups" has padded rows and channels and strides there and back, "256" two
# stacks and two mixed stages.
@pytest.mark.parametrize("case", ["groups", "256"])
def test_product_and_gradients_match_float64(case, interpreted):
  contract.test_product_and_gradients("mosaic_gpu", case, "bfloat16")


def test_only_the_wanted_channels_of_a_stack_are_made(interpreted):
  x, twiddle, _ = contract.draw("groups", "bfloat16", rows=8)
  x, twiddle = jnp.pad(x, ((0, 0), (0, 28))), twiddle[:, :1]
  config = mosaic_gpu_product.Config(rows=8, workers=1, blocks=2, each=1)
  mosaic_gpu.CONFIGS[128] = config
  y = mosaic_gpu.butterfly(
    x, twiddle[:, 0], 60, True, plgpu.InterpretGPUParams()
  )
  assert y.shape == (8, 64)
  exact = butterfly_matmul_reference(wide(x), wide(twiddle))[:, :64]
  assert_alike(y, exact, contract.bound("bfloat16", twiddle))


@pytest.mark.parametrize("increasing", [True, False])
def test_warpgroups_share_the_stages_of_1024_channels(increasing):
  # Two stacks with inputs of their own, and more tiles than the ring has slots.
  n, stacks = mosaic_gpu_resident.CHANNELS, 2
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(24, stacks * n)), jnp.bfloat16)
  shape = twiddle_shape(n, stacks * n)
  twiddle = jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)

  @jax.jit
  def run(x, twiddle):
    split = functools.partial(mosaic_gpu.factors, increasing=increasing)
    blocks, mixes = jax.vmap(split)(twiddle[:, 0])
    y, middle = mosaic_gpu_resident.product(
      x,
      blocks.astype(x.dtype),
      mixes,
      increasing=increasing,
      keep=True,
      config=mosaic_gpu_resident.Config(rows=8, stages=3, blocks=2),
      # Memory that is read and written in no set order is an error.
      interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    return y, middle, blocks

  y, middle, blocks = run(x, twiddle)
  limit = contract.bound("bfloat16", twiddle)
  for stack in range(stacks):
    own = np.s_[:, stack * n : (stack + 1) * n]
    exact = butterfly_matmul_reference(
      wide(x)[own],
      wide(twiddle)[stack : stack + 1],
      increasing_stride=increasing,
    )
    assert_alike(y[own], exact, limit)
    # Blocks lie between x and what is kept, or between that and y.
    before, after = (x, middle) if increasing else (middle, y)
    before = wide(before)[own].reshape(len(x), -1, mosaic_gpu_product.WIDE)
    exact = np.einsum("hij,mhj->mhi", wide(blocks)[stack], before)
    assert_alike(after[own], exact.reshape(len(x), n), limit)


@pytest.mark.parametrize("increasing", [True, False])
def test_thread_blocks_of_a_cluster_share_the_stages(increasing):
  # The interpreter knows no exchange between thread blocks, so it is made here.
  n, cluster = 2048, 4
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, n))
  twiddle = 0.7 * rng.normal(size=twiddle_shape(n, n)).astype(np.float32)
  split = jax.jit(mosaic_gpu.factors, static_argnums=1)
  blocks, mixes = map(wide, split(twiddle[0, 0], increasing))
  inner, outer = mosaic_gpu_product.shares(mixes[None], cluster, increasing)
  heights = n // mosaic_gpu_product.WIDE
  own, shared = heights // cluster, heights // cluster**2

  def mix(parts, twiddles, unit=1):
    return [
      mosaic_gpu_product.mixed(
        part, lambda at, t=t: t[at][:, None], increasing, unit
      )
      for part, t in zip(parts, twiddles)
    ]

  def exchange(parts):
    """Of each thread block the k-th share goes to the thread block k."""
    share = lambda part, k: part[k * shared : (k + 1) * shared]
    return [
      [v for part in parts for v in share(part, k)] for k in range(cluster)
    ]

  def cut(values):
    return [values[k * own : (k + 1) * own] for k in range(cluster)]

  def multiply(parts):
    flat = [v for part in parts for v in part]
    return cut([w @ v for w, v in zip(blocks, flat)])

  parts = cut(list(x.T.reshape(heights, -1, 3)))
  if increasing:
    parts = mix(multiply(parts), inner)
    parts = exchange(mix(exchange(parts), outer, shared))
  else:
    parts = mix(exchange(parts), outer, shared)
    parts = multiply(mix(exchange(parts), inner))
  y = np.concatenate([v for part in parts for v in part]).T
  exact = butterfly_matmul_reference(
    x, wide(twiddle), increasing_stride=increasing
  )
  assert_close(y, exact, tolerance("float32", 2 * twiddle.shape[2]))


def test_threads_give_all_that_they_hold():
  for rows in (8, 16, 24, 32):
    ref = mosaic_gpu_exchange.memory(2, 8, mosaic_gpu_product.WIDE, rows)
    assert math.prod(ref.shape) == 2 * 8 * mosaic_gpu_product.WIDE * rows
    # Vectors of 4, 8 or 16 bytes, of one thread each.
    assert ref.shape[-2:] in [(128, 2), (128, 4), (128, 8)]


@pytest.mark.parametrize("names", [["out"], ["middle", "out"]])
@pytest.mark.parametrize("copies", range(1, 6))
def test_shared_memory_is_written_when_its_copy_is_done(copies, names):
  under_way = []
  for _tile in range(3):
    for i in range(copies):
      for name in names:
        pending = 2 * len(names) - 1
        may_be = mosaic_gpu_product.left(i, copies, pending)
        under_way = under_way[-may_be:] if may_be else []
        assert (name, i % 2) not in under_way
        under_way.append((name, i % 2))


@pytest.mark.parametrize("alike", [True, False])
def test_products_of_wide_mixes_match_float64(alike):
  rows, heights, stacks, wide_ = 8, 4, 2, mosaic_gpu_product.WIDE
  rng = np.random.default_rng(0)
  draw = lambda count: jnp.asarray(
    rng.normal(size=(rows, count * heights * wide_)), jnp.bfloat16
  )
  a, b = draw(stacks), draw(stacks if alike else 1)
  found = mosaic_gpu_gradients.of_wide_mixes(a, b, stacks=stacks)
  of = lambda v: wide(v).reshape(rows, -1, heights, wide_)
  both = of(a), np.broadcast_to(of(b), of(a).shape)
  exact = np.einsum("mshp,msgp->shgp", *both)
  assert_close(found, exact, tolerance("float32", rows))


# Clusters of thread blocks, and matrices in registers.
@pytest.mark.parametrize("n, outputs", [(4096, 1000), (1024, 1024)])
def test_lowers_for_hopper(n, outputs):
  rows, struct = 1000, jax.ShapeDtypeStruct
  x = struct((rows, n), jnp.bfloat16)
  dy = struct((rows, outputs), jnp.bfloat16)
  twiddle = struct(twiddle_shape(n, n), jnp.float32)

  def run(x, twiddle, dy):
    call = functools.partial(
      mosaic_gpu.forward, out_features=outputs, increasing_stride=True
    )
    y, pull = jax.vjp(call, x, twiddle)
    return y, pull(dy)

  text = lowered(run, x, twiddle, dy)
  parts = ["fwd", "bwd", "bwd_blocks"]
  if n < mosaic_gpu_gradients.WIDE_MIXES:
    parts.append("bwd_mixes")
  assert text.count("custom_call @mosaic_gpu_v2") == len(parts)
  for part in parts:
    assert f"butterfly_matmul_{part}_mosaic_gpu" in text


def test_vmap_lowers_for_hopper():
  struct = jax.ShapeDtypeStruct
  call = functools.partial(
    mosaic_gpu.forward, out_features=128, increasing_stride=True
  )
  text = lowered(
    jax.vmap(call),
    struct((3, 8, 128), jnp.bfloat16),
    struct((3, *twiddle_shape(128, 128)), jnp.float32),
  )
  assert text.count("custom_call @mosaic_gpu_v2") == 1


def test_unsupported_arrays_have_reasons():
  def reason(rows=8, n=128, dtype="bfloat16", twiddle="float32"):
    struct = jax.ShapeDtypeStruct
    return mosaic_gpu.unfit(
      struct((rows, n), dtype), struct(twiddle_shape(n, n), twiddle)
    )

  assert reason() is reason(n=4096) is reason(rows=1) is None
  assert "takes bfloat16, not float32" in reason(dtype="float32")
  assert "no complex twiddles" in reason(twiddle="complex64")
  assert "128 to 4096 channels, padded, not 64" in reason(n=64)
  assert "128 to 4096 channels, padded, not 8192" in reason(n=8192)
  assert "at least one row" in reason(rows=0)


def test_none_takes_the_kernels_where_they_pay(monkeypatch):
  assert "needs an NVIDIA GPU" in mosaic_gpu.supports()
  x, twiddle, _ = contract.draw("groups", "bfloat16")
  with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA GPU"):
    butterfly_matmul(x, twiddle, implementation="mosaic_gpu")
  everywhere = dict.fromkeys(api.IMPLEMENTATIONS, dispatch.always)
  monkeypatch.setattr(api, "IMPLEMENTATIONS", everywhere)
  monkeypatch.setattr(
    mosaic_gpu, "forward", lambda x, twiddle, **options: "kernels"
  )
  assert butterfly_matmul(x, twiddle).dtype == x.dtype
  monkeypatch.setattr(tuning, "kernels_pay", lambda *sizes: True)
  assert butterfly_matmul(x, twiddle) == "kernels"
  assert butterfly_matmul(x, twiddle, implementation="xla").dtype == x.dtype


def test_kernels_pay_for_many_rows_of_wide_butterflies():
  assert tuning.kernels_pay(65536, 1024, 1024, 1)
  assert tuning.kernels_pay(65536, 1000, 4096, 1)
  for rows in (4096, 32768):
    assert tuning.kernels_pay(rows, 4096, 4096, 1)
    assert not tuning.kernels_pay(rows, 2048, 2048, 1)
  assert not tuning.kernels_pay(1024, 4096, 4096, 1)
  for rows in (1, 16, 64, 256):
    for n in tuning.KERNELS:
      assert not tuning.kernels_pay(rows, n, n, 1)
  assert not tuning.kernels_pay(65536, 64, 64, 1)
