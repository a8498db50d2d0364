"""Result rows of language models as Markdown."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Rows = Sequence[Mapping[str, Any]]

# Of a kernel's name -> what it does.
_KINDS = {
  r"nvjet|gemm|cublas|cutlass": "matrix products",
  r"^ssd|^selective_scan": "scans",
  r"^causal_conv1d": "convolutions",
  r"^token_logprob": "logits and their gradients",
  r"cudnn": "attention",
}
_REST = "norms, gates, sums and all else"


def runs(rows: Rows) -> str:
  """One line a training run."""
  lines = [
    {
      "model": row["model"],
      "tokens": f"{row['budget'] / 1e6:,.1f}M",
      "held-out perplexity": f"{row['value']:.2f}",
      "seconds of updates": f"{row['seconds']:,.0f}",
      "tokens/s": f"{row['tokens_per_second']:,.0f}",
      "MFU": "" if row["mfu"] is None else f"{row['mfu']:.1%}",
    }
    for row in rows
  ]
  return markdown_table(lines, list(lines[0]))


def _speed(row: Mapping[str, Any], share: str) -> dict[str, str]:
  return {
    "model": row["model"],
    "shape": row["shape"],
    "implementation": row["implementation"],
    "ms": f"{row['ms']:,.3f}",
    "tokens/s": f"{row['tokens_per_second']:,.0f}",
    "floor ms": f"{row['floor_ms']:,.3f}",
    share: f"{row['share']:.1%}",
  }


def decoding(rows: Rows) -> str:
  """One line a model, batch and implementation; milliseconds a token."""
  lines = []
  for row in rows:
    line = _speed(row, "share") | {"error": f"{row['error']:.1e}"}
    if row["peer_ms"] is not None:
      line["peer"] = f"{row['peer']}, {row['peer_detail']}"
      line["peer ms"] = f"{row['peer_ms']:,.3f}"
      line["ms / peer ms"] = f"{row['ms'] / row['peer_ms']:.2f}"
    lines.append(line)
  peer = ("peer", "peer ms", "ms / peer ms")
  columns = [name for name in lines[0] if name not in peer]
  return markdown_table(lines, [*columns, *peer])


def updates(rows: Rows) -> str:
  """One line an update, and below what its time goes to."""
  lines = [_speed(row, "MFU") for row in rows]
  table = markdown_table(lines, list(lines[0]))
  for row in rows:
    if row.get("kernels"):
      spent = "; ".join(f"{k} {ms:.1f}" for k, ms in _spent(row).items())
      table += f"\n{row['model']}, ms by kind of kernel: {spent}.\n"
  return table


def _spent(row: Mapping[str, Any]) -> dict[str, float]:
  """Milliseconds by kind of kernel."""
  spent = dict.fromkeys(_KINDS.values(), 0.0)
  for kernel in row["kernels"]:
    for pattern, kind in _KINDS.items():
      if re.search(pattern, kernel["name"]):
        spent[kind] += kernel["ms"]
        break
  spent = {kind: ms for kind, ms in spent.items() if ms}
  return spent | {_REST: row["busy_ms"] - sum(spent.values())}


# The key that tells rows of a kind -> their table.
KINDS: dict[str, Callable[[Rows], str]] = {
  "tokens_curve": runs,
  "bytes_moved": decoding,
  "compile_seconds": updates,
}
