"""A whole training run: statistics, warm start, GRPO, calibration.

Every stage is a pure function of the options, the text and the seed, and is
kept in the workdir, so that a killed run goes on where it was.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import module
from models.convert import Checkpoint
from research.core import loop, metrics, plots
from research.core import mesh as mesh_lib
from research.core import progress as progress_lib
from research.core import state as state_lib
from research.core.state import TrainState
from research.sol import (
  artefact,
  calibrate,
  corpus,
  counterfactual,
  learn,
  warm_start,
)
from research.sol import damage as damage_lib
from research.sol import policy as policy_lib
from research.sol import windows as windows_lib
from research.sol.learn import Method
from research.sol.options import Options

Tree = Any

# Episodes that the policy's input statistics are taken from.
_STATS_EPISODES = 512
_WEIGHT_DECAY = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Everything a run needs besides its text.

  Attributes:
    options: filled options.
    mode: the mode they came from.
    checkpoint: the frozen LLM.
    workdir: of the run.
    flags: the flags that decide the numbers, for `flags.json`.
    seed: of everything.
    mesh: devices.
    attention: implementation of dense attention.
    damage_windows: windows on which the damage of levels is measured.
    calibration_windows: windows of the calibration curve.
    ridge_windows: windows of the counterfactual regression from labels.
    checkpoint_every: updates.
    log_every: updates.
    progress: show a bar.
  """

  options: Options
  mode: str
  checkpoint: Checkpoint
  workdir: pathlib.Path
  flags: dict[str, Any]
  seed: int = 0
  mesh: jax.sharding.Mesh | None = None
  attention: str | None = None
  damage_windows: int = 128
  calibration_windows: int = 64
  ridge_windows: int = 256
  checkpoint_every: int = 100
  log_every: int = 1
  progress: bool = True

  @functools.cached_property
  def method(self) -> Method:
    """The method of the options."""
    return self.options.method(self.checkpoint.config, self.attention)


def train(run: Run, tokens: np.ndarray, say: Callable[[str], None]) -> None:
  """Trains a policy and writes `workdir/policy.{json,safetensors}`.

  Args:
    run: the run.
    tokens: (n,) int32; the last tenth is for calibration alone.
    say: prints a line of progress.

  Raises:
    InputError: the text is too short, or the workdir is another run's.
    loop.Stopped: interrupted or diverged.
  """
  method, options = run.method, run.options
  loop.claim_workdir(run.workdir, run.flags)
  train_tokens, held_tokens = corpus.split(tokens, 0.1)
  if method.budget == "price":
    # The length of the text is checked now, so that a text too short fails
    # before training and not at calibration.
    windows_lib.spread_windows(held_tokens, method.layout, 1)
  mesh = run.mesh or mesh_lib.data_mesh()
  frozen = {"lm": mesh_lib.replicate(mesh, run.checkpoint.params)}
  batch_at = _batches(run, train_tokens)
  frozen["prefixes"] = _prefix_cache(run, frozen, train_tokens, mesh, say)

  say("measuring the damage of every level")
  damage = _damage(run, frozen["lm"], train_tokens)
  frozen["damage"] = jnp.asarray(damage)
  frozen["log_price"] = jnp.asarray(
    damage_lib.log_prices(method.setup.table, damage)
  )
  samples = _samples(run, frozen, train_tokens, mesh, say)
  some = {name: value[:_STATS_EPISODES] for name, value in samples.items()}
  measure = functools.partial(warm_start.measure_stats, method)
  measured = jax.jit(measure)(frozen, some)
  frozen["stats"] = measured
  if not options.standardise:
    frozen["stats"] = policy_lib.InputStats.identity(
      method.policy.lm_width, frozen["damage"]
    )
  params = policy_lib.init(method.policy, jax.random.key(run.seed))
  count = module.num_params(params)
  share = count / module.num_params(run.checkpoint.params)
  say(f"policy: {count:,} parameters, {100 * share:.2f}% of the frozen model's")

  def save(name, params, prices, spent, coefficients):
    artefact.save(
      run.workdir / name,
      artefact.Artefact(
        options=options,
        mode=run.mode,
        model=run.checkpoint.name,
        params=jax.device_get(params),
        stats=jax.device_get(frozen["stats"]),
        prices=prices,
        spent=spent,
        scalar_stats=np.asarray(measured.scalars),
        coefficients=coefficients,
      ),
    )

  if options.warm_windows:
    updates = warm_start.steps_of(
      samples, options.warm_batch, options.warm_epochs
    )
    say(f"warm start: {updates} updates")
    params = _stage(
      run,
      "warm_start",
      warm_start.make_step,
      options.warm_learning_rate,
      updates,
      params,
      warm_start.minibatches(samples, options.warm_batch),
      frozen,
      mesh,
      ("loss", "over_mean"),
    )
  frozen["reference"] = params if method.kl_coef else None
  coefficients = _ridge(run, frozen, measured.scalars, train_tokens, samples)
  del samples
  if method.budget == "price":
    prices, spent = _curve(run, frozen, params, held_tokens)
    if options.warm_windows and options.updates:
      save("warm_policy", params, prices, spent, coefficients)

  if options.updates:
    say(f"GRPO: {options.updates} updates")
    params = _stage(
      run,
      "grpo",
      learn.make_step,
      options.learning_rate,
      options.updates,
      params,
      batch_at,
      frozen,
      mesh,
      ("log_p", "cost") if method.budget == "price" else ("log_p", "penalty"),
    )
  say("calibrating")
  prices = spent = np.zeros((0,), np.float32)
  if method.budget == "price":
    prices, spent = _curve(run, frozen, params, held_tokens)
  save("policy", params, prices, spent, coefficients)
  _plot(run)


