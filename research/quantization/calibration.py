"""Calibration: what each place of a model is given, layer after layer.

A layer is run by itself over all batches before the next one begins, so that
only one is held in memory twice, and that a layer can be changed knowing what
the changed ones before it give it (as GPTQ asks). Shapes by axis letter: N
batches, B rows, T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import language_model
from models.errors import InputError
from models.tokenizer import Tokenizer
from ops.quantized import QWeight, Taps
from research.quantization.statistics import (
  MAXIMA,
  PLACES,
  Observer,
  Statistics,
  Wanted,
)
from research.quantization.structure import at, has, kernels, put, stacked

# By the name of a place, such as "mixer.in_proj".
Notes = dict[str, Statistics]
# Gives the new parameters of a layer, of which it is told the number.
Change = Callable[[int, dict[str, Any], Notes], dict[str, Any]]
HEAD = "lm_head"
# The keys of attention, behind their rotation.
KEYS = "attn.k"
# Fewer tokens leave percentiles and products of channels to chance.
LEAST_TOKENS = 1024
# Rows of a batch.
_ROWS = 8
# A token has fewer on average, in all but the strangest texts.
_CHARACTERS = 16


def batches_of(
  text: str, tokenizer: Tokenizer, *, windows: int, length: int
) -> np.ndarray:
  """Windows of a text, spread evenly over it, each behind the begin token.

  Args:
    text: that is not the test's.
    tokenizer: of the model.
    windows: how many, filled up to whole batches.
    length: T.

  Returns:
    (N, B, T) int32.

  Raises:
    InputError: the text is too short for windows that share nothing, or they
      have fewer tokens than make sense.
  """
  rows = min(_ROWS, windows)
  count = -(-windows // rows) * rows
  stride = len(text) // count
  pieces = [text[i * stride : (i + 1) * stride] for i in range(count)]
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  # More characters than the tokens have are not read.
  most = _CHARACTERS * length
  found = tokenizer.encode_all([piece[:most] for piece in pieces])
  found = [[*begin, *ids][:length] for ids in found]
  least = min(map(len, found))
  if least < length or count * length < LEAST_TOKENS:
    raise InputError(
      f"calibration: {count} windows of {length} tokens are asked for, and the "
      f"text of {len(text):,} characters has some of {least}: give a longer "
      f"text or fewer windows, of {LEAST_TOKENS:,} tokens in all at least"
    )
  return np.asarray(found, np.int32).reshape(-1, rows, length)


def calibrate(
  config: language_model.Config,
  params: language_model.Params,
  batches: np.ndarray,
  *,
  wanted: Wanted = MAXIMA,
  advance: Callable[[int], None] | None = None,
) -> tuple[list[Notes], Statistics]:
  """Statistics of a model over a stream of token batches.

  Args:
    config: of the model.
    params: of the model.
    batches: (N, B, T) int32.
    wanted: what is noted besides the largest magnitudes.
    advance: told how many more layers are done.

  Returns:
    For each layer those of each kernel's input and of each tap; and those of
    what the head is given.

  Raises:
    InputError: what a layer gives is not finite.
  """
  found: list[Notes] = []

  def note(_, params, notes):
    found.append(notes)
    return params

  _, head = walk(config, params, batches, note, wanted=wanted, advance=advance)
  return found, head


def walk(
  config: language_model.Config,
  params: language_model.Params,
  batches: np.ndarray,
  change: Change,
  *,
  wanted: Wanted = MAXIMA,
  advance: Callable[[int], None] | None = None,
) -> tuple[language_model.Params, Statistics | None]:
  """Changes a model layer by layer; each reads what the changed ones give.

  Args:
    config: of the model.
    params: of the model.
    batches: (N, B, T) int32; of none there are no statistics.
    change: gives the new parameters of a layer, those of a stack all alike.
    wanted: what is noted besides the largest magnitudes.
    advance: told how many more layers are done.

  Returns:
    The new parameters, and statistics of what the head is given.

  Raises:
    InputError: what a layer gives is not finite.
  """
  streams = [begin(config, params, jnp.asarray(batch)) for batch in batches]
  stacks: dict[tuple, list[Any]] = {}
  for number, layer in enumerate(language_model.layers_of(config)):
    own = jax.tree.map(lambda a, i=layer.index: a[i], at(params, layer.stack))
    notes: Notes = {}
    for stream in streams:
      more = _observe(config, layer.kind, wanted, own, stream)
      notes = {n: notes[n].merge(m) if notes else m for n, m in more.items()}
    _check(notes, f"layer {number}")
    new = change(number, own, notes)
    stacks.setdefault(layer.stack, []).append(new)
    streams = [run_layer(config, layer.kind, new, stream) for stream in streams]
    if advance is not None:
      advance(1)
  params = stacked(params, stacks)
  seen = [_finish(config, params, wanted, stream) for stream in streams]
  if not seen:
    return params, None
  head = functools.reduce(Statistics.merge, seen)
  _check({HEAD: head}, "the last norm")
  return params, head


@functools.partial(jax.jit, static_argnums=0)
def begin(
  config: language_model.Config, params: language_model.Params, tokens: Any
) -> Any:
  """What the first layer reads of tokens (B, T), compiled."""
  return language_model.before_layers(config, params, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(
  config: language_model.Config, kind: str, params: dict[str, Any], stream: Any
) -> Any:
  """What a layer gives to the next one, compiled for all that are alike."""
  return language_model.layer(config, params, kind, stream)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(config, kind, wanted, params, stream) -> Notes:
  """Statistics of one layer on one batch."""
  notes: Notes = {}
  for path in kernels(params):
    kernel = at(params, path)["kernel"]
    seen = Observer(notes, ".".join(path), wanted)
    if isinstance(kernel, QWeight):
      kernel = QWeight(
        weight=kernel.weight, input=seen, hadamard=kernel.hadamard
      )
    else:
      kernel = QWeight(weight=kernel, input=seen)
    params = put(params, (*path, "kernel"), kernel)
  if has(params, ("mixer",)):
    # No kernel multiplies what taps see, so that nobody asks for its gram.
    less = dataclasses.replace(wanted, gram=False)
    seen = {p: Observer(notes, f"mixer.{p}", less) for p in PLACES}
    params = put(params, ("mixer", "taps"), Taps(**seen))
  if has(params, ("attn",)) and config.cached_heads:
    seen = Observer(notes, KEYS, dataclasses.replace(wanted, gram=False))
    params = put(params, ("attn", "taps"), Taps(k=seen))
  language_model.layer(config, params, kind, stream)
  return notes


@functools.partial(jax.jit, static_argnums=(0, 2))
def _finish(config, params, wanted, stream) -> Statistics:
  hidden = language_model.after_layers(config, params, stream)
  return Statistics.of(hidden, wanted)


def _check(notes: Notes, where: str) -> None:
  for name, seen in notes.items():
    if not np.isfinite(seen.absmax).all():
      raise InputError(
        f"calibration: {where}: what {name} is given is NaN or infinite; the "
        "weights are damaged, or too large for their dtype"
      )
