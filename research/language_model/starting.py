"""What a run starts from: a model with its tokenizer, or a kept state."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from models import input_files
from models.convert import load
from models.errors import InputError
from models.tokenizer import Tokenizer
from research.core import processes
from research.core.checkpoint import Checkpointer
from research.core.state import TrainState
from research.language_model.architectures import Config, Params
from research.language_model.options import SIZES, Options
from research.text import tokenizing

# What a model brings with it.
_OF_MODEL = ("arch", "preset", *SIZES, "tie_embeddings", "vocab_size",
             "vocab_multiple")  # fmt: skip


def kept_states(start: str) -> tuple[Checkpointer, int] | None:
  """The kept states of a run and the step of one; None for a model.

  The process that writes looks for them, and tells the others.

  Args:
    start: a workdir, whose newest is taken, a state in its `checkpoints/`, or a
      model.
  """
  return processes.from_writer(lambda: _kept_states(start))


def _kept_states(start: str) -> tuple[Checkpointer, int] | None:
  path = pathlib.Path(start).expanduser()
  if path.parent.name == "checkpoints" and path.name.isdecimal():
    return Checkpointer(path.parent), int(path.name)
  found = Checkpointer(path / "checkpoints")
  steps = found.steps()
  return (found, steps[-1]) if steps else None


def model(start: str, options: Options) -> tuple[Config, Params, Tokenizer]:
  """A model to fine-tune, in float32, and its tokenizer.

  That of the options is taken where they name one, for models that have none.

  Raises:
    InputError: it cannot be read, options ask for another model, or its
      sequences are shorter than `options.length`.
  """
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    if field.name in _OF_MODEL and value != field.default:
      raise InputError(
        f"--{field.name}={value}: --start={start} brings its own: leave it out"
      )
  checkpoint = load(start)
  config, name = checkpoint.config, options.tokenizer
  tokenizer = tokenizing.of_checkpoint(
    checkpoint, None if name == tokenizing.BPE else name
  )
  if tokenizer.vocab_size > config.vocab_size:
    raise InputError(
      f"--start={start}: its tokenizer has {tokenizer.vocab_size} ids, its "
      f"token table {config.vocab_size} rows: get the model again"
    )
  most = config.max_position
  if most is not None and options.length > most:
    raise InputError(
      f"--length={options.length}: --start={start} has {most} positions: take "
      "at most so many"
    )
  return config, checkpoint.params, tokenizer


def check(start: str, flags: Mapping[str, Any]) -> None:
  """Whether a run may go on from a kept state.

  Args:
    start: of `kept_states`.
    flags: of the run.

  Raises:
    InputError: the state is of another model or of other tokens, or has all
      updates of the run behind it.
  """
  states, step = kept_states(start)
  path = states.directory.parent / "flags.json"
  before = processes.from_writer(
    lambda: input_files.read_kept(path, advice="give its model")
  )
  names = [*_OF_MODEL]
  if flags["tokenizer"] == tokenizing.BPE:
    names += ["text", "documents"]
  for name in names:
    if flags[name] != before.get(name):
      raise InputError(
        f"--{name} is {flags[name]!r}, but {before.get(name)!r} made "
        f"--start={start}: give the same, or its model as --start, to go on "
        "from its weights alone"
      )
  if step >= flags["steps"]:
    raise InputError(
      f"--steps={flags['steps']}: --start={start} has {step} updates behind "
      "it: give more"
    )


def state(start: str, fresh: TrainState) -> TrainState:
  """A kept state with its optimizer and its number of updates.

  Args:
    start: of `kept_states`.
    fresh: a state of the run, for its shapes.

  Raises:
    InputError: it is damaged or of other shapes.
  """
  states, step = kept_states(start)
  return states.restore(step, fresh)
