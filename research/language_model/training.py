"""A whole training run: tokens, updates, evaluations, and the model it gives.

Every stage is a function of the options and the text, and what it made is kept
in the workdir or the token cache, so that a killed run goes on where it was.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from models import export, module
from models.implementations import Implementations
from models.tokenizer import Tokenizer
from research.core import (
  files,
  loop,
  metrics,
  optimizer,
  plots,
  processes,
  report,
)
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.core import workdir as workdir_lib
from research.core.options import RunOptions
from research.core.state import TrainState
from research.cost import devices
from research.cost import language_model as flops
from research.language_model import (
  architectures,
  chunk_costs,
  learn,
  starting,
)
from research.language_model.architectures import Model
from research.language_model.options import Options
from research.text import packing, token_cache, tokenizing
from research.text.packing import Corpus

Say = Callable[[str], None]
Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(RunOptions):
  """Everything a run is made of.

  Attributes:
    options: what decides the numbers.
    text: of training, names of `models.text.load_text`.
    eval_text: held-out texts; none takes the end of `text`.
    start: a model to fine-tune, of `models.convert.load`, whose sizes and
      tokenizer win; or a workdir (or a state in its `checkpoints/`) to go on
      from, longer or with other rates.
    cache: folder of tokens and tokenizers, shared by runs.
    mesh: devices; None takes all.
    implementations: of the ops.
    unroll: layers in one iteration of the scan over them, 0 for all.
    peak_flops: of a device; None looks it up.
  """

  options: Options
  text: Sequence[str]
  eval_text: Sequence[str] = ()
  cache: pathlib.Path
  start: str | None = None
  mesh: jax.sharding.Mesh | None = None
  implementations: Implementations = Implementations()
  unroll: int = 1
  peak_flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run came to; losses in nats a token.

  Attributes:
    eval_loss: of the held-out windows at the end.
    unigram_entropy: of the training text's tokens.
    num_params: of the model.
  """

  eval_loss: float
  unigram_entropy: float
  num_params: int

  def lines(self) -> list[str]:
    """The result in words."""
    below = "below" if self.eval_loss < self.unigram_entropy else "NOT below"
    return [
      f"held-out loss {self.eval_loss:.4f} nats a token, perplexity "
      f"{math.exp(self.eval_loss):.3f}",
      f"unigram entropy of the training text {self.unigram_entropy:.4f} nats "
      f"a token: the loss is {below} it",
    ]


