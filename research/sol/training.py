"""A whole training run: statistics, warm start, GRPO, calibration.

Every stage is a pure function of the options, the text and the seed, and is
kept in the workdir, so that a killed run goes on where it was.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from models import module
from models.convert import Checkpoint
from models.errors import InputError
from research.core import files, loop, metrics, plots, processes
from research.core import mesh as mesh_lib
from research.core import progress as progress_lib
from research.core import state as state_lib
from research.core import workdir as workdir_lib
from research.core.options import RunOptions
from research.sol import (
  artefact,
  budgets,
  calibrate,
  corpus,
  counterfactual,
  learn,
  light_policy,
  warm_start,
)
from research.sol import damage as damage_lib
from research.sol import policy as policy_lib
from research.sol import windows as windows_lib
from research.sol.artefact import Artefact
from research.sol.learn import Frozen, Method
from research.sol.options import Options
from research.sol.policy import InputStats
from research.sol.prefix import Prefix

Tree = Any

# Episodes that the policy's input statistics are taken from.
_STATS_EPISODES = 512
_WEIGHT_DECAY = 1e-4
# Options that neither schedules, nor damages, nor the regression depend on.
_OF_THE_POLICY = (
  "policy",
  "policy_rank",
  "policy_source",
  "policy_bits",
  "hold",
  "width",
  "updates",
  "learning_rate",
  "inner_epochs",
  "warm_epochs",
  "warm_batch",
  "warm_learning_rate",
  "kl_coef",
  "entropy_coef",
  "drop_dead",
  "variance_share",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(RunOptions):
  """Everything a run needs besides its text.

  Attributes:
    options: filled options.
    mode: the mode they came from.
    checkpoint: the frozen LLM.
    action_costs: of the A actions in the budget's unit, as `train` finds them.
    overhead: of a token beside its action, in that unit, likewise.
    shared: folder that keeps what runs have in common whose policies alone
      differ, such as schedules; None for the workdir.
    seed: of everything.
    mesh: devices.
    attention: implementation of dense attention.
    damage_windows: windows on which the damage of levels is measured.
    calibration_windows: windows of the calibration curve.
    ridge_windows: windows of the counterfactual regression from labels.
  """

  options: Options
  mode: str
  checkpoint: Checkpoint
  action_costs: tuple[float, ...] = ()
  overhead: float = 0.0
  shared: pathlib.Path | None = None
  seed: int = 0
  mesh: jax.sharding.Mesh | None = None
  attention: str | None = None
  damage_windows: int = 128
  calibration_windows: int = 64
  ridge_windows: int = 256
  checkpoint_every: int = 100
  log_every: int = 1

  def of_seed(self, seed: int) -> Self:
    """The same run of another seed, in a folder of this one's workdir."""
    return dataclasses.replace(
      self,
      seed=seed,
      workdir=self.workdir / f"seed{seed}",
      flags=self.flags | {"seed": seed},
    )

  @functools.cached_property
  def method(self) -> Method:
    """The method of the options."""
    return self.options.method(
      self.checkpoint.config, self.attention, self.action_costs
    )


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
  run = dataclasses.replace(run, mesh=run.mesh or mesh_lib.make())
  parts = mesh_lib.row_parts(run.mesh)
  if run.options.windows % parts:
    raise InputError(
      f"--windows={run.options.windows} is no multiple of {parts} parts of"
      " rows: change one, or data and fsdp of --mesh"
    )
  for name in ("context", "horizon"):
    length = getattr(run.options, name)
    mesh_lib.check_length(run.mesh, length, f"--{name}=")
  with mesh_lib.using(run.mesh):
    _train(run, tokens, say)


