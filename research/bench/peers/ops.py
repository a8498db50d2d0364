"""What ops are compared with, in the same run: plain JAX, others, mamba_ssm.

A peer gets the same values, in as many sets of arrays as the op itself and in
the layout that it is fastest with; bringing them there is not timed.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from research.bench.case import Call, Row
from research.bench.suites import op_passes
from research.bench.suites.op_cases import Arrays, OpCase, floating
from research.bench.timing import cold_sets, in_turn


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

# Relative errors of peers beyond it are not of rounding, even to 8 bits.
_MOST_ERROR = 0.1

# Peers that compute something else, as `OpCase.others` names them.
_OTHERS = (
  "causal_attention",
  "sliding_window",
  "cudnn_attention",
  "xla_attention",
)

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


def details(peer: str, case: OpCase) -> tuple[str | None, ...]:
  """Names the ways of a peer to run an op: (None,) for one, () for no such op.

  Args:
    peer: of `specs.OP_PEERS`.
    case: the op.
  """
  if peer == "plain":
    return () if case.plain is None else (None,)
  if peer in _OTHERS:
    return (None,) if peer in case.others else ()
  if case.op not in _KERNELS:
    return ()
  ways = _KERNELS[case.op].details
  graphs = [_GRAPH if way is None else f"{way} {_GRAPH}" for way in ways]
  return *ways, *graphs


def missing(peer: str, op: str) -> str | None:
  """Says in one line why a peer's op is not here, or None."""
  if peer == "cudnn_attention" and jax.default_backend() != "gpu":
    return "cuDNN needs an NVIDIA GPU"
  if peer in ("plain", *_OTHERS) or op not in _KERNELS:
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
  case: OpCase,
  which: str,
  sets: Sequence[Arrays],
  detail: str | None = None,
) -> Call:
  """Prepares a pass of a peer that has the op; "peer_error" is a column of it.

  Args:
    peer: of `specs.OP_PEERS`.
    case: the op.
    which: "fwd", "bwd" or "fwd+bwd".
    sets: copies of the case's arrays that calls take in turn.
    detail: of `details`.
  """
  if peer in _OTHERS:
    call = _plain(case, which, sets, case.others[peer])
    # Its result is another.
    return dataclasses.replace(call, columns=lambda _: {"peer_error": None})
  if peer == "plain":
    if case.plain_arrays is not None:
      sets = cold_sets(case.plain_arrays(), jax.default_backend())
    return _plain(case, which, sets, case.plain)
  return _torch(case, which, sets, detail)


def _plain(
  case: OpCase,
  which: str,
  sets: Sequence[Arrays],
  function: Callable[[Arrays], jax.Array],
) -> Call:
  passes = op_passes.passes_of(sets, jax.default_backend())
  call = op_passes.prepare(function, sets, which, passes=passes)
  first = lambda output: np.asarray(jax.tree.leaves(output)[0])
  columns = functools.partial(_error, case, which, first)
  return Call(start=call, count=passes, columns=columns)


def _error(
  case: OpCase, which: str, y: Callable[[Any], np.ndarray], output: Any
) -> Row:
  """The error of y, which a backward alone does not return.

  Raises:
    ValueError: y is not what the op computes, so that its time says nothing.
  """
  if which == "bwd":
    return {"peer_error": None}
  error = op_passes.forward_error(case, y(output))
  if not error < _MOST_ERROR:
    raise ValueError(
      f"the result is another: its relative error is {error:.2g}"
    )
  return {"peer_error": error}


def _torch(case: OpCase, which: str, sets, detail) -> Call:
  torch, kernel = importlib.import_module("torch"), _KERNELS[case.op]
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
    count = op_passes.passes_of(sets, "gpu")
    call = _replayed(torch, call, count)
  return Call(
    start=call,
    wait=lambda _: torch.cuda.synchronize(),
    count=count,
    columns=functools.partial(_error, case, which, y),
  )


def _replayed(torch, call: Callable[[], Any], count: int) -> Callable[[], Any]:
  """Captures `count` calls in a CUDA graph; its replay returns what one did.

  The replay reads the arguments of the calls where they lay, so it holds
  `call`: memory of arguments that nothing holds is given to others.
  """
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

  def replay(_held=call):
    graph.replay()
    return out

  return replay