def train(run: Run, say: Say) -> Result:
  """Trains a model and writes it to `workdir/model`.

  Args:
    run: the run.
    say: prints a line.

  Raises:
    InputError: options, texts, the start or the workdir do not do.
    loop.Stopped: interrupted or diverged.
  """
  options, mesh = run.options, run.mesh or mesh_lib.make()
  mesh_lib.check_batch(mesh, options.batch, options.accumulate)
  mesh_lib.check_length(mesh, options.length)
  params, goes_on = None, run.start and starting.kept_states(run.start)
  if run.start and not goes_on:
    config, params, tokenizer = starting.model(run.start, options)
  else:
    tokenizer = processes.writer_first(lambda: load_tokenizer(run))
    config = architectures.config_of(options, tokenizer.vocab_size)
  # Training gives probability to the rows that evaluation gives it to.
  vocab_size = config.vocab_size
  train_corpus, eval_corpus = processes.writer_first(
    lambda: _corpora(run, tokenizer)
  )
  batches = packing.Batches(
    corpus=train_corpus, rows=options.batch, length=options.length
  )
  held_out = packing.held_out(
    eval_corpus,
    rows=min(
      options.batch, _ceil(options.eval_windows, mesh_lib.row_parts(mesh))
    ),
    length=options.length,
    most=options.eval_windows,
  )
  flags = _flags(run, train_corpus, eval_corpus)
  if goes_on:
    starting.check(run.start, flags)
  workdir_lib.claim(run.workdir, flags)

  model = _model(run, config)
  key = jax.random.key(options.seed)
  schedule, tx = make_optimizer(options)
  if params is None:
    shapes = jax.eval_shape(model.init, key)
  else:
    shapes = jax.eval_shape(lambda tree: tree, params)
  mesh_lib.check_used(mesh, shapes)
  own = {}
  if params is None and "chunk_costs" in shapes:
    counts = train_corpus.counts(vocab_size)
    own["chunk_costs"] = chunk_costs.table(config, tokenizer, counts)
  make_state = _first_state(mesh, model, tx, key, params, own)
  if goes_on:
    make_state = functools.partial(_kept_state, run.start, make_state)
  # A name that lives to the end would keep these parameters in memory beside
  # those of the run.
  del params
  result = Result(
    eval_loss=math.nan,
    unigram_entropy=train_corpus.unigram_entropy(vocab_size),
    num_params=module.num_params(shapes),
  )
  _say_what(run, model, batches, result, say)
  step = learn.make_step(
    model,
    tx,
    schedule,
    vocab_size=vocab_size,
    accumulate=options.accumulate,
    z_loss=options.z_loss,
  )
  evaluate = learn.make_evaluation(model, mesh, held_out, vocab_size)
  state = loop.run(
    state_lib.jit_step(step, mesh),
    make_state,
    lambda at: batches.batch_at(at, options.seed),
    dataclasses.replace(run, flags=flags),
    num_steps=options.steps,
    hooks=[loop.Hook(_evaluation(options, evaluate), options.eval_every)],
    timing=_timing(run, flops.training(config, options.length), mesh),
  )
  rows = processes.from_writer(
    lambda: metrics.read_jsonl(run.workdir / "metrics.jsonl")
  )
  result = dataclasses.replace(result, eval_loss=rows[-1]["eval_loss"])
  params = mesh_lib.to_writer(state.params)

  def write() -> None:
    _export(run, config, params, tokenizer)
    _report(run, config.family, result, rows)

  processes.from_writer(write)
  return result


def _first_state(
  mesh, model: Model, tx, key: jax.Array, params: Tree, own: dict[str, Any]
) -> Callable[[], TrainState]:
  """Makes the state in front of the first update, once.

  Args:
    mesh: where it lies.
    model: of the run.
    tx: its optimizer.
    key: of the run.
    params: of a model to fine-tune, which are then let go of; None for new
      ones.
    own: arrays of new parameters by name, in the place of drawn ones.
  """
  given = [params]

  def fine_tuned(params, key):
    return state_lib.create_state(params, tx, key)

  def new(key):
    arrays = jax.tree.map(jax.numpy.asarray, own)
    return state_lib.create_state(model.init(key) | arrays, tx, key)

  def make() -> TrainState:
    params = given.pop()
    if params is None:
      return mesh_lib.build(mesh, new, key)
    return mesh_lib.build(mesh, fine_tuned, params, key)

  return make


def _kept_state(start: str, fresh: Callable[[], TrainState]) -> TrainState:
  return starting.state(start, fresh())


def _model(run: Run, config) -> Model:
  return Model(
    config=config,
    dtype=run.options.dtype,
    implementations=run.implementations,
    remat=run.options.remat,
    document_mask=run.options.document_mask,
    unroll=run.unroll,
  )


def _flags(run: Run, train_corpus: Corpus, eval_corpus: Corpus) -> dict:
  """What decides the numbers of a run."""
  return dataclasses.asdict(run.options) | {
    "text": list(run.text),
    "eval_text": list(run.eval_text),
    "tokens_digest": f"{train_corpus.digest}-{eval_corpus.digest}",
    "start": run.start,
  }


def _say_what(run, model: Model, batches, result: Result, say: Say) -> None:
  """Says what is trained, and on how much."""
  options = run.options
  per_token = flops.training(model.config, options.length)
  epochs = options.steps * options.batch / batches.per_epoch
  say(
    f"{model.config.family}, {result.num_params / 1e6:.4g}M "
    f"parameters, {per_token / 1e6:.4g} MFLOP a token"
  )
  say(
    f"{len(batches.corpus.tokens):,} tokens of training text, read "
    f"{epochs:.3g} times; unigram entropy {result.unigram_entropy:.4f} nats"
  )


