"""What ops are compared with, in the same run: plain JAX, and mamba_ssm.

A peer gets the same values, in the layout that it is fastest with; bringing
them there is not timed.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from research.bench import measure
from research.bench.cases import Case, floating


@dataclasses.dataclass(frozen=True)
class Run:
  """A computation of a peer, ready to be timed.

  Attributes:
    call: starts it.
    wait: waits for what `call` returned.
    y: y in NumPy, from what `call` returned; None for a backward alone.
  """

  call: Callable[[], Any]
  wait: Callable[[Any], Any]
  y: Callable[[Any], np.ndarray] | None


def missing(peer: str) -> str | None:
  """Says in one line why a peer is not here, or None."""
  if peer == "plain":
    return None
  try:
    for module in ("torch", "mamba_ssm", "causal_conv1d"):
      found = importlib.import_module(module)
      if module == "torch" and not found.cuda.is_available():
        return "torch sees no CUDA device"
  except Exception as error:  # a build for another torch fails in any way
    return f"{type(error).__name__}: {error}".splitlines()[0]
  return None


def make(peer: str, case: Case, which: str) -> Run | None:
  """Prepares a pass of a peer, or None where it has no such op.

  Args:
    peer: a key of `PEERS`.
    case: the op and its arrays.
    which: "fwd", "bwd" or "fwd+bwd".
  """
  return PEERS[peer](case, which)


def _plain(case: Case, which: str) -> Run | None:
  if case.plain is None:
    return None
  call = measure.prepare(case.plain, case.arrays, which)
  y = (
    None if which == "bwd" else lambda out: np.asarray(jax.tree.leaves(out)[0])
  )
  return Run(call, jax.block_until_ready, y)


def _mamba_ssm(case: Case, which: str) -> Run | None:
  if case.op not in _TORCH:
    return None
  torch = importlib.import_module("torch")
  differentiated = floating(case.arrays)
  tensors = {
    name: torch.from_dlpack(value).clone().requires_grad_(
      which != "fwd" and name in differentiated
    )
    for name, value in case.arrays.items()
  }  # fmt: skip
  leaves = [tensors[name] for name in differentiated]
  prepare, function, back = _TORCH[case.op]
  # The layout that it wants, with gradients that reach the leaves.
  forward = lambda: function(prepare(tensors))
  y = lambda out: back(out).detach().float().cpu().numpy()
  wait = lambda _: torch.cuda.synchronize()
  if which == "fwd":
    ready = {k: v.contiguous() for k, v in prepare(tensors).items()}

    def infer():
      with torch.no_grad():
        return function(ready)

    return Run(infer, wait, y)
  out = forward()
  outer = torch.randn_like(out)
  gradients = lambda out, keep: torch.autograd.grad(
    out, leaves, outer, retain_graph=keep
  )
  if which == "bwd":
    return Run(lambda: gradients(out, True), wait, None)

  def both():
    result = forward()
    gradients(result, False)
    return result

  return Run(both, wait, y)


def _transposed(names: str) -> Callable[[Mapping], dict]:
  """Tokens last for the arrays of these names: (B, L, ...) to (B, ..., L)."""

  def prepare(tensors):
    moved = {name: tensors[name].movedim(1, -1) for name in names.split()}
    return dict(tensors) | moved

  return prepare


def _selective_scan(t):
  module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
  return module.selective_scan_fn(
    *(t["x"], t["dt"], t["A"], t["B"], t["C"]),
    D=t["D"],
    z=t["z"],
    delta_bias=t["dt_bias"],
    delta_softplus=True,
  )


def _ssd(t):
  module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
  return module.mamba_chunk_scan_combined(
    *(t["x"], t["dt"], t["A"], t["B"], t["C"]),
    chunk_size=256,
    D=t["D"],
    dt_bias=t["dt_bias"],
    dt_softplus=True,
  )


def _causal_conv1d(t):
  function = importlib.import_module("causal_conv1d").causal_conv1d_fn
  return function(t["x"], t["weight"], t["bias"], activation="silu")


_tokens_second = lambda y: y.movedim(-1, 1)
_TORCH = {
  "selective_scan": (
    _transposed("x dt B C z"),
    _selective_scan,
    _tokens_second,
  ),
  "ssd": (dict, _ssd, lambda y: y),
  "causal_conv1d": (_transposed("x"), _causal_conv1d, _tokens_second),
}

PEERS = {"plain": _plain, "mamba_ssm": _mamba_ssm}
