"""A run: data, members of several rates and seeds, rounds, the test.

The test data is looked at once, by the members of the rate that did best on
validation data, with the parameters that each had at its best.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import fabnet
from models.fabnet_config import FABNetConfig
from research.core import files, loop, metrics, optimizer, report
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core.options import RunOptions
from research.lra import architectures, curves, learn
from research.lra import data as data_lib
from research.lra.options import Options
from research.lra.tasks import TASKS

Say = Callable[[str], None]

DIGEST = "data_sha256"
# Tokens of a batch that is only looked at.
_EVAL_TOKENS = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What `train` does.

  Attributes:
    options: of the model and its training.
    data: which data.
    workdir: folder of the run.
    seeds: of members.
    learning_rates: peaks that are tried, each with all seeds.
    config: of the model, in the place of the options' sizes; or None.
    keep: checkpoints kept.
    mesh: devices; None takes one.
  """

  options: Options
  data: data_lib.Options
  workdir: pathlib.Path
  seeds: Sequence[int] = (0,)
  learning_rates: Sequence[float] = (1e-3,)
  config: FABNetConfig | None = None
  keep: int = 1
  mesh: jax.sharding.Mesh | None = None

  @property
  def members(self) -> list[tuple[float, int]]:
    """(learning rate, seed) of each."""
    return [(rate, seed) for rate in self.learning_rates for seed in self.seeds]


def train(run: Run, say: Say) -> list[dict[str, Any]]:
  """Trains, tests, and writes models, report and curves to the workdir.

  Returns:
    A row for each seed at the best learning rate.

  Raises:
    InputError: data or sizes do not do.
    loop.Stopped: the run was stopped, or diverged.
  """
  options, task = run.options, TASKS[run.options.task]
  run = dataclasses.replace(run, mesh=run.mesh or mesh_lib.data_mesh(1))
  mesh_lib.check_batch(run.mesh, options.batch)
  mesh_lib.check_no_sequence(run.mesh)
  config = run.config or architectures.config(options)
  mesh_lib.check_used(run.mesh, fabnet.abstract_params(config))
  parts = data_lib.load(task, run.data, say)
  compute = learn.compute_of(options)
  say(
    f"{options.model} on {task.name}: {fabnet.num_params(config):,} parameters,"
    f" {architectures.block_parameters(config):,} of them in blocks; "
    f"{len(parts.train.labels):,} sequences to learn from, "
    f"{len(parts.valid.labels):,} to validate, {len(parts.test.labels):,} to "
    "test"
  )
  began = time.perf_counter()
  flags = _flags(run, config, parts)
  seeds = np.array([seed for _, seed in run.members])
  data = {
    "train": learn.on_device(parts.train),
    "valid": learn.on_device(parts.valid),
  }
  params = learn.init(config, seeds)
  if options.pretrain_steps:
    say(f"{options.pretrain_steps} updates restore hidden tokens")
    loss = learn.restore_loss(config, compute, task, options.mask_rate)
    step = learn.make_round(loss, options, task, None)
    state = learn.create_state(params, options, seeds, pretraining=True)
    count = options.pretrain_steps
    folder = run.workdir / "pretrain"
    rows_of = functools.partial(learn.rows_of, pretraining=True)
    params = _rounds(
      run, flags, folder, step, state, data, count, rows_of
    ).params
  evaluate = learn.make_evaluation(config, compute, _eval_batch(options))
  loss = learn.classify_loss(config, compute)
  step = learn.make_round(loss, options, task, evaluate)
  state = learn.create_state(params, options, seeds)
  count = options.steps - options.pretrain_steps
  state = _rounds(run, flags, run.workdir, step, state, data, count)
  rows = _tested(run, config, state, evaluate, parts)
  _write(run, rows, time.perf_counter() - began, say)
  return rows


def _flags(run, config, parts) -> dict[str, Any]:
  """What decides the numbers of a run."""
  digest = files.digest(
    [x for part in (parts.train, parts.valid, parts.test)
     for x in (part.tokens, part.labels)]
  )  # fmt: skip
  return run.options.to_json() | {
    "seeds": list(run.seeds),
    "learning_rates": list(run.learning_rates),
    "model_config": dataclasses.asdict(config),
    DIGEST: digest,
  }