def _train(run: Run, tokens: np.ndarray, say: Callable[[str], None]) -> None:
  """`train`, traced under the run's mesh."""
  method, options = run.method, run.options
  workdir_lib.claim(run.workdir, run.flags)
  training, held = corpus.split(tokens, 0.1)
  if method.budget == "price":
    # The length of the text is checked now, so that a text too short fails
    # before training and not at calibration.
    windows_lib.spread_windows(held, method.layout, 1)
  mesh_lib.check_used(run.mesh, run.checkpoint.params)
  lm = mesh_lib.place(run.mesh, run.checkpoint.params)
  run = budgets.of_run(run, lm, training)
  method = run.method
  pool = _pool(run, training)
  prefixes = _prefixes(run, lm, pool, say)

  damage = _damage(run, lm, training, say)
  log_price = jnp.asarray(damage_lib.log_prices(method.policy.costs, damage))
  damage = jnp.asarray(damage)
  samples = _samples(run, lm, damage, log_price, training, say)
  measured = _input_stats(run, lm, damage, samples)
  stats = measured
  if not options.standardise:
    stats = InputStats.identity(method.policy.lm_width, damage)
  frozen = Frozen(lm=lm, log_price=log_price, stats=stats, prefixes=prefixes)

  params = policy_lib.init(method.policy, jax.random.key(run.seed))
  size = module.num_params(params)
  share = size / module.num_params(run.checkpoint.params)
  say(f"policy: {size:,} parameters, {share:.2%} of the frozen model's")
  if options.warm_windows:
    params = _warm_start(run, params, samples, frozen, say)
  frozen = dataclasses.replace(
    frozen, reference=params if method.kl_coef else None
  )
  coefficients = _regression(run, frozen, measured.scalars, training, samples)
  del samples

  def save(name, params):
    """Calibrates a policy and writes it."""
    params = light_policy.rounded(params, options.policy_bits)
    prices, spent = _curve(run, frozen, params, held)
    _save(
      run.workdir / name,
      Artefact(
        options=options,
        mode=run.mode,
        model=run.checkpoint.name,
        params=mesh_lib.to_host(params),
        stats=mesh_lib.to_host(stats),
        prices=prices,
        spent=spent,
        scalar_stats=np.asarray(measured.scalars),
        coefficients=coefficients,
        action_costs=np.asarray(run.action_costs, np.float32),
      ),
    )

  if options.updates:
    if options.warm_windows:
      save("warm_policy", params)
    params = _grpo(run, params, batches(run, training, pool), frozen, say)
  say("calibrating")
  save("policy", params)
  if processes.is_writer():
    _plot(run)


def _save(place: pathlib.Path, policy: Artefact) -> None:
  if processes.is_writer():
    artefact.save(place, policy)


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


def _pool(run, tokens) -> np.ndarray | None:
  """Windows (n, S') that all updates take, or None for fresh ones."""
  count = run.options.cached_windows
  if not count:
    return None
  return windows_lib.random_windows(
    tokens, run.method.layout, count, seed=run.seed, step=0
  )


