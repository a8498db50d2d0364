"""Ridges on TF-IDF of KernelBench's programs, on the same folds."""

import pathlib

import numpy as np

from research.core import files
from research.predictors import peers
from research.regression_lm.kernelbench.plan import Plan
from research.regression_lm.kernelbench.timings import Timings

# Whether a ridge is given canonical forms.
_FORMS = {"ridge on programs": False, "ridge on canonical texts": True}


def jobs(plan: Plan, timings: Timings, canonicals, workdir, pool):
  """[(name, rows), future] of ridges, one for each run and fold."""
  if not plan.peers:
    return []
  found = []
  for peer, is_canonical in _FORMS.items():
    codes = canonicals if is_canonical else timings.sources
    for run in plan.runs:
      for fold in range(plan.folds):
        of_run = timings.runs == run
        train = np.flatnonzero(of_run & (timings.fold != fold))
        test = np.flatnonzero(of_run & (timings.fold == fold))
        text = lambda i, codes=codes: (
          f"mode: {timings.modes[i]}\n{codes[timings.program[i]]}"
        )
        problem = peers.Problem(
          train_texts=[text(i) for i in train],
          train_features=np.zeros((len(train), 0)),
          train_values=timings.ms[train],
          test_texts=[text(i) for i in test],
          test_features=np.zeros((len(test), 0)),
        )
        kept = workdir / "peers" / f"{peer}-{run}-{fold}.npz".replace(" ", "_")
        found.append(((peer, test), pool.submit(_ridge, problem, kept)))
  return found


def _ridge(problem: peers.Problem, kept: pathlib.Path) -> np.ndarray:
  """A ridge's predictions, read where they were kept."""
  # Each process takes one thread, because there is one for every core.
  make = lambda: {"answers": peers.predict(peers.NAMES[0], problem, threads=1)}
  return files.kept(kept, problem, make)["answers"]
