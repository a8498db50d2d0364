"""More formats of `fuzz.py`: public sets, and what runs keep for later ones."""

import io
import json
import os
import sys
import tarfile

import numpy as np

from models.errors import InputError
from research.codesign import accuracies
from research.evaluation import task_data
from research.language_model import curves
from research.predictors import new_rows, own_tasks, text_forms
from research.predictors.data_options import DataOptions
from research.predictors.tables import Layout
from research.regression_lm import best_parameters, data_sets, error_analysis
from research.regression_lm.transfer import parts
from research.regression_lm.transfer import run as transfer_run
from research.regression_lm.transfer.options import Tried
from research.regression_lm.transfer.setup import Found
from research.search import store
from research.sol import artefact as policy_artefact
from research.sol.options import Options as PolicyOptions
from research.sol.policy import InputStats
from research.text import prompts
from tests.fuzz import Format

_CELLS = """arch_str,val_acc_x,lat_a
|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|avg_pool_3x3~1|none~2|,90,1
|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|,10,
"""
_NETS = "block1_e,block1_k,acc\n3,5,70.5\n1,3,60\n"
_KERNELS = "block_size_x,tile_size_x,time_a\n32,1,2.5\n64,2,1.5\n"
_TASKS = "device,lr,opt,ms\na,0.1,x,2\nb,0.2,y,3\nb,0.3,x,\n"
_PROXIES = {"cifar10": {"(2, 1, 0, 1, 4, 1)": {"nwot": {"score": 7.5}}}}
_MMLU = "What is it?,a,b,c,d,B\nAnd that?,1,2,3,4,A\n"
_ARC = {"question": "a", "choices": ["b", "c"], "answer": 0}
_ANSWER = {"row": 3, "group": "add", "us": {"truth": 1.5, "median": 2.0}}
_NETWORK = {
  "d_model": 64,
  "ratio": 2,
  "fourier_layers": 1,
  "attention_layers": 0,
  "accuracy": 0.5,
}
_SETTINGS = {
  "score": 0.5,
  "settings": {"ensemble": 4, "grid": 17},
  "rows": [{"target": "us", "method": "a"}],
}
_LINES = [
  {
    "step": step,
    "loss": 2.0,
    "eval_loss": 2.5,
    "tokens": 64 * step,
    "step_seconds": 0.5,
    "tokens_per_second": 128.0,
  }
  for step in (1, 2)
]
_ORIGIN = {"device": "cpu x1", "commit": "0" * 40, "versions": {"jax": "0.11"}}


def _writes(name, content):
  data = content if isinstance(content, str) else json.dumps(content) + "\n"
  return lambda folder: (folder / name).write_bytes(data.encode())


def _set(kind, name, target):
  """Reads a public set as the scripts do."""
  options = DataOptions(kind=kind, targets=(target,))
  return lambda folder: data_sets.load(options, folder / name)


def _cells_and_proxies(folder):
  _writes("cells.csv", _CELLS)(folder)
  _writes("proxies.json", _PROXIES)(folder)


def _graphs(folder):
  np.savez(
    folder / "nasbench_graph_archs.npz",
    op_names=np.array(["gcn", "gat"]),
    index=np.array([7, 9]),
    link=np.array([[0, 1], [0, 0]]),
    ops=np.array([[0, 1], [1, 1]]),
  )
  np.savez(
    folder / "nasbench_graph_light.npz",
    cora_index=np.array([7, 9]),
    cora_perf=np.array([0.5, 0.75]),
  )


def _archive(folder):
  data = _MMLU.encode()
  with tarfile.open(folder / "mmlu.tar", "w") as archive:
    member = tarfile.TarInfo("mmlu/test/law_test.csv")
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
  # What follows are zeros.
  os.truncate(folder / "mmlu.tar", 2048)


def _folder_of_csv(folder):
  (folder / "mmlu/test").mkdir(parents=True)
  _writes("mmlu/test/law_test.csv", _MMLU)(folder)


def _run_of_lm(folder):
  text = "".join(json.dumps(line) + "\n" for line in _LINES)
  _writes("metrics.jsonl", text)(folder)
  _writes("flags.json", {"seed": 0})(folder)
  _writes("result.json", _ORIGIN)(folder)


def _read_run_of_lm(folder):
  return curves.read(folder, "mine")


def _policy(folder):
  draw = lambda *shape: np.ones(shape, np.float32)
  policy_artefact.save(
    folder,
    policy_artefact.Artefact(
      options=PolicyOptions(preset="J-2L", width=16).filled("frugal"),
      mode="frugal",
      model="toy",
      params={"head": {"bias": draw(3)}},
      stats=InputStats(
        hidden=draw(2, 4),
        embed=draw(2, 4),
        scalars=draw(2, 9),
        damage=draw(8, 3),
      ),
      prices=draw(5),
      spent=draw(5),
      scalar_stats=draw(2, 9),
      coefficients=draw(10, 3),
    ),
  )


def _part(folder):
  found = Found.of_points(np.arange(3.0), np.arange(4.0))
  parts.write(folder, "m", found, "us", 4, 0)


def _values(folder):
  kept = store.kept(lambda one: np.ones((1, 2)), folder / "values.jsonl", 1)
  kept([(0, 1), (2, 3)])


def _how(folder):
  (folder / "scratch").mkdir()
  _writes("scratch/how.json", {"settings": {"grid": 33}})(folder)


def _best(folder):
  params = {"a": np.ones((2, 3), np.float32)}
  best_parameters.Best(folder / "best.safetensors").offer(3, 0.5, params)


