import jax
import jax.numpy as jnp

from research.bench import profiling


class Event:
  def __init__(self, name, nanoseconds):
    self.name, self.duration_ns = name, nanoseconds


class Named:
  def __init__(self, name, **parts):
    self.name = name
    vars(self).update(parts)


def test_a_cpu_has_no_kernels():
  call = jax.jit(lambda x: x @ x)
  assert profiling.kernels(lambda: call(jnp.ones((8, 8)))) == []


def test_kernels_are_added_up_by_name(monkeypatch):
  streams = [
    Named("Stream #1", events=[Event("gemm", 3e6), Event("add", 1e6)]),
    Named("Stream #2", events=[Event("gemm_2", 5e6)]),
    Named("XLA Ops", events=[Event("dot.1", 9e9)]),
  ]
  planes = [
    Named("/device:GPU:0", lines=streams),
    Named("/host:CPU", lines=streams),
  ]
  monkeypatch.setattr(
    jax.profiler.ProfileData,
    "from_file",
    lambda path: Named("data", planes=planes),
  )
  call = jax.jit(lambda x: x + 1)
  found = profiling.kernels(lambda: call(jnp.ones(4)), calls=2)
  assert found == [
    profiling.Kernel("gemm", 4.0, 1.0),
    profiling.Kernel("add", 0.5, 0.5),
  ]
