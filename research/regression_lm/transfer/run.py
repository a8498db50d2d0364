"""The parts of a transfer comparison that are missing are computed."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models import input_files
from models.errors import InputError
from research.core import files
from research.predictors.peers import PeerError
from research.predictors.text_forms import Facts
from research.regression_lm.transfer import adaptation, names, preparation
from research.regression_lm.transfer import parts as transfer_parts
from research.regression_lm.transfer import peers as transfer_peers
from research.regression_lm.transfer.parts import OURS
from research.regression_lm.transfer.setup import (
  Found,
  Setup,
  folds,
  repeats,
  splits,
)

Say = Callable[[str], None]


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
  parts = splits(setup, facts)
  if count := repeats(setup, facts, parts[0]):
    say(
      f"warning: {count} of {len(parts[0].test)} test rows of seed 0 have the "
      "settings of an example: keep one row of each, such as their mean"
    )
  for model in models:
    _model(model, setup, facts, parts, workdir, say)
  for name in peers:
    for size in setup.sizes:
      for seed in range(setup.seeds):
        _peer(name, setup, facts, parts, size, seed, workdir, say)
    say(f"{name}: done")
  return transfer_parts.rows(setup, facts, parts, workdir)


def _peer(name, setup, facts, parts, size, seed, workdir, say):
  split = parts[seed]
  missing = [
    task
    for task in setup.targets
    if not transfer_parts.path(workdir, name, task.column, size, seed).exists()
  ]
  if name in transfer_peers.PER_SOURCE and missing:
    asked = np.concatenate([split.known[:size], split.test])
    said = transfer_peers.said_of_sources(
      name, setup, facts, split, asked, seed
    )
    _by_ridge(name, setup, facts, said, asked, size, seed, workdir)
    return
  for task in missing:
    try:
      found = transfer_peers.predict(
        name, setup, facts, task, split, size, seed
      )
    except PeerError as error:
      say(f"{name} has no answer for {task.column}: {error}")
      continue
    transfer_parts.write(workdir, name, found, task.column, size, seed)


def _by_ridge(method, setup, facts, said, asked, size, seed, workdir):
  """All targets from what is said of the sources, examples first."""
  own = said[:size]
  for task in setup.targets:
    values = facts.column(task.column)[asked[:size]]
    points = transfer_peers.ridge(own, values, said[size:])
    held = transfer_peers.held_out(
      folds(setup, size, seed),
      lambda rest, fold, y=values: transfer_peers.ridge(
        own[rest], y[rest], own[fold]
      ),
    )
    found = Found.of_points(points, held)
    transfer_parts.write(workdir, method, found, task.column, size, seed)


def untrained(
  setup: Setup, workdir: pathlib.Path, models: Sequence[str]
) -> list[str]:
  """The models of which `workdir` lacks a part."""
  return [model for model in models if _missing(model, setup, workdir)]


def _missing(model, setup, workdir) -> list[int]:
  """Sizes of which a part is not there."""
  there = lambda size: all(
    transfer_parts.path(
      workdir, f"{OURS}, {model}", task.column, size, seed
    ).exists()
    for task in setup.targets
    for seed in range(setup.seeds)
  )
  return [size for size in setup.sizes if not there(size)]


def _model(model, setup, facts, parts, workdir, say):
  if model == "scratch":
    setup = dataclasses.replace(setup, sources=())
  elif not setup.sources:
    raise InputError("a pretrained model needs --sources")
  method = f"{OURS}, {model}"
  missing = _missing(model, setup, workdir)
  if not missing:
    return
  prepared = preparation.prepare(setup, facts)
  start = adaptation.pretrain(setup, facts, prepared, parts, say)
  for size in missing:
    found = adaptation.train(setup, facts, prepared, parts, start, size, say)
    # Where sources are known of the tested rows nobody need predict them.
    if setup.sources and _are_unknown(setup, facts, parts):
      _ridge(setup, facts, prepared, parts, start, size, workdir)
    for (place, seed), part in found.items():
      name = setup.targets[place].column
      transfer_parts.write(workdir, method, part, name, size, seed)


def _are_unknown(setup, facts, parts) -> bool:
  """Whether no number of a source is known of the rows of the targets."""
  rows = np.concatenate([np.append(p.test, p.known) for p in parts])
  columns = [facts.column(task.column)[rows] for task in setup.sources]
  return bool(setup.source_rows) or np.isnan(columns).all()


def _ridge(setup, facts, prepared, parts, start, size, workdir):
  """The targets from what the pretrained models say of the sources."""
  method = f"{OURS}, {names.BY_RIDGE}"
  for seed, split in enumerate(parts):
    asked = np.concatenate([split.known[:size], split.test])
    said = adaptation.source_values(setup, prepared, start, seed, asked)
    _by_ridge(method, setup, facts, said, asked, size, seed, workdir)


def keep(workdir: pathlib.Path, models: Sequence[str], how: dict[str, Any]):
  """Writes beside the parts of models that were trained now how it was."""
  for model in models:
    path = workdir / model / "how.json"
    if not path.exists():
      files.write_json(path, how)


def kept(workdir: pathlib.Path) -> dict[str, Any]:
  """How the models came about whose parts are in `workdir`.

  Raises:
    InputError: a file is damaged.
  """
  found = {}
  for path in sorted(workdir.glob("*/how.json")):
    found[path.parent.name] = input_files.read_kept(path)
  return found


def methods(models: Sequence[str]) -> list[str]:
  """Names of models in the tables."""
  return [f"{OURS}, {model}" for model in models]


def score(
  lines: Sequence[dict[str, Any]], methods: Sequence[str], measure: str
) -> float | None:
  """Mean of a measure of methods over targets and sizes; None without."""
  found = [line[measure] for line in lines if line["method"] in methods]
  return float(np.mean(found)) if found else None
