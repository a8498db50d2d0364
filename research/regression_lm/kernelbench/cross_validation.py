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
import functools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import regression_lm
from models.errors import InputError
from models.numbers import TargetCodec
from models.regression_lm import Compute
from models.regression_lm_config import RegressionLMConfig
from research.core import loop
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core.state import TrainState
from research.predictors import peers, tables
from research.regression_lm import evaluate, learn, sampling, training
from research.regression_lm.examples import Texts
from research.regression_lm.expected import Scale
from research.regression_lm.kernelbench import made_up_programs
from research.regression_lm.kernelbench.program_text import canonical
from research.regression_lm.likelihood import Model
from research.regression_lm.options import Options
from research.text import tokenizing

Say = Callable[[str], None]
POOLED = "these runs together"
_FORMS = {"ridge on programs": False, "ridge on canonical texts": True}
_DRAWS, _GRID = 64, 64
# Texts of one call, and made-up ones that a tokenizer is learned from.
_ROWS, _LEARNED = 256, 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is trained and judged.

  Attributes:
    options: of every model and its training.
    runs: whose timings are judged; all are learned from.
    folds: parts of the problems, each held out once.
    members: models of each fold, whose answers are pooled.
    renamings: forms of a program with other names, beside its own.
    made_up: programs of a second task (`made_up_programs`), which half of every
      batch is of; 0 for none.
    peers: judge the peers too.
    limit: problems at most, for a trial; 0 takes all.
  """

  options: Options
  runs: Sequence[str]
  folds: int = 5
  members: int = 2
  renamings: int = 3
  made_up: int = 0
  peers: bool = True
  limit: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Timings:
  """N timings of the programs of a set.

  Attributes:
    sources: P programs.
    program: (N,) index of each timing's.
    fold: (N,) of its problem; -1 for those made up, which none holds out.
    runs: N names of runs.
    headings: N first lines of a text: GPU, run and mode.
    modes: N names.
    ms: (N,) milliseconds.
  """

  sources: Sequence[str]
  program: np.ndarray
  fold: np.ndarray
  runs: np.ndarray
  headings: Sequence[str]
  modes: Sequence[str]
  ms: np.ndarray


def load(folder: str | pathlib.Path, plan: Plan) -> Timings:
  """Reads kernelbench_sources.jsonl.gz and kernelbench_timings.csv.gz.

  Raises:
    InputError: a file is missing or does not do, or a run has no timing.
  """
  folder = pathlib.Path(folder).expanduser()
  codes: dict[str, str] = {}
  for line in tables.read_lines(folder / "kernelbench_sources.jsonl.gz"):
    if line.strip():
      row = json.loads(line)
      codes[row["src"]] = row["code"]
  path = folder / "kernelbench_timings.csv.gz"
  rows = tables.csv_rows(path)
  name = lambda row: f"{row['level']}/{row['name']}"
  order = np.random.default_rng((plan.options.seed, 41)).permutation(
    sorted({name(row) for row in rows})
  )
  fold_of = {str(n): i % plan.folds for i, n in enumerate(order)}
  if plan.limit:
    fold_of = dict(list(fold_of.items())[: plan.limit])
  rows = [row for row in rows if name(row) in fold_of]
  for run in plan.runs:
    if not any(row["run"] == run for row in rows):
      raise InputError(f"{path}: has no run {run!r}: name others with --runs")
  if any(row["src"] not in codes for row in rows):
    raise InputError(f"{path}: has a timing of an unknown program")
  index = {src: i for i, src in enumerate(codes)}
  return Timings(
    sources=list(codes.values()),
    program=np.array([index[row["src"]] for row in rows]),
    fold=np.array([fold_of[name(row)] for row in rows]),
    runs=np.array([row["run"] for row in rows]),
    headings=[
      f"{row['hardware']}\n{row['run']}\n{row['mode']}\n" for row in rows
    ],
    modes=[row["mode"] for row in rows],
    ms=np.array([float(row["mean_ms"]) for row in rows]),
  )


def _with_made_up(timings: Timings, forms, plan: Plan):
  """Timings and forms with the second task behind them."""
  made = made_up_programs.programs(plan.made_up, plan.options.seed)
  texts = [text for text, _ in made]
  count, before = len(made), len(timings.sources)
  longer = Timings(
    sources=[*timings.sources, *texts],
    program=np.append(timings.program, before + np.arange(count)),
    fold=np.append(timings.fold, np.full(count, -1)),
    runs=np.append(timings.runs, [""] * count),
    headings=[*timings.headings, *[made_up_programs.HEADING] * count],
    modes=[*timings.modes, *[""] * count],
    ms=np.append(timings.ms, [ms for _, ms in made]),
  )
  return longer, [form + texts for form in forms]


class Fold:
  """Tokens of all timings, by a tokenizer of the training part of a fold."""

  def __init__(self, timings: Timings, forms, fold: int, options: Options):
    """Learns the tokenizer.

    Args:
      timings: all.
      forms: for each renaming, the canonical forms of all programs.
      fold: that is held out.
      options: sizes of tokenizer and texts.
    """
    self.train = np.flatnonzero((timings.fold != fold) & (timings.fold >= 0))
    self.made_up = np.flatnonzero(timings.fold < 0)
    self.test = np.flatnonzero(timings.fold == fold)
    self._program, self._most = timings.program, options.max_length
    made = timings.program[self.made_up]
    names = sorted(set(timings.headings))
    # Texts that repeat are learned from, and written in tokens, once.
    known = [*timings.program[self.train], *made[:_LEARNED]]
    known = dict.fromkeys(form[i] for form in forms for i in known)
    tokenizer = tokenizing.train_bpe([*names, *known], options.vocab_size)
    ids = lambda texts: [
      np.asarray(e.ids, np.int32)
      for e in tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    ]
    bodies = list(dict.fromkeys(text for form in forms for text in form))
    written = dict(zip(bodies, ids(bodies)))
    place = {name: i for i, name in enumerate(names)}
    self._headings = ids(names)
    self._heading = np.array([place[name] for name in timings.headings])
    self._forms = [[written[text] for text in form] for form in forms]

  def texts(self, rows: np.ndarray, forms: np.ndarray) -> Texts:
    """Tokens of timings (B,) with their programs in forms (B,)."""
    parts = [
      np.concatenate(
        [
          self._headings[self._heading[row]],
          self._forms[form][self._program[row]],
        ]
      )[: self._most]
      for row, form in zip(rows, forms)
    ]
    starts = np.cumsum([0, *map(len, parts)])
    return Texts(np.concatenate(parts), starts, 0)


def run(
  plan: Plan, timings: Timings, workdir: pathlib.Path, say: Say
) -> list[dict[str, Any]]:
  """Trains, predicts what was held out, and judges it beside the peers.

  Args:
    plan: what to do.
    timings: of `load`.
    workdir: keeps the run: the same call goes on, and judges again.
    say: prints a line.

  Returns:
    Rows of `evaluate.rows`, an objective a run.

  Raises:
    loop.Stopped: interrupted or diverged.
  """
  flags = dataclasses.asdict(plan)
  del flags["peers"]
  loop.claim_workdir(workdir, flags)
  forms = [
    [canonical(code, renaming) for code in timings.sources]
    for renaming in range(plan.renamings + 1)
  ]
  timings, forms = _with_made_up(timings, forms, plan)
  spawn = multiprocessing.get_context("spawn")
  workers = max(1, (os.cpu_count() or 2) - 2)
  with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
    # On other cores while the device trains.
    waiting = _peer_jobs(plan, timings, forms[0], workdir, pool)
    kept = workdir / "predictions.npz"
    if not kept.exists():
      say(f"{len(timings.ms)} timings, {plan.folds * plan.members} models")
      draws, means, num_params = _learn(plan, timings, forms, workdir)
      draft = workdir / "predictions.partial.npz"
      np.savez(draft, draws=draws, means=means, num_params=num_params)
      draft.replace(kept)
    predicted = dict(np.load(kept))
    say("predicted; waiting for the peers" if waiting else "predicted")
    by_peer: dict[str, np.ndarray] = {}
    for (peer, rows), job in waiting:
      found = by_peer.setdefault(peer, np.full(len(timings.ms), np.nan))
      found[rows] = job.result()
  return _judge(plan, timings, predicted, by_peer)


def _learn(plan: Plan, timings: Timings, forms, workdir: pathlib.Path):
  """Draws and expected values of what was held out, and a model's size."""
  folds = [
    Fold(timings, forms, fold, plan.options) for fold in range(plan.folds)
  ]
  model, params, scales = _train(plan, timings, folds, workdir)
  draws, means = _predict(plan, timings, folds, model, params, scales)
  return draws, means, regression_lm.num_params(model.config)


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
  init = jax.jit(jax.vmap(functools.partial(regression_lm.init, model.config)))
  params = init(keys)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=jax.vmap(tx.init)(params),
    key=jax.random.key(o.seed + 1),
  )
  mesh = mesh_lib.data_mesh(1)
  state = loop.run(
    state_lib.jit_step(_many_steps(model, tx, schedule, o), mesh),
    state,
    batch_at,
    num_steps=o.steps,
    workdir=workdir / "run",
    config=dataclasses.asdict(o),
    checkpoint_every=max(o.steps // 2, 1),
    log_every=20,
    frozen=mesh_lib.replicate(mesh, grid),
    keep=1,
  )
  return model, state.params, scales


def _many_steps(model: Model, tx, schedule: optax.Schedule, options: Options):
  """`learn.make_step` for M models with an example batch each."""
  loss = options.loss()

  def one(params, opt_state, batch, grid, key):
    gradient = jax.grad(
      lambda p: learn.loss_sums(model, p, batch, loss, grid, key), has_aux=True
    )
    grads, sums = gradient(params)
    grads = jax.tree.map(lambda g: g / sums["examples"], grads)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, sums

  def step(state: TrainState, batch, grid):
    count = batch["targets"].shape[0]
    keys = jax.random.split(state_lib.step_key(state), count)
    params, opt_state, sums = jax.vmap(one)(
      state.params, state.opt_state, batch, grid, keys
    )
    total = sums.pop("examples").sum()
    metrics = jax.tree.map(lambda part: part.sum() / total, sums)
    metrics["learning_rate"] = schedule(state.step)
    new = dataclasses.replace(
      state, step=state.step + 1, params=params, opt_state=opt_state
    )
    return new, metrics

  return step


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
        # All calls are of one shape, which compiles once.
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


def _peer_jobs(plan: Plan, timings: Timings, canonicals, workdir, pool):
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
        kept = workdir / "peers" / f"{peer}-{run}-{fold}.npy".replace(" ", "_")
        found.append(((peer, test), pool.submit(_ridge, problem, kept)))
  return found


def _ridge(problem: peers.Problem, kept: pathlib.Path) -> np.ndarray:
  """A ridge's predictions, read where they were kept."""
  if kept.exists():
    return np.load(kept)
  # Every core has a process: more threads would starve the models.
  found = peers.predict(peers.NAMES[0], problem, threads=1)
  kept.parent.mkdir(parents=True, exist_ok=True)
  np.save(kept, found)
  return found


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
