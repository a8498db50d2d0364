"""The parts of a transfer comparison that are missing are computed."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from research.regression_lm import transfer, transfer_parts, transfer_peers
from research.regression_lm.forms import Facts
from research.regression_lm.transfer import Found, Setup
from research.regression_lm.transfer_parts import OURS

Say = Callable[[str], None]
MODELS = ("scratch", "pretrained")


def known_models(names: Sequence[str]) -> list[str]:
  """The names, "none" left out.

  Raises:
    InputError: one is unknown.
  """
  for name in names:
    if name not in (*MODELS, "none"):
      raise InputError(f"model {name!r} is unknown: take some of {MODELS}")
  return [name for name in names if name != "none"]


def run(
  setup: Setup,
  facts: Facts,
  workdir: pathlib.Path,
  models: Sequence[str],
  peers: Sequence[str],
  say: Say,
) -> list[dict[str, Any]]:
  """Computes what `workdir` lacks, and measures all that is in it.

  Raises:
    InputError: there are too few rows, or no sources to learn from.
  """
  parts = transfer.splits(setup, facts)
  for model in models:
    _model(model, setup, facts, parts, workdir, say)
  for name in peers:
    for task in setup.targets:
      for size in setup.sizes:
        for seed, split in enumerate(parts):
          key = (task.column, size, seed)
          if transfer_parts.path(workdir, name, *key).exists():
            continue
          found = transfer_peers.predict(
            name, setup, facts, task, split, size, seed
          )
          transfer_parts.write(workdir, name, found, *key)
    say(f"{name}: done")
  return transfer_parts.rows(setup, facts, parts, workdir)


def _model(model, setup, facts, parts, workdir, say):
  if model == "scratch":
    setup = dataclasses.replace(setup, sources=())
  elif not setup.sources:
    raise InputError("a pretrained model needs --sources")
  method = f"{OURS}, {model}"
  keys = lambda size: [
    (task.column, size, seed)
    for task in setup.targets
    for seed in range(setup.seeds)
  ]
  there = lambda size: all(
    transfer_parts.path(workdir, method, *key).exists() for key in keys(size)
  )
  missing = [size for size in setup.sizes if not there(size)]
  if not missing:
    return
  prepared = transfer.prepare(setup, facts)
  start = transfer.pretrain(setup, facts, prepared, parts, say)
  for size in missing:
    found = transfer.train(setup, facts, prepared, parts, start, size, say)
    if setup.sources:
      _ridge(setup, facts, prepared, parts, start, size, workdir)
    for (place, seed), part in found.items():
      name = setup.targets[place].column
      transfer_parts.write(workdir, method, part, name, size, seed)


def _ridge(setup, facts, prepared, parts, start, size, workdir):
  """The target from what the pretrained models say of the sources."""
  for seed, split in enumerate(parts):
    asked = np.concatenate([split.known[:size], split.test])
    said = transfer.source_values(setup, facts, prepared, start, seed, asked)
    for task in setup.targets:
      values = facts.column(task.column)[asked[:size]]
      points = transfer_peers.ridge(said[:size], values, said[size:])
      transfer_parts.write(
        workdir, f"{OURS}, ridge on its sources",
        Found(points, points[:, None]), task.column, size, seed,
      )  # fmt: skip


def used(workdir: pathlib.Path) -> dict[str, Any]:
  """Settings of the models whose parts are in `workdir`."""
  return {
    model: json.loads((workdir / model / "flags.json").read_text())
    for model in MODELS
    if (workdir / model / "flags.json").exists()
  }


def score(
  lines: Sequence[dict[str, Any]], models: Sequence[str], measure: str
) -> float | None:
  """Mean of a measure of the models over targets and sizes; None without."""
  wanted = {f"{OURS}, {model}" for model in models}
  found = [line[measure] for line in lines if line["method"] in wanted]
  return float(np.mean(found)) if found else None