def _eval_batch(options: Options) -> int:
  return max(_EVAL_TOKENS // options.sequence_length, 1)


def _rounds(
  run, flags, folder, step, state, data, count, rows_of=learn.rows_of
):
  """Updates of one phase, a round a step of the loop."""
  options = run.options
  size = min(options.eval_every, count)
  rounds = -(-count // size)
  warmup = min(options.warmup, count)
  schedule = optimizer.learning_rate(
    "cosine",
    1.0,
    count,
    warmup_steps=warmup,
    final_share=0.0,
    decay_share=0.0,
  )
  numbers = np.arange(rounds * size)
  shares = np.asarray(jax.vmap(schedule)(jnp.asarray(numbers)))
  # Updates that fill the last round change nothing.
  shares = np.where(numbers < count, shares, 0.0)
  peaks = np.array([rate for rate, _ in run.members])
  seeds = np.array([seed for _, seed in run.members])
  examples = data["train"]["labels"].shape[0]

  def batch_at(number: int):
    first = number * size
    part = slice(first, first + size)
    rows = rows_of(first, size, options.batch, examples, seeds)
    rates = (shares[part, None] * peaks[None]).astype(np.float32)
    return {"rows": rows, "rates": rates, "numbers": numbers[part]}

  # The data lies on the device and is passed as `frozen`, because each round
  # reads it again.
  return loop.run(
    state_lib.jit_step(step, run.mesh, rows=False),
    mesh_lib.place(run.mesh, state),
    batch_at,
    RunOptions(
      workdir=folder,
      flags=flags,
      # Checkpoints are for a run that is killed; one that is stopped saves
      # itself.
      checkpoint_every=max(rounds // 4, 1),
      log_every=1,
      keep=run.keep,
      shown=("loss", "accuracy"),
    ),
    num_steps=rounds,
    timing=lambda seconds: {"update_seconds": seconds / size},
    frozen=mesh_lib.replicate(run.mesh, data),
  )


def best_rate(run: Run, accuracies: np.ndarray) -> float:
  """The learning rate of the best mean validation accuracy (M,)."""
  table = accuracies.reshape(len(run.learning_rates), -1).mean(1)
  return run.learning_rates[int(np.argmax(table))]


def _tested(run, config, state, evaluate, parts) -> list[dict[str, Any]]:
  best, accuracies = jax.device_get(
    (state.extras["best"], state.extras["accuracy"])
  )
  rate = best_rate(run, accuracies)
  chosen = [n for n, member in enumerate(run.members) if member[0] == rate]
  # Parameters are read back before they are tested, so that what is told is
  # what the files hold.
  for number in chosen:
    folder = run.workdir / f"model_{run.members[number][1]}"
    if not folder.exists():
      own = jax.tree.map(lambda x, n=number: x[n], best)
      fabnet.save(folder, config, own)
  models = [
    fabnet.load(run.workdir / f"model_{run.members[n][1]}")[1] for n in chosen
  ]
  stacked = jax.tree.map(lambda *each: jnp.stack(each), *models)
  shares = jax.device_get(
    jax.jit(evaluate)(stacked, learn.on_device(parts.test))
  )
  return [
    _row(run, config, run.members[n], float(accuracies[n]), float(share), parts)
    for n, share in zip(chosen, shares)
  ]


def score(
  folder: pathlib.Path, split: learn.Split, dtype: str = "float32"
) -> float:
  """The share of right answers of a saved model, as `train` tells it."""
  config, params = fabnet.load(folder)
  batch = max(_EVAL_TOKENS // config.max_length, 1)
  compute = learn.compute_of(Options(dtype=dtype))
  evaluate = learn.make_evaluation(config, compute, batch)
  one = jax.tree.map(lambda x: x[None], params)
  return float(jax.jit(evaluate)(one, learn.on_device(split))[0])


def _row(run, config, member, valid, share, parts) -> dict[str, Any]:
  options = run.options
  count = len(parts.test.labels)
  spread = 1.96 * (share * (1 - share) / count) ** 0.5
  return {
    "system": "lra",
    "model": options.model,
    "data": options.task,
    "method": options.model,
    "budget": options.steps,
    "metric": "accuracy",
    "value": share,
    "low": share - spread,
    "high": share + spread,
    "seeds": 1,
    "seed": member[1],
    "learning_rate": member[0],
    "valid_accuracy": valid,
    "examples": count,
    "d_model": config.d_model,
    "d_ff": config.d_ff,
    "fourier_layers": config.fourier_layers,
    "attention_layers": config.attention_layers,
    "length": options.sequence_length,
    "parameters": fabnet.num_params(config),
    "block_parameters": architectures.block_parameters(config),
    "positions": options.positions,
    "pretrain_share": options.pretrain_share,
    "augment": options.augment,
  }


def _write(run, rows, seconds: float, say: Say) -> None:
  options = run.options
  columns = {
    "seed": "seed",
    "learning_rate": "learning rate",
    "valid_accuracy": "validation accuracy",
    "value": "test accuracy",
  }
  table = report.markdown_table(rows, columns)
  say(table.rstrip("\n"))
  rate = rows[0]["learning_rate"]
  chosen = [n for n, member in enumerate(run.members) if member[0] == rate]
  lines = metrics.read_jsonl(run.workdir / "metrics.jsonl")
  curves.plot(
    run.workdir / "curves.png",
    {options.model: (lines, chosen)},
    f"{options.task}: accuracy on validation data",
  )
  report.write_report(
    run.workdir / "report.md",
    f"{options.model} on {options.task}",
    [table, report.picture("validation accuracy", "curves.png")],
  )
  say(f"report: {run.workdir / 'report.md'} ({seconds:.0f} s)")
