"""What ops are compared with, in the same run: plain JAX, and mamba_ssm.

A peer gets the same values, in as many sets of arrays as the op itself and in
the layout that it is fastest with; bringing them there is not timed.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research.bench.suites import op_passes as measure
from research.bench.suites.op_cases import Arrays, Case, floating
from research.bench.timing import in_turn

PEERS = ("plain", "mamba_ssm")


@dataclasses.dataclass(frozen=True)
class Run:
  """A computation of a peer, ready to be timed.

  Attributes:
    call: starts it.
    wait: waits for what `call` returned.
    y: y in NumPy, from what `call` returned; None for a backward alone.
    passes: that a call makes.
  """

  call: Callable[[], Any]
  wait: Callable[[Any], Any]
  y: Callable[[Any], np.ndarray] | None
  passes: int = 1


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """An op of a torch package.

  Attributes:
    module: that has it.
    needs: names in the module, the function first; what was not built may be
      None.
    call: (function, tensors by name, detail) to y.
    tokens_last: names of arrays that it takes as (B, ..., L); y is so too.
    details: ways to run it that are timed each; the fastest counts.
  """

  module: str
  needs: tuple[str, ...]
  call: Callable[[Callable, Mapping[str, Any], str | None], Any]
  tokens_last: frozenset[str] = frozenset()
  details: tuple[str | None, ...] = (None,)


def _selective_scan(function, t, _):
  return function(
    *(t["x"], t["dt"], t["A"], t["B"], t["C"]),
    D=t["D"],
    z=t["z"],
    delta_bias=t["dt_bias"],
    delta_softplus=True,
  )


def _ssd(function, t, detail):
  return function(
    *(t["x"], t["dt"], t["A"], t["B"], t["C"]),
    chunk_size=int(detail.split()[1]),
    D=t["D"],
    dt_bias=t["dt_bias"],
    dt_softplus=True,
  )


def _causal_conv1d(function, t, _):
  return function(t["x"], t["weight"], t["bias"], activation="silu")


# Replayed: to launch kernels from Python may take longer than they do.
_GRAPH = "CUDA graph"

_KERNELS = {
  "selective_scan": _Kernel(
    module="mamba_ssm.ops.selective_scan_interface",
    needs=("selective_scan_fn", "selective_scan_cuda"),
    call=_selective_scan,
    tokens_last=frozenset({"x", "dt", "B", "C", "z"}),
  ),
  "ssd": _Kernel(
    module="mamba_ssm.ops.triton.ssd_combined",
    needs=("mamba_chunk_scan_combined",),
    call=_ssd,
    details=("chunk 128", "chunk 256"),
  ),
  "causal_conv1d": _Kernel(
    module="causal_conv1d",
    needs=("causal_conv1d_fn",),
    call=_causal_conv1d,
    tokens_last=frozenset({"x"}),
  ),
}


def details(peer: str, case: Case) -> tuple[str | None, ...]:
  """Names the ways of a peer to run an op: (None,) for one, () for no such op.

  Args:
    peer: of `PEERS`.
    case: the op.
  """
  if peer == "plain":
    return () if case.plain is None else (None,)
  if case.op not in _KERNELS:
    return ()
  ways = _KERNELS[case.op].details
  graphs = [_GRAPH if way is None else f"{way} {_GRAPH}" for way in ways]
  return *ways, *graphs


def missing(peer: str, op: str) -> str | None:
  """Says in one line why a peer's op is not here, or None."""
  if peer == "plain" or op not in _KERNELS:
    return None
  kernel = _KERNELS[op]
  try:
    if not importlib.import_module("torch").cuda.is_available():
      return "torch sees no CUDA device"
    module = importlib.import_module(kernel.module)
  except Exception as error:  # a build for another torch fails in any way
    return f"{type(error).__name__}: {error}".splitlines()[0]
  for name in kernel.needs:
    if getattr(module, name, None) is None:
      return f"{kernel.module} has no {name}"
  return None


def make(
  peer: str,
  case: Case,
  which: str,
  sets: Sequence[Arrays],
  detail: str | None = None,
) -> Run:
  """Prepares a pass of a peer that has the op.

  Args:
    peer: of `PEERS`.
    case: the op.
    which: "fwd", "bwd" or "fwd+bwd".
    sets: copies of the case's arrays that calls take in turn.
    detail: of `details`.
  """
  if peer == "plain":
    return _plain(case, which, sets)
  return _torch(_KERNELS[case.op], which, sets, detail)


def _plain(case: Case, which: str, sets: Sequence[Arrays]) -> Run:
  passes = measure.passes_of(sets, jax.default_backend())
  call = measure.prepare(case.plain, sets, which, passes=passes)
  first = lambda out: np.asarray(jax.tree.leaves(out)[0])
  y = None if which == "bwd" else first
  return Run(call, jax.block_until_ready, y, passes)


def _torch(kernel: _Kernel, which: str, sets, detail) -> Run:
  torch = importlib.import_module("torch")
  function = getattr(importlib.import_module(kernel.module), kernel.needs[0])

  def tensor(name, value, differentiated):
    value = torch.from_dlpack(value)
    if name in kernel.tokens_last:
      value = value.movedim(1, -1)
    value = value.clone(memory_format=torch.contiguous_format)
    return value.requires_grad_(differentiated)

  def passes(arrays):
    leaves = set() if which == "fwd" else floating(arrays).keys()
    tensors = {n: tensor(n, v, n in leaves) for n, v in arrays.items()}
    forward = lambda: kernel.call(function, tensors, detail)
    if which == "fwd":

      def infer():
        with torch.no_grad():
          return forward()

      return infer
    out = forward()
    outer = torch.randn_like(out)
    gradients = lambda out, keep: torch.autograd.grad(
      out, [tensors[name] for name in leaves], outer, retain_graph=keep
    )
    if which == "bwd":
      return lambda: gradients(out, True)

    def both():
      result = forward()
      gradients(result, False)
      return result

    return both

  def y(out):
    out = out.movedim(-1, 1) if kernel.tokens_last else out
    return out.detach().float().cpu().numpy()

  call, count = in_turn([passes(arrays) for arrays in sets]), 1
  if detail and detail.endswith(_GRAPH):
    count = measure.passes_of(sets, "gpu")
    call = _replayed(torch, call, count)
  return Run(
    call,
    lambda _: torch.cuda.synchronize(),
    None if which == "bwd" else y,
    count,
  )


def _replayed(torch, call: Callable[[], Any], count: int) -> Callable[[], Any]:
  """Captures `count` calls in a CUDA graph; its replay returns what one did."""
  aside = torch.cuda.Stream()
  with torch.cuda.stream(aside):
    # Autotuning and first allocations cannot be captured.
    for _ in range(max(count, 3)):
      call()
  torch.cuda.current_stream().wait_stream(aside)
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    for _ in range(count):
      out = call()

  def replay():
    graph.replay()
    return out

  return replay