def make_optimizer(options: Options):
  """The schedule, and the optimizer that follows it."""
  schedule = optimizer.learning_rate(
    options.schedule,
    options.learning_rate,
    options.steps,
    warmup_steps=options.warmup,
    final_share=options.final_share,
    decay_share=options.decay_share,
  )
  return schedule, optimizer.adamw(
    schedule,
    beta1=options.beta1,
    beta2=options.beta2,
    eps=options.eps,
    weight_decay=options.weight_decay,
    clip_norm=options.clip_norm,
  )


def load_tokenizer(run: Run) -> Tokenizer:
  """The tokenizer of a run.

  Raises:
    InputError: it cannot be had.
  """
  options = run.options
  if options.tokenizer == tokenizing.BPE:
    return token_cache.bpe(
      run.text,
      options.documents,
      options.vocab_size,
      run.cache,
      options.text_field,
    )
  return tokenizing.load(options.tokenizer, marks=True)


def _corpora(run: Run, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
  load = lambda names: token_cache.load_corpus(
    names,
    tokenizer,
    run.cache,
    rule=run.options.documents,
    field=run.options.text_field,
    progress=run.progress,
  )
  corpus = load(run.text)
  if run.eval_text:
    return corpus, load(run.eval_text)
  return corpus.split(run.options.held_out)


def _evaluation(options: Options, evaluate) -> Callable[[TrainState], dict]:
  def hook(state: TrainState) -> dict[str, float]:
    loss = evaluate(state.params)
    # The exponent is bounded, so that a huge loss does not end the run by an
    # overflow.
    perplexity = math.exp(min(loss, 700.0))
    tokens = int(state.step) * options.tokens_per_step
    return {"eval_loss": loss, "eval_perplexity": perplexity, "tokens": tokens}

  return hook


def _timing(run: Run, per_token: float, mesh) -> Callable[[float], dict]:
  """Tokens a second, and the share of the peak where that is known."""
  kind = mesh.devices.flat[0].device_kind
  peak = run.peak_flops or devices.peak_flops(kind)

  def timing(seconds: float) -> dict[str, float]:
    rate = run.options.tokens_per_step / seconds
    numbers = {"tokens_per_second": rate}
    if peak is not None:
      numbers["mfu"] = rate * per_token / (peak * mesh.size)
    return numbers

  return timing


def _ceil(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple


def _export(run, config, params: Tree, tokenizer: Tokenizer) -> None:
  """Writes `workdir/model` by one rename, with Hugging Face's names."""
  place = run.workdir / "model"
  if place.exists():
    return
  with files.whole_folder(place) as draft:
    export.save(draft, config, params, tokenizer)


def _report(run: Run, kind: str, result: Result, rows: list[dict]) -> None:
  """`curves.png` and `report.md`."""
  options = run.options
  keys = ["loss", "eval_loss", "grad_norm", "learning_rate"]
  plots.curves_plot(
    run.workdir / "curves.png", rows, keys, title=f"{kind}: training"
  )
  evaluations = [row for row in rows if "eval_loss" in row]
  chosen = np.unique(np.linspace(0, len(evaluations) - 1, 12).astype(int))
  table = report.markdown_table(
    [evaluations[i] for i in chosen],
    {
      "step": "step",
      "tokens": "tokens",
      "loss": "training loss",
      "eval_loss": "held-out loss",
      "eval_perplexity": "held-out perplexity",
      "tokens_per_second": "tokens/s",
      "mfu": "MFU",
    },
  )
  sizes = ", ".join(f"{k} {v}" for k, v in options.sizes().items())
  made = f"Start: {run.start}." if run.start else f"Sizes: {sizes}."
  report.write_report(
    run.workdir / "report.md",
    f"{kind}, {result.num_params / 1e6:.4g}M parameters",
    [
      f"{made} Text: {', '.join(run.text)}.",
      *result.lines(),
      table,
      report.picture("Curves of the run", "curves.png"),
    ],
  )
