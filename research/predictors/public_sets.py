"""Loaders of public sets of measurements, from the files they come in.

None ships with the repository, but for a slice of the last. NAS-Bench-201 (Dong
and Yang 2020) is joined with latencies of HELP (Lee et al. 2021);
NAS-Bench-Graph (Qin et al. 2022); Accel-NASBench (Ahmad et al. 2023); timings
of KernelBench (Ouyang et al. 2025); tuning spaces of Kernel Tuner (van
Werkhoven 2019); JAX programs that `research.program_metrics` wrote and
measured.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from models import arrays as arrays_lib
from models.errors import InputError, shown
from research.predictors import kernelbench as kernelbench_files
from research.predictors import reading, tables
from research.predictors.cells import Spelling
from research.predictors.tables import Layout, Table

# NAS-Bench-201: operation on the edge from node to node, in the file's order.
_EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
_PATHS = ((0, 3), (0, 1, 3), (0, 2, 3), (0, 1, 2, 3))
# Operations and the word that a text has for each: one token of a small BPE.
_OPS = {
  "none": "none",
  "skip_connect": "skip",
  "nor_conv_1x1": "point",
  "nor_conv_3x3": "conv",
  "avg_pool_3x3": "pool",
}


def nasbench201(path: pathlib.Path, targets: Sequence[str]) -> Table:
  """Cells of operations on six edges, by what of them carries data.

  A path from input to output with "none" carries nothing, and a skip does
  nothing. So the text tells, and the features count, the operations on live
  edges, the live paths, the most convolutions on one, and the sequences of
  operations along them with skips left out (the path encoding of White et al.
  2019, arXiv:1910.11858, of an equivalent cell). Text and features say the
  same.
  """
  rows = reading.csv_rows(path)
  words = [word for word in _OPS.values() if word not in ("none", "skip")]
  kinds = [
    ops
    for length in range(4)
    for ops in itertools.product(words, repeat=length)
  ]
  index = {ops: i for i, ops in enumerate(kinds)}
  features = np.zeros((len(rows), len(kinds) + len(_OPS) + 1))
  for i, row in enumerate(rows):
    if row.get("arch_str") is None:
      raise InputError(f"{path}: has no column 'arch_str'")
    live, paths = _live(row["arch_str"])
    counts = [live.count(word) for word in list(_OPS.values())[1:]]
    depth = max((_convolutions(ops) for ops in paths), default=0)
    features[i, len(kinds) :] = [*counts, len(paths), depth]
    for ops in paths:
      features[i, index[ops]] += 1
    said = [f"{word} {n}" for word, n in zip(list(_OPS.values())[1:], counts)]
    written = " ; ".join(" ".join(ops) or "skip" for ops in sorted(paths))
    row["text"] = (
      f"depth {depth} {' '.join(said)} paths {len(paths)} {written}".strip()
    )
  return _with_features(path, rows, targets, features)


def _live(cell: str) -> tuple[list[str], list[tuple[str, ...]]]:
  """Words of the edges that carry data, and of the paths, without skips."""
  op_of = dict(zip(_EDGES, _cell_ops(cell)))
  alive = [
    edges
    for edges in (list(itertools.pairwise(nodes)) for nodes in _PATHS)
    if all(op_of[edge] != "none" for edge in edges)
  ]
  used = sorted({edge for edges in alive for edge in edges})
  word = lambda edge: _OPS[op_of[edge]]
  paths = [
    tuple(word(edge) for edge in edges if word(edge) != "skip")
    for edges in alive
  ]
  return [word(edge) for edge in used], paths


def _convolutions(ops: Sequence[str]) -> int:
  return sum(word in ("conv", "point") for word in ops)


def _cell_ops(cell: str) -> list[str]:
  """Operations of a cell's six edges.

  Raises:
    InputError: it is no such cell.
  """
  names = [part.split("~")[0] for part in cell.replace("+", "").split("|")]
  names = [name for name in names if name]
  if len(names) != len(_EDGES) or not set(names) <= set(_OPS):
    raise InputError(f"{shown(cell)} is no cell of NAS-Bench-201")
  return names


def kernelbench(path: pathlib.Path, targets: Sequence[str]) -> Table:
  """Programs with the machine and the mode of each timing, grouped by problem.

  Args:
    path: folder with kernelbench_sources.jsonl.gz and
      kernelbench_timings.csv.gz.
    targets: columns of the timings, such as mean_ms.
  """
  codes, rows = kernelbench_files.read(path)
  for row in rows:
    row["text"] = (
      f"gpu: {row['hardware']}\nrun: {row['run']}\nmode: {row['mode']}\n"
      f"{codes[row['src']]}"
    )
  return tables.make_table(
    path, rows, targets, lambda row: row["text"], lambda row: row["problem"]
  )


def kernel_tuner(path: pathlib.Path, targets: Sequence[str]) -> Table:
  """Settings of a GPU kernel, such as block_size_x, with times by GPU."""
  rows = reading.csv_rows(path)
  others = [name for name in rows[0] if name.startswith("time_")]
  others = [name for name in others if name not in targets]
  return tables.read_csv(path, targets, Layout(leave_out=tuple(others)))


def accel_nasbench(path: pathlib.Path, targets: Sequence[str]) -> Table:
  """Blocks of a mobile network, as expansion, kernel, layers, squeeze."""
  rows = reading.csv_rows(path)
  names = [name for name in rows[0] if name.startswith("block")]
  for row in rows:
    blocks: dict[str, list[str]] = {}
    for name in names:
      block, _, part = name.partition("_")
      blocks.setdefault(block, []).append(f"{part}{row[name]}")
    row["text"] = " | ".join(
      f"{block} {' '.join(parts)}" for block, parts in blocks.items()
    )
  features = np.array([[_number(path, row, n) for n in names] for row in rows])
  return _with_features(path, rows, targets, features)


def _number(path: pathlib.Path, row: reading.Row, name: str) -> float:
  number = Spelling().number(row[name])
  if number is None:
    raise InputError(
      f"{reading.place(path, row)}: {name} is {reading.shown(row[name])}, which"
      " is no number: get the file again"
    )
  return number


def nasbench_graph(path: pathlib.Path, targets: Sequence[str]) -> Table:
  """Graph networks of four operations; targets such as cora_perf.

  Args:
    path: folder with nasbench_graph_archs.npz and nasbench_graph_light.npz.
    targets: arrays of the latter.
  """
  archs = _load_npz(path / "nasbench_graph_archs.npz")
  light = _load_npz(path / "nasbench_graph_light.npz")
  names = [str(name) for name in archs["op_names"]]
  rows, features = [], []
  for number, link, ops in zip(archs["index"], archs["link"], archs["ops"]):
    parts = [f"{names[op]} of {source}" for op, source in zip(ops, link)]
    rows.append({"number": int(number), "text": " ; ".join(parts)})
    one_hot = np.eye(len(names))[ops].ravel()
    features.append(np.concatenate([one_hot, np.eye(5)[link].ravel()]))
  by_number = {row["number"]: row for row in rows}
  for name in targets:
    numbers = light.get(f"{name.split('_')[0]}_index")
    if name not in light or numbers is None:
      raise InputError(
        f"{path}: has no target {name!r}, but {', '.join(list(light)[:12])}"
      )
    for number, value in zip(numbers, light[name]):
      by_number[int(number)][name] = float(value)
  return _with_features(path, rows, targets, np.array(features))


def _load_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.exists():
    raise InputError(f"{path}: no such file")
  return arrays_lib.read_npz(path)


def _with_features(path, rows, targets, features) -> Table:
  """A table whose features follow the rows that are kept."""
  for number, row in enumerate(rows):
    row["_row"] = number
  found = tables.make_table(
    path,
    rows,
    targets,
    lambda row: row["text"],
    lambda row: row["_row"],
  )
  kept = np.array([int(name) for name in found.groups])
  return dataclasses.replace(found, groups=found.texts, features=features[kept])


SETS: dict[str, Callable[[pathlib.Path, Sequence[str]], Table]] = {
  "nasbench201": nasbench201,
  "kernelbench": kernelbench,
  "kernel_tuner": kernel_tuner,
  "accel_nasbench": accel_nasbench,
  "nasbench_graph": nasbench_graph,
}
