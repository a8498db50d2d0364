"""Peers without torch: what is there, what is missing, and which is faster."""

import gc
import sys
import types
import weakref

import jax
import numpy as np
import pytest

from research.bench import ceilings, plan, timing
from research.bench.peers import ops as peers
from research.bench.suites import op_cases as cases
from research.bench.suites import ops
from research.cost.roofline import Ceilings

SCAN = "mamba_ssm.ops.selective_scan_interface"
SSD = "mamba_ssm.ops.triton.ssd_combined"


class Tensor:
  """As much of a torch tensor as a forward without gradients takes."""

  def __init__(self, value):
    self.value = np.asarray(value)

  def movedim(self, source, target):
    return Tensor(np.moveaxis(self.value, source, target))

  def clone(self, memory_format):
    return Tensor(self.value.copy(order=memory_format))

  def requires_grad_(self, value):
    assert not value
    return self

  detach = float = cpu = lambda self: self

  def numpy(self):
    return self.value


class Context:
  """A context of torch in which nothing is different."""

  def __init__(self, *_):
    pass

  __enter__ = __exit__ = wait_stream = lambda *_: None


class Graph:
  """A graph that counts its replays."""

  replays = 0

  def replay(self):
    Graph.replays += 1


@pytest.fixture
def install(monkeypatch):
  """Puts a torch, and modules with these attributes, in place."""

  def put(modules, cuda=True):
    torch = types.SimpleNamespace(
      cuda=types.SimpleNamespace(
        is_available=lambda: cuda,
        synchronize=lambda: None,
        Stream=Context,
        stream=Context,
        current_stream=Context,
        CUDAGraph=Graph,
        graph=Context,
      ),
      from_dlpack=Tensor,
      contiguous_format="C",
      no_grad=Context,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    for name in (SCAN, SSD, "causal_conv1d"):
      found = modules.get(name)
      module = found and types.SimpleNamespace(**found)
      monkeypatch.setitem(sys.modules, name, module)
      # An import of a submodule begins with its packages.
      package = name.split(".")
      for end in range(1, len(package)):
        parent = types.ModuleType(".".join(package[:end]))
        monkeypatch.setitem(sys.modules, parent.__name__, parent)

  return put


def test_every_op_is_looked_for_by_itself(install):
  install({SSD: {"mamba_chunk_scan_combined": print}})
  assert peers.missing("mamba_ssm", "ssd") is None
  assert SCAN in peers.missing("mamba_ssm", "selective_scan")
  assert "causal_conv1d" in peers.missing("mamba_ssm", "causal_conv1d")
  install({"causal_conv1d": {"causal_conv1d_fn": print}})
  assert SSD in peers.missing("mamba_ssm", "ssd")
  assert peers.missing("mamba_ssm", "causal_conv1d") is None


def test_a_scan_without_its_extension_is_missing(install):
  scan = {"selective_scan_fn": print, "selective_scan_cuda": None}
  install({SCAN: scan})
  found = peers.missing("mamba_ssm", "selective_scan")
  assert found == f"{SCAN} has no selective_scan_cuda"
  install({SCAN: scan | {"selective_scan_cuda": print}})
  assert peers.missing("mamba_ssm", "selective_scan") is None


def test_a_missing_torch_or_device_says_why(install, monkeypatch):
  install({}, cuda=False)
  for op in ("ssd", "selective_scan", "causal_conv1d"):
    assert peers.missing("mamba_ssm", op) == "torch sees no CUDA device"
  monkeypatch.setitem(sys.modules, "torch", None)
  assert "torch" in peers.missing("mamba_ssm", "ssd")
  # It has no such op, with or without torch.
  assert peers.missing("mamba_ssm", "token_logprob") is None
  assert peers.missing("plain", "ssd") is None


def test_tokens_last_and_back(install):
  case = cases.build("causal_conv1d", "tiny:2x8", "float32")

  def convolve(x, weight, bias, activation):
    assert x.value.shape == (2, 64, 8) and x.value.flags.c_contiguous
    assert activation == "silu"
    arrays = {"x": np.moveaxis(x.value, -1, 1), "weight": weight.value}
    return Tensor(np.moveaxis(case.plain(arrays | {"bias": bias.value}), 1, -1))

  install({"causal_conv1d": {"causal_conv1d_fn": convolve}})
  for detail in peers.details("mamba_ssm", case):
    made = peers.make("mamba_ssm", case, "fwd", [case.arrays], detail)
    Graph.replays = 0
    assert made.columns(made.start())["peer_error"] < 1e-5
    assert Graph.replays == (detail == "CUDA graph")
    assert made.count == (8 if detail == "CUDA graph" else 1)


def test_another_result_is_no_peer(install):
  case = cases.build("causal_conv1d", "tiny:2x8", "float32")
  for wrong in (np.nan, 1.0):
    convolve = lambda x, *_, **__: Tensor(x.value + wrong)  # noqa: B023
    install({"causal_conv1d": {"causal_conv1d_fn": convolve}})
    made = peers.make("mamba_ssm", case, "fwd", [case.arrays], None)
    with pytest.raises(ValueError, match="the result is another"):
      made.columns(made.start())


def test_a_graph_holds_what_its_replay_reads(install):
  case, read = cases.build("causal_conv1d", "tiny:2x8", "float32"), []

  def convolve(x, weight, bias, activation):
    read.extend(map(weakref.ref, (x, weight, bias)))
    return x

  install({"causal_conv1d": {"causal_conv1d_fn": convolve}})
  made = peers.make("mamba_ssm", case, "fwd", [case.arrays], "CUDA graph")
  gc.collect()
  assert read and all(argument() is not None for argument in read)
  del made
  gc.collect()
  assert not any(argument() for argument in read)


def test_the_better_chunk_size_counts(install, monkeypatch):
  case = cases.build("ssd", "tiny:1x8", "float32")
  asked = []

  def scan(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus):
    asked.append(chunk_size)
    if chunk_size == slow.get("fails"):
      raise RuntimeError("out of\nmemory")
    arrays = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    arrays |= {"D": D, "dt_bias": dt_bias}
    values = {name: jax.numpy.asarray(t.value) for name, t in arrays.items()}
    y = Tensor(case.plain(values))
    y.chunk = chunk_size
    return y

  def medians(calls, **_):
    found = []
    for call in calls:
      try:
        slowly = getattr(call.start(), "chunk", None) == slow["slow"]
        found.append(timing.Timed((1 + slowly) * 1e-3 / call.count, 0.1))
      except RuntimeError as error:
        found.append(error)
    return found

  install({SSD: {"mamba_chunk_scan_combined": scan}})
  monkeypatch.setattr(timing, "medians", medians)
  limits = Ceilings(flops=1e12, bytes=1e11), "measured"
  monkeypatch.setattr(ceilings, "find", lambda dtype: limits)
  options = plan.Plan(passes=["fwd"], peers=["mamba_ssm"])
  suite = ops.Suite(ops=["ssd"], dtype=["float32"])
  for slow in ({"slow": 128}, {"slow": 256}, {"slow": 256, "fails": 128}):
    asked.clear()
    notes = []
    listed = suite.cases(options, notes.append)
    (row,) = plan.run(listed, options, print, notes.append)
    assert set(asked) == {128, 256}
    better = slow.get("fails") and 256 or 384 - slow["slow"]
    # A graph makes several passes in the time that this test gives a call.
    assert row["peer_detail"] == f"chunk {better} CUDA graph"
    assert row["peer_error"] < 1e-5
    assert row["peer_ms"] == (2.0 if "fails" in slow else 1.0) / 8
  # A graph fails when it is captured, before any is timed.
  assert notes == [
    f"ssd peer mamba_ssm fwd chunk 128{way} failed: RuntimeError: out of memory"
    for way in (" CUDA graph", "")
  ]