def _plot(run) -> None:
  """Curves of each stage as `<stage>.png`."""
  for stage in ("warm_start", "grpo"):
    path = run.workdir / stage / "metrics.jsonl"
    if path.exists():
      plots.curves_plot(
        run.workdir / f"{stage}.png",
        metrics.read_jsonl(path),
        title=f"{run.checkpoint.name}, {run.options.preset}: {stage}",
      )


def _batches(run, tokens) -> Callable[[int], Tree]:
  """Pure function from the step to windows (W, S') and their ids (W,)."""
  method, options = run.method, run.options
  cached = options.cached_windows
  if cached:
    pool = windows_lib.random_windows(
      tokens, method.layout, cached, seed=run.seed, step=0
    )

  def batch_at(step: int) -> Tree:
    ids = np.arange(options.windows, dtype=np.int32)
    if not cached:
      drawn = windows_lib.random_windows(
        tokens, method.layout, options.windows, seed=run.seed, step=step
      )
      return {"tokens": drawn, "ids": ids}
    # An epoch reads every window once, in an order of its own.
    per_epoch = max(cached // options.windows, 1)
    epoch, at = divmod(step, per_epoch)
    order = np.random.default_rng((run.seed, 1, epoch)).permutation(cached)
    ids = np.resize(order, per_epoch * options.windows)
    ids = ids[at * options.windows : (at + 1) * options.windows]
    return {"tokens": pool[ids], "ids": ids.astype(np.int32)}

  return batch_at


def _prefix_cache(run, frozen, tokens, mesh, say):
  """Dense prefixes of all cached windows, or None."""
  method, cached = run.method, run.options.cached_windows
  if not cached:
    return None
  say(f"reading {cached} windows once")
  pool = windows_lib.random_windows(
    tokens, method.layout, cached, seed=run.seed, step=0
  )
  length = method.layout.prefix + 1

  @jax.jit
  def build(lm, rows):
    return method.setup.build_prefix(lm, rows, method.layout.context)

  pieces = [
    build(frozen["lm"], jnp.asarray(pool[i : i + 8, :length]))
    for i in range(0, cached, 8)
  ]
  by_layer = {"k", "v", "page_min", "page_max"}
  joined = {}
  for name in vars(pieces[0]):
    parts = [getattr(piece, name) for piece in pieces]
    axis = 1 if name in by_layer else 0
    joined[name] = None if parts[0] is None else jnp.concatenate(parts, axis)
  return mesh_lib.replicate(mesh, type(pieces[0])(**joined))


def _stage(
  run, name, make, rate, updates, params, batch_at, frozen, mesh, shown
) -> Tree:
  """One training stage with its own checkpoints; returns its parameters."""
  options, method = run.options, run.method
  grpo = name == "grpo"
  steps = updates * (method.inner_epochs if grpo else 1)
  decay = _WEIGHT_DECAY if grpo else warm_start.WEIGHT_DECAY
  tx = learn.optimizer(
    rate,
    steps,
    clip_norm=options.clip_norm,
    schedule=options.schedule,
    weight_decay=decay,
  )
  state: TrainState = state_lib.create_state(
    params, tx, jax.random.key(run.seed + 2)
  )
  state = loop.run(
    state_lib.jit_step(make(method, tx), mesh),
    state,
    batch_at,
    num_steps=updates,
    workdir=run.workdir / name,
    config=run.flags,
    checkpoint_every=run.checkpoint_every,
    log_every=run.log_every,
    progress=run.progress,
    progress_metrics=shown,
    frozen=frozen,
  )
  return state.params


def _samples(run, frozen, tokens, mesh, say) -> warm_start.Samples:
  """Random schedules of fresh windows, as many actions a time as an update's.

  One round at least, for the statistics of the policy's inputs.
  """
  method, options = run.method, run.options
  windows = options.windows * options.group_size
  rounds = max(-(-options.warm_windows // windows), 1)
  score = jax.jit(
    functools.partial(warm_start.score, method),
    in_shardings=(
      mesh_lib.replicated_sharding(mesh),
      mesh_lib.data_sharding(mesh),
      mesh_lib.replicated_sharding(mesh),
    ),
  )
  frozen = {name: frozen[name] for name in ("lm", "damage", "log_price")}
  episodes = windows * method.layout.episodes
  say(f"scoring random schedules of {rounds * episodes:,} episodes")
  return warm_start.collect(
    lambda batch, key: score(frozen, mesh_lib.shard_batch(mesh, batch), key),
    lambda number: windows_lib.random_windows(
      tokens, method.layout, windows, seed=run.seed + 9, step=number
    ),
    rounds,
    run.seed + 1,
    run.workdir / "random_schedules",
    progress_lib.counter("schedules", rounds * episodes, run.progress),
  )


def _damage(run, lm, tokens) -> np.ndarray:
  """Mean damage (A, 3) on training text, kept in the workdir."""
  path = run.workdir / "damage.npy"
  if path.exists():
    return np.load(path)
  method, windows = run.method, run.options.windows
  text = windows_lib.random_windows(
    tokens, method.layout, run.damage_windows, seed=run.seed + 8, step=0
  )
  text = windows_lib.whole(text, method.layout)
  levels = damage_lib.moves(method.setup.table)
  total = int(text.weights.sum()) * (1 + len(levels))
  damage = damage_lib.measure(
    method.setup,
    lm,
    text,
    window_batch=windows,
    divergence=method.reward == "divergence",
    progress=progress_lib.counter("levels", total, run.progress),
  )
  np.save(path, damage)
  return damage


def _curve(run, frozen, params, tokens) -> tuple[np.ndarray, np.ndarray]:
  """Prices (P,) and the mean cost (P,) that the greedy policy spends."""
  method = run.method
  low, high = np.asarray(frozen["log_price"], np.float64)
  prices = np.exp(np.linspace(low - 0.3, high + 0.3, 16)).astype(np.float32)
  windows = windows_lib.spread_windows(
    tokens, method.layout, run.calibration_windows
  )
  played = calibrate.run_points(
    method.setup,
    frozen["lm"],
    windows,
    method.layout.starts(),
    policy_lib.controller(method.policy, greedy=True),
    (params, frozen["stats"]),
    prices[:, None],
    batch=run.options.windows,
  )
  costs = np.asarray(method.policy.costs)
  return prices, costs[played.actions].mean((1, 2)).astype(np.float32)


def _ridge(run, frozen, scalar_stats, tokens, samples) -> np.ndarray:
  """Coefficients of the baseline, kept in the workdir."""
  path = run.workdir / "counterfactual_regression.npy"
  if path.exists():
    return np.load(path)
  method, windows = run.method, run.options.windows
  common = {"damage": frozen["damage"], "scalar_stats": scalar_stats}
  if method.reward == "divergence":
    table = method.setup.table
    coefficients = counterfactual.fit_samples(table, samples, **common)
  else:
    rounds = max(-(-run.ridge_windows // windows), 2)
    batches = (
      windows_lib.random_windows(
        tokens, method.layout, windows, seed=run.seed + 7, step=step
      )
      for step in range(rounds)
    )
    coefficients = counterfactual.fit_labels(
      method.setup,
      frozen["lm"],
      batches,
      method.layout.starts(),
      log_price=frozen["log_price"],
      schedules=method.group_size,
      gamma=method.gamma,
      seed=run.seed,
      **common,
    )
  # The file is put in place by one rename, so that a killed run leaves no half
  # of it.
  temporary = path.with_suffix(".tmp.npy")
  np.save(temporary, coefficients)
  temporary.replace(path)
  return coefficients
