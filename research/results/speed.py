"""Rows of a benchmark as a table in Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.core.report import markdown_table

Row = Mapping[str, Any]
Rows = Sequence[Row]

# Scans of SOL that leave parts out tell where the time of the whole scan goes.
_PARTS = re.compile(r"scan/(?!uniform$|policy$)|prefill\+stats$")
# A pattern of a kernel's name -> what the kernel does.
_KERNELS = {
  r"^transformer_step_attend|^paged_sparse|^chunked_attention": "attention",
  r"nvjet|gemm|cublas|cutlass|^transformer_step": "matrix products",
  r"^ssd|^selective_scan": "scans",
  r"^causal_conv1d": "convolutions",
  r"^token_logprob": "logits and their gradients",
  r"cudnn": "attention",
}
_REST = "norms, gates, sums and all else"
# What a case is called by; absent columns are left out.
_NAMES = ("op", "model", "shape", "dtype", "pass", "implementation")


def table(rows: Rows) -> str:
  """One line a case, implementation and peer; times in milliseconds.

  Below it stand what the time of a profiled case goes to, and the rates that
  were measured where floors are not of a data sheet.
  """
  rows = [_row_of_today(row) for row in _joined(rows)]
  shown = [row for row in rows if not _PARTS.match(row["op"])] or rows
  lines = [_line(row) for row in shown]
  common = _common(lines)
  found = set().union(*lines) - common.keys()
  text = markdown_table(lines, [name for name in _COLUMNS if name in found])
  if common:
    same = ", ".join(f"{name} {value}" for name, value in common.items())
    text = f"All rows: {same}.\n\n{text}"
  # A case beside several peers has a row of each, and was profiled once.
  for spent in dict.fromkeys(_profile(r) for r in shown if r.get("kernels")):
    text += f"\n{spent}\n"
  measured = [row for row in rows if row.get("peak") == "measured"]
  ceilings = dict.fromkeys(_ceiling(r) for r in measured if _RATE in r)
  if ceilings:
    text += f"\nCeilings: {'; '.join(ceilings)}.\n"
  return text


# Of the memory, where a row has it.
_RATE = "peak_gb_per_s"
_COLUMNS = (
  *_NAMES,
  *("ms", "tokens/s", "texts/s", "peer", "peer ms", "ms / peer ms"),
  *("floor ms", "floor of", "floor of bytes, ms", "share"),
  *("error", "error, full"),
)


def _line(row: Row) -> dict[str, str]:
  """The cells of a row; what is null or absent has none."""
  line = {name: row[name] for name in _NAMES if row.get(name) is not None}
  for key, name, form in (
    ("matmul_precision", "dtype", "{dtype}, {}"),
    ("ms", "ms", "{:,.3f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("texts_per_second", "texts/s", "{:,.1f}"),
    ("peer", "peer", "{}"),
    ("peer_detail", "peer", "{peer}, {}"),
    ("peer_ms", "peer ms", "{:,.3f}"),
    ("floor_ms", "floor ms", "{:,.3f}"),
    ("bound", "floor of", "{}"),
    ("floor_bytes_ms", "floor of bytes, ms", "{:,.3f}"),
    ("share", "share", "{:.1%}"),
    ("error", "error", "{:.1e}"),
    ("error_full", "error, full", "{:.1e}"),
  ):
    if row.get(key) is not None:
      line[name] = form.format(row[key], **line)
  for part in ("weights", "state"):
    kept = row.get(f"{part}_format", row.get("dtype"))
    if kept != row.get("dtype"):
      line["dtype"] += f", {part} {kept}"
  if row.get("bound") == "bytes":
    del line["floor of bytes, ms"]  # It is the floor.
  if row.get("ms") and row.get("peer_ms"):
    line["ms / peer ms"] = f"{row['ms'] / row['peer_ms']:.2f}"
  return line


def _common(lines: Sequence[Mapping[str, str]]) -> dict[str, str]:
  """The names that all of some lines share: to be said once."""
  if len(lines) < 2:
    return {}
  names = *_NAMES, "floor of"
  sets = {name: {line.get(name) for line in lines} for name in names}
  return {k: v for k, (v, *more) in sets.items() if v is not None and not more}


def _ceiling(row: Row) -> str:
  kinds = row["dtype"], row.get("matmul_precision")
  kind = ", ".join(kind for kind in kinds if kind)
  rate, bandwidth = row["peak_tflops"], row[_RATE]
  return f"{rate:,.3g} TFLOP/s, {bandwidth:,.1f} GB/s ({kind})"


def _profile(row: Row) -> str:
  """What the time of a profiled case goes to, in a sentence."""
  names = "model", "shape", "pass", "implementation"
  what = ", ".join(row[name] for name in names if row.get(name))
  digits = 2 if row["ms"] >= 0.5 else 4
  spent = "; ".join(f"{k} {ms:.{digits}f}" for k, ms in _spent(row).items())
  return f"{row['op']} of {what}, ms by kind of kernel: {spent}."


def _spent(row: Row) -> dict[str, float]:
  """Milliseconds by kind of kernel."""
  spent = dict.fromkeys(_KERNELS.values(), 0.0)
  for kernel in row["kernels"]:
    for pattern, kind in _KERNELS.items():
      if re.search(pattern, kernel["name"]):
        spent[kind] += kernel["ms"]
        break
  spent = {kind: ms for kind, ms in spent.items() if ms}
  return spent | {_REST: row["busy_ms"] - sum(spent.values())}


def _joined(rows: Rows) -> Iterator[Row]:
  """Puts rows of a peer, as regression LMs' had once, beside those of ours."""
  key = lambda row: tuple(row[k] for k in ("work", "model", "shape", "dtype"))
  peers = [row for row in rows if row.get("system") == "regress-lm"]
  met = {key(row) for row in peers}
  ours = {key(row): row for row in rows if row.get("system") == "frugax"}
  for row in peers:
    own = ours.get(key(row), dict.fromkeys(("seconds", "setting")))
    detail = row["setting"] + ", not compiled" * (not row.get("compiled", True))
    if row.get("timed_texts", row.get("texts")) != row.get("texts"):
      detail += f", scaled up from {row['timed_texts']} texts"
    names = {name: row[name] for name in ("work", "model", "shape", "dtype")}
    yield {
      **names,
      **own,
      "peer": row["system"],
      "peer_detail": detail,
      "peer_ms": 1e3 * row["seconds"],
    }
  for row in rows:
    if "system" not in row or (row not in peers and key(row) not in met):
      yield row


def _row_of_today(row: Row) -> Row:
  """A row of a benchmark of regression LMs, or of an older one, as others."""
  if "state_dtype" in row:
    row = {**row, "state_format": row["state_dtype"]}
  if "copy_gb_per_s" in row:
    rates = row["matmul_tflops"], row["copy_gb_per_s"]
    row = {
      "peak": "measured",
      **row,
      **dict(zip(("peak_tflops", _RATE), rates)),
    }
  if "work" not in row:
    return row
  named = {"op": row["work"], "ms": None}
  if row["seconds"] is not None:
    named |= {
      "implementation": f"{row['attention']} attention",
      "ms": 1e3 * row["seconds"],
      "texts_per_second": row["examples_per_second"],
      "floor_ms": 1e3 * row["floor_seconds"],
    }
    if row["setting"] != row["dtype"]:
      named["matmul_precision"] = row["setting"]
  return {**row, **named}
