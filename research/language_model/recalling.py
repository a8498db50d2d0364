"""Training and testing on `recall`: all seeds at once, in one program.

Shapes by axis letter: M members, which differ in their seeds, B texts of an
update, L tokens.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import module
from models.attamba_config import AttambaConfig
from models.errors import InputError
from models.implementations import Implementations
from research.core import intervals, loop, report
from research.core.options import RunOptions
from research.core.state import TrainState
from research.language_model import architectures, costs, learn, training
from research.language_model.architectures import Model
from research.language_model.options import Options
from research.language_model.recall import Task, answers, texts

Say = Callable[[str], None]

# Key of the texts that models are tested on.
_TEST = 1 << 20
_TEST_TOKENS = 1 << 17
COLUMNS = {
  "length": "tokens",
  "pairs": "pairs",
  "value": "right",
  "low": "low",
  "high": "high",
  "cache_bytes": "bytes kept",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What `train` does.

  Attributes:
    name: of the model, for tables.
    options: of the model and its training.
    task: what is asked.
    seeds: of members.
    test_lengths: tokens of texts that are tested.
    test_pairs: pairs of them.
    workdir: folder of the run.
  """

  name: str
  options: Options
  task: Task
  seeds: Sequence[int]
  test_lengths: Sequence[int]
  test_pairs: Sequence[int]
  workdir: pathlib.Path

  def check(self) -> None:
    """Raises InputError where nothing can be trained or tested."""
    options = self.options
    self.task.check(options.length, self.task.pairs, options.vocab_size)
    self.task.tests(self.test_lengths, self.test_pairs, options.vocab_size)

  @property
  def tests(self) -> list[tuple[int, int]]:
    """(length, pairs) of the tests, those that can be."""
    return self.task.tests(
      self.test_lengths, self.test_pairs, self.options.vocab_size
    )


def make_step(model: Model, tx, schedule, vocab_size: int, z_loss: float = 0.0):
  """An update of all members: `(state, batch, frozen) -> (state, metrics)`.

  Args:
    model: what is trained.
    tx: the optimizer.
    schedule: its learning rate, for the metrics.
    vocab_size: tokens there are.
    z_loss: weight of the squared log normalizer.
  """

  def objective(params, batch):
    sums = learn.token_sums(model, params, batch, vocab_size)
    total = sums["nll"] + z_loss * sums["squared_normalizer"]
    return total / jnp.maximum(sums["tokens"], 1.0)

  def update(params, memory, batch):
    loss, grads = jax.value_and_grad(objective)(params, batch)
    changes, memory = tx.update(grads, memory, params)
    params = jax.tree.map(jnp.add, params, changes)
    return params, memory, loss

  def step(state: TrainState, batch, frozen: None):
    del frozen
    params, memory, losses = jax.vmap(update)(
      state.params, state.opt_state, batch
    )
    state = dataclasses.replace(
      state, step=state.step + 1, params=params, opt_state=memory
    )
    rate = schedule(state.step - 1)
    return state, {"loss": losses.mean(), "losses": losses, "rate": rate}

  return jax.jit(step, donate_argnums=0)


def make_test(model: Model, vocab_size: int):
  """`(params of M members, tokens, places, right) -> shares (M,)`, compiled.

  Args:
    model: what is tested.
    vocab_size: tokens there are.
  """

  def one(params, tokens, places, right):
    none = jnp.full(tokens.shape, -1, jnp.int32)
    hidden = model.hidden(params, tokens, none)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    table = model.head(params)[:vocab_size]
    scores = jnp.einsum(
      "nad,vd->nav", hidden, table, preferred_element_type=jnp.float32
    )
    return jnp.mean(scores.argmax(-1) == right)

  return jax.jit(jax.vmap(one, (0, None, None, None)))


def train(run: Run, say: Say) -> list[dict[str, Any]]:
  """Trains all members, tests them, and writes a report to the workdir.

  Returns:
    A row for each length and number of pairs: the share of right answers, the
    mean of the seeds.

  Raises:
    InputError: sizes do not do.
    loop.Stopped: the run was stopped, or diverged.
  """
  run.check()
  options, vocab = run.options, run.options.vocab_size
  config = architectures.config_of(options, vocab)
  if isinstance(config, AttambaConfig) and config.boundaries in (
    "token_class",
    "surprise",
  ):
    raise InputError(
      f"--boundaries={config.boundaries}: symbols of recall are no words: take "
      "boundaries by place, or of the first layer"
    )
  # Kernels do not all know an axis of members, XLA does.
  by_xla = Implementations(scan="xla", conv="xla", norm="xla", attention="xla")
  model = Model(
    config=config,
    dtype=options.dtype,
    implementations=by_xla,
    document_mask=False,
    remat=options.remat,
  )
  seeds = tuple(run.seeds)
  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  params = jax.jit(jax.vmap(model.init))(keys)
  count = module.num_params(params) // len(seeds)
  say(f"{run.name}: {count:,} parameters, {len(seeds)} seeds at once")
  schedule, tx = training.make_optimizer(options)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=jax.vmap(tx.init)(params),
    key=keys,
  )

  def batch_at(step: int):
    own = [
      texts(
        run.task,
        (seed, step),
        options.batch,
        options.length,
        run.task.pairs,
        vocab,
        vary=True,
      )
      for seed in seeds
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *own)

  state = loop.run(
    make_step(model, tx, schedule, vocab, options.z_loss),
    state,
    batch_at,
    RunOptions(
      workdir=run.workdir,
      flags=_flags(run),
      checkpoint_every=max(options.steps // 4, 1),
      log_every=max(options.steps // 50, 1),
      keep=1,
    ),
    num_steps=options.steps,
  )
  rows = _tested(run, model, state.params, count)
  table = report.markdown_table(rows, COLUMNS)
  say(table.rstrip("\n"))
  title = f"{run.name}: {run.task.task}"
  report.write_report(run.workdir / "report.md", title, [table])
  return rows


def _flags(run: Run) -> dict[str, Any]:
  """What decides the numbers of a run."""
  found = dataclasses.asdict(run.options) | dataclasses.asdict(run.task)
  return found | {
    "name": run.name,
    "seeds": list(run.seeds),
    "test_lengths": list(run.test_lengths),
    "test_pairs": list(run.test_pairs),
  }


def _tested(run, model, params, count) -> list[dict[str, Any]]:
  options, rows = run.options, []
  test = make_test(model, options.vocab_size)
  for length, pairs in run.tests:
    batch = texts(
      run.task,
      (_TEST, length, pairs),
      run.task.test_texts,
      length,
      pairs,
      options.vocab_size,
      vary=False,
    )
    places, right = answers(batch)
    size = max(_TEST_TOKENS // (length * len(run.seeds)), 1)
    cuts = range(0, len(right), size)
    shares, weights = [], []
    for start in cuts:
      part = slice(start, start + size)
      tokens = batch["tokens"][part, :-1]
      shares.append(np.asarray(test(params, tokens, places[part], right[part])))
      weights.append(len(tokens))
    own = np.average(shares, axis=0, weights=weights)
    found = intervals.of_mean([float(share) for share in own])
    rows.append(
      {
        "system": "recall",
        "model": run.name,
        "data": run.task.task,
        "method": run.name,
        "budget": options.steps,
        "metric": "accuracy",
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "seeds": len(own),
        "each": [float(share) for share in own],
        "length": length,
        "pairs": pairs,
        "trained_length": options.length,
        "trained_pairs": run.task.pairs,
        "learning_rate": options.learning_rate,
        "parameters": count,
        "cache_bytes": costs.cache_bytes(model.config, length),
      }
    )
  return rows