def batches(
  run: Run, tokens: np.ndarray, pool: np.ndarray | None
) -> Callable[[int], Tree]:
  """Pure function from the step to windows (W, S') and their ids (W,).

  Args:
    run: the run.
    tokens: (n,) text of fresh windows.
    pool: the windows to take instead, each once an epoch, or None.
  """
  count = run.options.windows

  def fresh(step: int) -> Tree:
    drawn = windows_lib.random_windows(
      tokens, run.method.layout, count, seed=run.seed, step=step
    )
    return {"tokens": drawn, "ids": np.arange(count, dtype=np.int32)}

  def pooled(step: int) -> Tree:
    per_epoch = max(len(pool) // count, 1)
    epoch, at = divmod(step, per_epoch)
    generator = np.random.default_rng((run.seed, 1, epoch))
    order = np.resize(generator.permutation(len(pool)), per_epoch * count)
    ids = order[at * count : (at + 1) * count]
    return {"tokens": pool[ids], "ids": ids.astype(np.int32)}

  return fresh if pool is None else pooled


def _prefixes(run, lm, pool, say) -> Prefix | None:
  """Dense prefixes of all windows of a pool, read by eights."""
  if pool is None:
    return None
  say(f"reading {len(pool)} windows once")
  method = run.method
  length = method.layout.prefix + 1

  @jax.jit
  def build(lm, rows):
    return method.setup.build_prefix(lm, rows, method.layout.context)

  pieces = [
    build(lm, jnp.asarray(pool[i : i + 8, :length]))
    for i in range(0, len(pool), 8)
  ]
  return mesh_lib.replicate(run.mesh, Prefix.join(pieces))


def _warm_start(run, params, samples, frozen, say) -> Tree:
  """Fits the policy to what random schedules did."""
  options = run.options
  updates = warm_start.steps_of(
    samples, options.warm_batch, options.warm_epochs
  )
  say(f"warm start: {updates} updates")
  tx = learn.optimizer(
    options.warm_learning_rate,
    updates,
    clip_norm=options.clip_norm,
    schedule=options.schedule,
    weight_decay=warm_start.WEIGHT_DECAY,
  )
  return _optimise(
    run,
    "warm_start",
    warm_start.make_step(run.method, tx),
    state_lib.create_state(params, tx, jax.random.key(run.seed + 2)),
    warm_start.minibatches(samples, options.warm_batch),
    frozen,
    updates,
    ("loss", "over_mean"),
  )


def _grpo(run, params, batch_at, frozen, say) -> Tree:
  """Updates the policy by its own rollouts."""
  options, method = run.options, run.method
  say(f"GRPO: {options.updates} updates")
  tx = learn.optimizer(
    options.learning_rate,
    options.updates * method.inner_epochs,
    clip_norm=options.clip_norm,
    schedule=options.schedule,
    weight_decay=_WEIGHT_DECAY,
  )
  if method.gamma == 0 and method.credit == "residual":
    say("gamma=0: a step answers for its own reward, credit=residual is idle")
  params = _optimise(
    run,
    "grpo",
    learn.make_step(method, tx),
    state_lib.create_state(params, tx, jax.random.key(run.seed + 2)),
    batch_at,
    frozen,
    options.updates,
    ("log_p", "cost" if method.budget == "price" else "penalty"),
  )
  rows = processes.from_writer(
    lambda: metrics.read_jsonl(run.workdir / "grpo" / "metrics.jsonl")
  )
  clipped = sum(row["clip_share"] for row in rows) / max(len(rows), 1)
  say(f"GRPO: the clip stopped the gradient of {clipped:.1e} of the actions")
  return params


def _optimise(run, name, step, state, batch_at, frozen, updates, shown) -> Tree:
  """One training stage with its own checkpoints; returns its parameters."""
  state = loop.run(
    state_lib.jit_step(step, run.mesh),
    state,
    batch_at,
    dataclasses.replace(run, workdir=run.workdir / name, shown=shown),
    num_steps=updates,
    frozen=frozen,
  )
  return state.params


def _samples(run, lm, damage, log_price, tokens, say) -> warm_start.Samples:
  """Random schedules of fresh windows, as many actions a time as an update's.

  One round at least, for the statistics of the policy's inputs.
  """
  method, options = run.method, run.options
  windows = options.windows * options.group_size
  rounds = max(-(-options.warm_windows // windows), 1)
  score = jax.jit(functools.partial(warm_start.score, method))
  episodes = windows * method.layout.episodes
  say(f"scoring random schedules of {rounds * episodes:,} episodes")
  return warm_start.collect(
    lambda batch, key: score(
      lm, damage, log_price, mesh_lib.shard_batch(run.mesh, batch), key
    ),
    lambda number: windows_lib.random_windows(
      tokens, method.layout, windows, seed=run.seed + 9, step=number
    ),
    rounds,
    run.seed + 1,
    _kept_in(run) / "random_schedules",
    _owner(run, tokens),
    progress_lib.counter("schedules", rounds * episodes, run.progress),
  )


def _input_stats(run, lm, damage, samples) -> InputStats:
  """Statistics of the policy's inputs, from the first samples."""
  some = {name: value[:_STATS_EPISODES] for name, value in samples.items()}
  measure = functools.partial(warm_start.measure_stats, run.method)
  return jax.jit(measure)(lm, damage, some)


def _kept(run, name: str, tokens, make: Callable[[], np.ndarray]) -> np.ndarray:
  """An array that is made once and kept in the workdir."""
  path = _kept_in(run) / f"{name}.npz"
  made = lambda: {name: mesh_lib.to_host(make())}
  return files.kept(path, _owner(run, tokens), made)[name]


def _kept_in(run) -> pathlib.Path:
  return run.shared or run.workdir


def _owner(run, tokens) -> dict[str, Any]:
  """What files of the workdir belong to; policies may share them."""
  flags = {k: v for k, v in run.flags.items() if k not in _OF_THE_POLICY}
  return {"flags": flags, "tokens": tokens}


def _damage(run, lm, tokens, say) -> np.ndarray:
  """Mean damage (A, 3) on training text, kept in the workdir."""
  say("measuring the damage of every level")
  method = run.method

  def measure():
    text = windows_lib.random_windows(
      tokens, method.layout, run.damage_windows, seed=run.seed + 8, step=0
    )
    text = windows_lib.whole(text, method.layout)
    levels = damage_lib.moves(method.setup.table)
    total = int(text.weights.sum()) * (1 + len(levels))
    return damage_lib.measure(
      method.setup,
      lm,
      text,
      window_batch=run.options.windows,
      divergence=method.reward == "divergence",
      progress=progress_lib.counter("levels", total, run.progress),
    )

  return _kept(run, "damage", tokens, measure)


def _curve(run, frozen, params, tokens) -> tuple[np.ndarray, np.ndarray]:
  """Prices (P,) and the mean cost (P,) that the greedy policy spends.

  Both are empty where the policy is asked for targets.
  """
  method = run.method
  if method.budget == "targets":
    return np.zeros((0,), np.float32), np.zeros((0,), np.float32)
  low, high = np.asarray(frozen.log_price, np.float64)
  prices = np.exp(np.linspace(low - 0.3, high + 0.3, 16)).astype(np.float32)
  windows = windows_lib.spread_windows(
    tokens, method.layout, run.calibration_windows
  )
  played = calibrate.run_points(
    method.setup,
    frozen.lm,
    windows,
    method.layout.starts(),
    policy_lib.controller(method.policy, greedy=True),
    (params, frozen.stats),
    prices[:, None],
    batch=run.options.windows,
  )
  spent = method.policy.spent[played.actions].mean((1, 2)) + run.overhead
  return prices, spent.astype(np.float32)


def _regression(run, frozen, scalar_stats, tokens, samples) -> np.ndarray:
  """Coefficients (10, 3) of the baseline, kept in the workdir."""
  method, windows = run.method, run.options.windows
  costs = method.policy.costs
  common = {"damage": frozen.stats.damage, "scalar_stats": scalar_stats}

  def fit():
    if method.reward == "divergence":
      return counterfactual.fit_samples(samples, costs=costs, **common)
    rounds = max(-(-run.ridge_windows // windows), 2)
    drawn = (
      windows_lib.random_windows(
        tokens, method.layout, windows, seed=run.seed + 7, step=step
      )
      for step in range(rounds)
    )
    return counterfactual.fit_labels(
      method.setup,
      frozen.lm,
      drawn,
      method.layout.starts(),
      log_price=frozen.log_price,
      schedules=method.group_size,
      gamma=method.gamma,
      seed=run.seed,
      **common,
    )

  return _kept(run, "counterfactual_regression", tokens, fit)
