"""How long models take, measured: an update, and passes by batch.

All programs are compiled at once by threads, and then timed one after the
other, with nothing beside them. An update is timed as training runs it, several
in one call of the device.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import fabnet
from models.errors import InputError
from models.fabnet import Compute
from models.fabnet_config import FABNetConfig
from research.bench import timing
from research.bench.case import Call
from research.cost.fabnet import count
from research.lra import architectures, learn
from research.lra.options import Options
from research.lra.tasks import TASKS

Row = dict[str, Any]

# Updates of a call, and sequences that they take.
_UPDATES, _EXAMPLES = 10, 512


@dataclasses.dataclass(frozen=True)
class Case:
  """A model whose time is measured.

  Attributes:
    name: of the model in rows.
    config: of it.
    batch: sequences of a pass; None for an update of the options' batch.
  """

  name: str
  config: FABNetConfig
  batch: int | None


def cases(
  models: Mapping[str, FABNetConfig], batches: Sequence[int]
) -> list[Case]:
  """An update, and a pass for each batch, of every model."""
  return [
    Case(name, config, batch)
    for name, config in models.items()
    for batch in (None, *batches)
  ]


def measure(
  wanted: Sequence[Case],
  options: Options,
  *,
  butterfly: str | None = None,
  repeats: int = 20,
  seconds: float = 0.3,
  say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
  """Times cases.

  Args:
    wanted: the cases.
    options: task, length, batch, dropout and dtype.
    butterfly: implementation of `ops.butterfly_matmul` in passes; updates, as
      training makes them, take XLA's.
    repeats: measurements of a case at most.
    seconds: that a case takes at most, after its first measurements.
    say: told each result.

  Returns:
    A row a case: "ms" of a pass or update, "sample_ms" of one sequence of it,
    parameters and work; "error" where one does not run.
  """
  traced = [_traced(case, options, butterfly) for case in wanted]
  with futures.ThreadPoolExecutor(8) as pool:
    compiled = list(pool.map(lambda item: item[0].compile(), traced))
  rows = []
  for case, (_, start), program in zip(wanted, traced, compiled, strict=True):
    calls = _UPDATES if case.batch is None else 1
    call = Call(start=start(program), count=calls)
    (found,) = timing.medians([call], repeats=repeats, seconds=seconds)
    rows.append(_row(case, options, found))
    shown = rows[-1]["ms"]
    what = "update" if case.batch is None else f"batch {case.batch}"
    say(f"{options.task} {case.name} {what}: {shown or rows[-1]['error']} ms")
  return rows


def _traced(case: Case, options: Options, butterfly: str | None):
  """A lowered program, and what makes a call of the compiled one."""
  config, task = case.config, TASKS[options.task]
  params = jax.tree.map(_drawn, fabnet.abstract_params(config))
  data = _data(config, case.batch or max(_EXAMPLES, options.batch))
  if case.batch is not None:
    compute = Compute(dtype=options.dtype, butterfly=butterfly)
    run = jax.jit(
      lambda p, tokens, lengths: fabnet.logits(
        config,
        p,
        tokens.astype(jnp.int32),
        lengths,
        compute=compute,
      )
    )
    arguments = params, data["tokens"], data["lengths"]
    return run.lower(*arguments), lambda program: lambda: program(*arguments)
  seeds = np.zeros(1, int)
  loss = learn.classify_loss(config, learn.compute_of(options))
  run = jax.jit(learn.make_round(loss, options, task, None), donate_argnums=0)
  members = jax.tree.map(lambda x: x[None], params)
  state = learn.create_state(members, options, seeds)
  examples = data["labels"].shape[0]
  batch = {
    "rows": learn.rows_of(0, _UPDATES, options.batch, examples, seeds),
    "rates": np.full((_UPDATES, 1), 1e-4, np.float32),
    "numbers": np.arange(_UPDATES),
  }
  batch = jax.tree.map(jnp.asarray, batch)
  holder = [state]

  def start(program):
    def update():
      # A call takes the state of the one before, whose arrays it is given.
      holder[0], metrics = program(holder[0], batch, {"train": data})
      return metrics

    return update

  return run.lower(state, batch, {"train": data}), start


def _drawn(shape) -> jax.Array:
  generator = np.random.default_rng(0)
  return jnp.asarray(generator.normal(0, 0.05, shape.shape), shape.dtype)


def _data(config: FABNetConfig, size: int) -> dict[str, jax.Array]:
  generator = np.random.default_rng(1)
  shape = (size, 2) if config.pairs else (size,)
  tokens = generator.integers(
    1, config.vocab_size - 1, (*shape, config.max_length), np.uint8
  )
  return {
    "tokens": jnp.asarray(tokens),
    "lengths": jnp.full(shape, config.max_length, jnp.int32),
    "labels": jnp.zeros(size, jnp.int32),
  }


def _row(case: Case, options: Options, found) -> Row:
  config = case.config
  work = count(config, config.max_length)["blocks"]
  failed = isinstance(found, Exception)
  batch = case.batch or options.batch
  ms = None if failed else 1e3 * found.seconds
  row = {
    "system": "lra",
    "data": options.task,
    "model": case.name,
    "pass": "update" if case.batch is None else "forward",
    "batch": batch,
    "length": config.max_length,
    "dtype": options.dtype,
    "ms": ms,
    "sample_ms": None if failed else ms / batch,
    "parameters": fabnet.num_params(config),
    "block_parameters": architectures.block_parameters(config),
    "multiplications": work.multiplications,
    "operations": work.operations,
    "d_model": config.d_model,
    "d_ff": config.d_ff,
    "layers": config.num_layers,
    "heads": config.num_heads,
  }
  if failed:
    row["error"] = " ".join(str(found).split())[:200]
  return row


def as_fast(
  rows: Sequence[Row], name: str, family: Mapping[str, FABNetConfig]
) -> str:
  """Which of a family takes about the time of an update that a model takes.

  Args:
    rows: of `measure`, of the model and the family.
    name: of the model.
    family: by name.

  Returns:
    The name of the largest that is not slower by more than 2%, or the fastest.

  Raises:
    InputError: the model has no time, or none of the family has.
  """
  own = {
    row["model"]: row["ms"]
    for row in rows
    if row["pass"] == "update" and row["ms"] is not None
  }
  known = [one for one in family if one in own]
  if name not in own or not known:
    errors = [row["error"] for row in rows if "error" in row]
    what = "no dense Transformer" if name in own else f"no update of {name}"
    raise InputError(f"{what} could be timed: {'; '.join(errors[:1])}")
  fast = [one for one in known if own[one] <= 1.02 * own[name]]
  if not fast:
    return min(known, key=own.get)
  return max(fast, key=lambda one: architectures.block_parameters(family[one]))
