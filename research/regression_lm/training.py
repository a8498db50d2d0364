"""A whole training run with files and exact resume, and the model it gives."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from models.errors import InputError
from models.regression_lm import Compute
from research.core import loop, metrics, optimizer, plots, report
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core import workdir as workdir_lib
from research.core.options import RunOptions
from research.regression_lm import freezing, learn
from research.regression_lm.api import RegressionLM
from research.regression_lm.best_parameters import Best
from research.regression_lm.expected import Scale
from research.regression_lm.likelihood import Model
from research.regression_lm.options import Options
from research.regression_lm.source import Source
from research.regression_lm.token_batches import Dataset
from research.text import tokenizing

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(RunOptions):
  """Everything a run is made of.

  Attributes:
    options: what decides the numbers.
    source: of examples.
    start: folder of a model to go on from; its sizes, tokenizer and numbers
      win over those of the options.
    encoder_weights: folder or hub id of T5Gemma, whose encoder and tokenizer
      win.
    mesh: devices; None takes all.
    attention: implementation of attention over text.
    unroll: layers of the encoder in one iteration of its scan, 0 for all.
  """

  options: Options
  source: Source
  start: str | None = None
  encoder_weights: str | None = None
  mesh: jax.sharding.Mesh | None = None
  attention: str | None = None
  unroll: int = 1


def train(run: Run, say: Say) -> RegressionLM:
  """Trains a model and writes it to `workdir/model`.

  Args:
    run: the run.
    say: prints a line.

  Raises:
    InputError: options, data or the workdir do not do.
    loop.Stopped: interrupted or diverged.
  """
  o, mesh = run.options, run.mesh or mesh_lib.make()
  mesh_lib.check_batch(mesh, o.batch)
  # `buckets.round_up` pads to 16, 24, 32, ..., which 8 alone divides all.
  padded = "--mesh: texts are padded to multiples of 8 tokens, and "
  mesh_lib.check_length(mesh, 8, padded)
  lm = _model(run)
  # What is wrong with the data is told before the workdir belongs to the run,
  # so that the same command with another flag can have it.
  run.source.check(lm.model.codec.format)
  flags = dataclasses.asdict(o) | {
    "source": run.source.describe(),
    "start": _name(run.start),
    "encoder_weights": _name(run.encoder_weights),
  }
  workdir_lib.claim(run.workdir, flags)
  prepared = run.source.prepare(lm, o.batch, o.seed)
  # On the host, since devices hold what a run makes of them.
  lm.params = mesh_lib.to_host(lm.params)
  trained, still = freezing.split(lm.params, o.freeze_encoder)
  batch_at, frozen = prepared.batch_at, {"params": still}
  loss = o.loss()
  if loss.needs_grid:
    scale = Scale.fit(o.scale, prepared.values)
    batch_at = prepared.scored(scale)
    frozen["grid"] = scale.grid(lm.model.codec, o.grid)
  frozen = mesh_lib.place(mesh, frozen)
  mesh_lib.check_used(mesh, lm.params)
  say(
    f"{lm.num_params / 1e6:.4g}M parameters, {lm.model.config.encoder} encoder"
  )
  schedule, tx = make_optimizer(o)
  step = learn.make_step(lm.model, tx, schedule, loss, combine=freezing.join)
  hooks, best = _validation(run, lm, prepared.valid, mesh, frozen)
  try:
    state = loop.run(
      state_lib.jit_step(step, mesh),
      lambda: mesh_lib.build(
        mesh,
        lambda params, key: state_lib.create_state(params, tx, key),
        trained,
        jax.random.key(o.seed),
      ),
      batch_at,
      dataclasses.replace(run, flags=flags),
      num_steps=o.steps,
      hooks=hooks,
      timing=lambda seconds: {"examples_per_second": o.batch / seconds},
      frozen=frozen,
    )
    trained, lm.info["step"] = jax.device_get(state.params), o.steps
  except _EarlyStop as stop:
    say(str(stop))
  if best is not None:
    lm.info["step"], trained = best.load(trained)
  lm.params = freezing.join(trained, still)
  lm.info["data"] = run.source.describe()
  lm.info["columns"] = run.source.columns()
  if prepared.has_range:
    lm.learn_range(prepared.values)
  if not (run.workdir / "model").exists():
    lm.save(run.workdir / "model")
  _report(run, lm)
  return lm


def _model(run: Run) -> RegressionLM:
  o = run.options
  if run.start and run.encoder_weights:
    raise InputError("--start and --encoder_weights: give one of them")
  if run.start:
    lm = RegressionLM.from_pretrained(run.start, dtype=o.dtype)
    if lm.num_objectives != run.source.num_objectives:
      raise InputError(
        f"--start={run.start}: predicts {lm.num_objectives} numbers, the data "
        f"has {run.source.num_objectives}: give as many --targets"
      )
  elif run.encoder_weights:
    lm = RegressionLM.from_t5gemma(
      run.encoder_weights, **_shape(run, o.decoder_sizes())
    )
  else:
    lm = RegressionLM.from_scratch(
      run.source.texts() if o.tokenizer in tokenizing.LEARNED else (),
      tokenizer=o.tokenizer,
      vocab_size=o.vocab_size,
      **_shape(run, o.sizes()),
    )
  compute = Compute(
    dtype=o.dtype, attention=run.attention, remat=o.remat, unroll=run.unroll
  )
  lm.model = Model(
    config=lm.model.config, codec=lm.model.codec, compute=compute
  )
  return lm


def _shape(run: Run, sizes: dict[str, Any]) -> dict[str, Any]:
  """What a new model is told, however its encoder comes."""
  o = run.options
  return sizes | {
    "size": o.size,
    "numbers": o.number_format(),
    "num_objectives": run.source.num_objectives,
    "max_length": o.max_length,
    "seed": o.seed,
  }


def _name(path: str | None) -> str | None:
  return path and pathlib.Path(path).name


def make_optimizer(
  options: Options,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """The schedule, and the optimizer that follows it."""
  o = options
  schedule = optimizer.learning_rate(
    o.schedule,
    o.learning_rate,
    o.steps,
    warmup_steps=o.warmup,
    final_share=o.final_share,
    decay_share=o.decay_share,
  )
  if o.optimizer == "muon":
    return schedule, optimizer.muon(
      schedule,
      adam_beta2=0.98,
      weight_decay=o.weight_decay,
      clip_norm=o.clip_norm,
    )
  return schedule, optimizer.adamw(
    schedule,
    beta1=0.9,
    beta2=0.98,
    eps=1e-8,
    weight_decay=o.weight_decay,
    clip_norm=o.clip_norm,
  )


def _validation(
  run: Run, lm: RegressionLM, valid: Dataset | None, mesh, frozen
):
  """Hooks that look at held-out examples, and the best weights they keep."""
  o, best = run.options, None
  if valid is not None and o.export == "best":
    best = Best(run.workdir / "best.safetensors")
  if o.early_stopping and best is None:
    raise InputError(
      f"--early_stopping={o.early_stopping}: needs --export=best and rows of "
      "--valid to look at"
    )
  if valid is None:
    return [], None
  parts = mesh_lib.row_parts(mesh)
  rows = -(-min(o.batch, len(valid)) // parts) * parts
  evaluate = learn.make_evaluation(
    lm.model, mesh, valid.whole(rows), combine=freezing.join
  )
  hook = _evaluation(evaluate, frozen, best, o.early_stopping * o.eval_every)
  return [loop.Hook(hook, o.eval_every)], best


class _EarlyStop(Exception):
  """Validation was not better for so long that the run ends."""


def _evaluation(evaluate, frozen, best: Best | None, patience: int):
  """Keeps the best weights; ends the run `patience` updates behind them."""

  def hook(state):
    found = evaluate(state.params, frozen)
    if best is not None:
      step = int(state.step)
      best.offer(step, found["loss"], state.params)
      # A run that goes on behind its last checkpoint stops at the same update.
      if patience and step - best.step >= patience:
        raise _EarlyStop(
          f"stopped after update {step}: the best validation loss is that of "
          f"update {best.step}"
        )
    return {"valid_loss": found["loss"], "valid_nll": found["nll"]}

  return hook


def _report(run: Run, lm: RegressionLM) -> None:
  """`curves.png` and `report.md`."""
  rows = metrics.read_jsonl(run.workdir / "metrics.jsonl")
  keys = ["loss", "valid_loss", "grad_norm", "learning_rate"]
  keys = [key for key in keys if any(key in row for row in rows)]
  plots.curves_plot(run.workdir / "curves.png", rows, keys)
  evaluations = [row for row in rows if "valid_loss" in row][-12:]
  parts = [
    f"{lm.num_params / 1e6:.4g}M parameters, {lm.num_objectives} numbers of "
    f"{lm.model.codec.format.length} tokens; the model in `model/` is that of "
    f"update {lm.info['step']}.",
    report.picture("Curves of the run", "curves.png"),
  ]
  if evaluations:
    columns = {
      "step": "step",
      "loss": "training loss",
      "valid_loss": "validation loss",
      "examples_per_second": "examples/s",
    }
    parts.insert(1, report.markdown_table(evaluations, columns))
  report.write_report(
    run.workdir / "report.md", "Regression language model", parts
  )