def _read_best(folder):
  like = {"a": np.ones((2, 3), np.float32)}
  return best_parameters.Best(folder / "best.safetensors").load(like)


def _read_flagfile(folder):
  sys.path.insert(0, "experiments")
  try:
    import flag_kinds
  finally:
    sys.path.pop(0)
  try:
    flag_kinds.parsed(["fuzz", f"--flagfile={folder / 'a.flags'}"])
  except flag_kinds.flags.Error as error:
    raise InputError(" ".join(str(error).split())) from error
  finally:
    flag_kinds.flags.FLAGS.unparse_flags()


SETS = {
  "nasbench201": Format(
    _writes("c.csv", _CELLS), "c.csv", _set("nasbench201", "c.csv", "lat_a")
  ),
  "accel_nasbench": Format(
    _writes("n.csv", _NETS), "n.csv", _set("accel_nasbench", "n.csv", "acc")
  ),
  "nasbench_graph": Format(
    _graphs, "nasbench_graph_archs.npz",
    _set("nasbench_graph", "", "cora_perf"),
  ),
  "nasbench_graph_light": Format(
    _graphs, "nasbench_graph_light.npz",
    _set("nasbench_graph", "", "cora_perf"),
  ),
  "kernel_tuner": Format(
    _writes("k.csv", _KERNELS), "k.csv",
    _set("kernel_tuner", "k.csv", "time_a"),
  ),
  "text_forms_cells": Format(
    _cells_and_proxies, "cells.csv",
    lambda folder: text_forms.load("nasbench201", folder / "cells.csv"),
  ),
  "text_forms_proxies": Format(
    _cells_and_proxies, "proxies.json",
    lambda folder: text_forms.load(
      "nasbench201", folder / "cells.csv", folder / "proxies.json"
    ),
  ),
  "text_forms_kernels": Format(
    _writes("k.csv", _KERNELS), "k.csv",
    lambda folder: text_forms.load("kernel_tuner", folder / "k.csv"),
  ),
  "own_tasks": Format(
    _writes("o.csv", _TASKS), "o.csv",
    lambda folder: own_tasks.read(
      own_tasks.Where(
        path=folder / "o.csv", targets=["ms"], task_column="device",
        new_task="b",
      )
    ).summary(),
  ),
  "new_rows": Format(
    _writes("k.csv", _KERNELS), "k.csv",
    lambda folder: new_rows.read(
      folder / "k.csv", ["time_a"], Layout(), columns=None
    ),
  ),
  "new_rows_jsonl": Format(
    _writes("k.jsonl", {"a": 1.5, "b": "x", "us": None}), "k.jsonl",
    lambda folder: new_rows.read(
      folder / "k.jsonl", ["us"], Layout(), columns=None
    ),
  ),
  "tasks_jsonl": Format(
    _writes("arc.jsonl", _ARC), "arc.jsonl",
    lambda folder: task_data.read_records(folder, ["arc"], "arc"),
  ),
  "tasks_csv": Format(
    _folder_of_csv, "mmlu/test/law_test.csv",
    lambda folder: task_data.read_records(folder, ["mmlu/test"], "mmlu"),
  ),
  "tasks_tar": Format(
    _archive, "mmlu.tar",
    lambda folder: task_data.read_records(folder, ["mmlu/test"], "mmlu"),
  ),
  "prompts": Format(
    _writes("p.jsonl", {"prompt": "a b"}), "p.jsonl",
    lambda folder: prompts.read(str(folder / "p.jsonl")),
  ),
  "answers": Format(
    _writes("a.jsonl", 2 * (json.dumps(_ANSWER) + "\n")), "a.jsonl",
    lambda folder: error_analysis.analyse(
      error_analysis.read(folder / "a.jsonl")
    ),
  ),
  "curves_metrics": Format(_run_of_lm, "metrics.jsonl", _read_run_of_lm),
  "curves_flags": Format(_run_of_lm, "flags.json", _read_run_of_lm),
  "curves_result": Format(_run_of_lm, "result.json", _read_run_of_lm),
  "policy": Format(_policy, "policy.json", policy_artefact.load),
  "policy_arrays": Format(
    _policy, "policy.safetensors", policy_artefact.load
  ),
  "transfer_settings": Format(
    _writes("r.json", _SETTINGS), "r.json",
    lambda folder: Tried.of_result(folder / "r.json"),
  ),
  "transfer_part": Format(
    _part, "m-us-4-0.npz",
    lambda folder: parts.read(folder / "m-us-4-0.npz"),
  ),
  "transfer_how": Format(_how, "scratch/how.json", transfer_run.kept),
  "best_parameters": Format(_best, "best.safetensors", _read_best),
  "codesign_accuracies": Format(
    _writes("a.json", {"rows": [_NETWORK]}), "a.json",
    lambda folder: accuracies.read([str(folder)], "text"),
  ),
  "codesign_csv": Format(
    _writes("a.csv", ",".join(_NETWORK) + "\n64,2,1,0,.5\n"), "a.csv",
    lambda folder: accuracies.read([str(folder / "a.csv")], "text"),
  ),
  "codesign_values": Format(
    _values, "values.jsonl",
    lambda folder: store.kept(None, folder / "values.jsonl", 1),
  ),
  "flagfile": Format(
    _writes("a.flags", "# a comment\n--verbosity=0\n--nologtostderr\n"),
    "a.flags", _read_flagfile,
  ),
}  # fmt: skip
