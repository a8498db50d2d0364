"""KernelBench by cross-validation over problems: many models at once.

Every problem is held out once, in all its versions, sizes and timings. All
models, some for each fold, are one: their weights stand along an axis that the
update is mapped over, so that few programs keep a device busy. A text is the
GPU, the run and the mode of a timing, then the program in canonical form
(`program_text`); in training its names are now and then others.

Shapes by axis letter: M models, B examples of each, L text tokens.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import regression_lm
from models.numbers import TargetCodec
from models.regression_lm import Compute
from models.regression_lm_config import RegressionLMConfig
from research.core import files, loop
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core import workdir as workdir_lib
from research.core.options import RunOptions
from research.core.state import TrainState
from research.predictors.calibration import Prediction
from research.predictors.splits import Split
from research.predictors.tables import Table
from research.regression_lm import (
  batched_training,
  evaluate,
  sampling,
  training,
)
from research.regression_lm.expected import Scale
from research.regression_lm.kernelbench import peers as kernelbench_peers
from research.regression_lm.kernelbench.plan import Plan
from research.regression_lm.kernelbench.program_text import canonical
from research.regression_lm.kernelbench.timings import (
  Fold,
  Timings,
  with_made_up,
)
from research.regression_lm.likelihood import Model
from research.regression_lm.options import Options

Say = Callable[[str], None]
POOLED = "these runs together"
_DRAWS, _GRID = 64, 64
# Texts of one call.
_ROWS = 256


def run(
  plan: Plan,
  timings: Timings,
  workdir: pathlib.Path,
  say: Say,
  answers: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
  """Trains, predicts what was held out, and judges it beside the peers.

  Args:
    plan: what to do.
    timings: of `load`.
    workdir: keeps the run: the same call goes on, and judges again.
    say: prints a line.
    answers: file of our answers to write, for `error_analysis`; groups are
      problem and run.

  Returns:
    Rows of `evaluate.rows`, an objective a run.

  Raises:
    loop.Stopped: interrupted or diverged.
  """
  flags = dataclasses.asdict(plan)
  del flags["peers"]
  workdir_lib.claim(workdir, flags)
  forms = [
    [canonical(code, renaming) for code in timings.sources]
    for renaming in range(plan.renamings + 1)
  ]
  timings, forms = with_made_up(timings, forms, plan)
  spawn = multiprocessing.get_context("spawn")
  workers = max(1, (os.cpu_count() or 2) - 2)
  with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
    # Ridge is fitted on other cores while the device trains.
    waiting = kernelbench_peers.jobs(plan, timings, forms[0], workdir, pool)
    say(f"{len(timings.ms)} timings, {plan.folds * plan.members} models")
    predicted = files.kept(
      workdir / "predictions.npz",
      {"plan": flags, "ms": timings.ms, "texts": forms},
      lambda: _learn(plan, timings, forms, workdir),
    )
    if answers:
      _write_answers(answers, plan, timings, predicted["draws"])
    say("predicted; waiting for the peers" if waiting else "predicted")
    by_peer: dict[str, np.ndarray] = {}
    for (peer, rows), job in waiting:
      found = by_peer.setdefault(peer, np.full(len(timings.ms), np.nan))
      found[rows] = job.result()
  return _judge(plan, timings, predicted, by_peer)


def _learn(plan: Plan, timings: Timings, forms, workdir: pathlib.Path):
  """Draws and expected values of what was held out, and the size of a model."""
  folds = [
    Fold(timings, forms, fold, plan.options) for fold in range(plan.folds)
  ]
  model, params, scales = _train(plan, timings, folds, workdir)
  draws, means = _predict(plan, timings, folds, model, params, scales)
  num_params = regression_lm.num_params(model.config)
  return {"draws": draws, "means": means, "num_params": num_params}


def _make_model(options: Options) -> Model:
  codec = TargetCodec(format=options.number_format())
  config = RegressionLMConfig.named(
    options.size,
    vocab_size=options.vocab_size,
    target_vocab_size=len(codec.tokens),
    target_length=codec.length,
    **options.sizes(),
  )
  return Model(config=config, codec=codec, compute=Compute(dtype=options.dtype))


def _train(plan: Plan, timings: Timings, folds: Sequence[Fold], workdir):
  """The model, the parameters of M of it, and the scale of each fold."""
  o, model = plan.options, _make_model(plan.options)
  targets = model.codec.encode(timings.ms.tolist())
  values = model.codec.values(targets)
  scales = [Scale.fit(o.scale, values[fold.train]) for fold in folds]
  scores = [scale.scores(values) for scale in scales]
  grids = [scale.grid(model.codec, o.grid) for scale in scales]
  repeated = [grid for grid in grids for _ in range(plan.members)]
  grid = jax.tree.map(lambda *leaves: np.stack(leaves), *repeated)
  size = o.max_length

  def batch_at(step: int) -> dict[str, np.ndarray]:
    parts = []
    for number, fold in enumerate(
      np.repeat(np.arange(plan.folds), plan.members)
    ):
      chosen = np.random.default_rng((o.seed, 43, number, step))
      rows = chosen.choice(folds[fold].train, o.batch)
      if plan.made_up:
        half = o.batch // 2
        rows[:half] = chosen.choice(folds[fold].made_up, half)
      forms = chosen.integers(0, plan.renamings + 1, o.batch)
      tokens, lengths = (
        folds[fold].texts(rows, forms).rows(np.arange(o.batch), size)
      )
      parts.append(
        {
          "tokens": tokens,
          "lengths": lengths,
          "targets": targets[rows],
          "scores": scores[fold][rows],
        }
      )
    return {name: np.stack([p[name] for p in parts]) for name in parts[0]}

  schedule, tx = training.make_optimizer(o)
  keys = jax.random.split(jax.random.key(o.seed), len(repeated))
  params = batched_training.init(model, keys)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=jax.vmap(tx.init)(params),
    key=jax.random.key(o.seed + 1),
  )
  mesh = mesh_lib.data_mesh(1)
  state = loop.run(
    state_lib.jit_step(
      batched_training.make_step(model, tx, schedule, o.loss()), mesh
    ),
    state,
    batch_at,
    RunOptions(
      workdir=workdir / "run",
      flags=dataclasses.asdict(o),
      checkpoint_every=max(o.steps // 2, 1),
      log_every=20,
      keep=1,
    ),
    num_steps=o.steps,
    frozen=mesh_lib.replicate(mesh, grid),
  )
  return model, state.params, scales


def _predict(plan: Plan, timings: Timings, folds, model, params, scales):
  """Draws (N, draws) and expected values (N,) of what was held out."""
  draws = np.full((len(timings.ms), _DRAWS * plan.members), np.nan)
  means = np.full(len(timings.ms), np.nan)
  judged = np.isin(timings.runs, list(plan.runs))
  for number, (fold, scale) in enumerate(zip(folds, scales)):
    rows = fold.test[judged[fold.test]]
    grid = scale.grid(model.codec, _GRID)
    scores = np.zeros((plan.members, len(rows), 1))
    for member in range(plan.members):
      place = number * plan.members + member
      mine = jax.tree.map(lambda leaf, place=place: leaf[place], params)
      keys = jax.random.split(jax.random.key(place), len(rows) + _ROWS)
      columns = slice(member * _DRAWS, (member + 1) * _DRAWS)
      for start in range(0, len(rows), _ROWS):
        part = slice(start, min(start + _ROWS, len(rows)))
        # All calls have one shape, so that the program compiles once.
        filled = np.resize(rows[part], _ROWS)
        texts = fold.texts(filled, np.zeros(_ROWS, int))
        batch = texts.rows(np.arange(_ROWS), plan.options.max_length)
        ids, _ = sampling.draw(
          model,
          mine,
          *batch,
          keys[start : start + _ROWS],
          num_samples=_DRAWS,
        )
        found = sampling.expectation(model, mine, *batch, grid)
        count = part.stop - part.start
        values = model.codec.values(np.asarray(ids)[:count])
        draws[rows[part], columns] = values[..., 0]
        scores[member, part] = np.asarray(found)[:count]
    means[rows] = scale.values(scores.mean(0))[:, 0]
  return draws, means


def _write_answers(path, plan: Plan, timings: Timings, draws) -> None:
  names = [f"{p} {run}" for p, run in zip(timings.problems, timings.runs)]
  table = Table(
    texts=names,
    values=timings.ms[:, None],
    targets=["mean_ms"],
    groups=names,
    features=np.zeros((len(names), 0)),
  )
  test = np.flatnonzero(np.isin(timings.runs, list(plan.runs)))
  none = np.array([], int)
  prediction = Prediction(draws[test][..., None])
  evaluate.write_answers(path, table, Split(none, none, test), prediction)


def _judge(plan: Plan, timings: Timings, predicted, by_peer):
  """Rows of every run, and of all together."""
  draws, means = predicted["draws"], predicted["means"]
  rows = []
  for run in [*plan.runs, POOLED]:
    names = list(plan.runs) if run == POOLED else [run]
    at = np.flatnonzero(np.isin(timings.runs, names))
    found = evaluate.Predictions(
      target=run,
      truth=timings.ms[at],
      by_method={
        evaluate.OURS: np.median(draws[at], axis=1),
        evaluate.EXPECTED: means[at],
        **{peer: values[at] for peer, values in by_peer.items()},
      },
      draws=draws[at],
    )
    rows += evaluate.rows(
      found,
      system="regression_lm",
      data="kernelbench",
      train=round((timings.fold >= 0).sum() * (1 - 1 / plan.folds)),
      seed=plan.options.seed,
      num_params=int(predicted["num_params"]),
    )
  return rows
