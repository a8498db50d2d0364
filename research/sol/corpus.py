"""Token streams to train, calibrate and evaluate on."""

import dataclasses
import pathlib
from collections.abc import Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

from models import text as text_lib
from models import tokenizer as tokenizer_lib
from models.convert import Checkpoint
from models.errors import InputError
from research.core import files
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling
from research.sol.options import SAMPLES, Options

_BATCH = 64


def load_tokens(
  names: Sequence[str],
  checkpoint: Checkpoint,
  *,
  max_tokens: int | None = None,
  folder: pathlib.Path | None = None,
) -> np.ndarray:
  """Encodes texts one after the other: int32 (n,).

  Args:
    names: of `models.text.load_text`, or "samples:SEED:N": N tokens that the
      model samples itself, stories of at most 256 tokens, a pure function of
      SEED; different seeds share no story.
    checkpoint: the model, which names the tokenizer.
    max_tokens: cut the stream after so many.
    folder: keeps what is sampled; None samples anew.

  Raises:
    InputError: a text is unknown or unreadable.
  """
  if not names:
    raise InputError("there is no text: name at least one")
  pieces = []
  tokenizer = None
  for name in names:
    if name.startswith(SAMPLES):
      pieces.append(_sampled(name, checkpoint, folder))
      continue
    tokenizer = tokenizer or tokenizer_lib.load_tokenizer(checkpoint)
    pieces.append(tokenizer.encode(text_lib.load_text(name)))
  tokens = np.concatenate(pieces).astype(np.int32)
  return tokens if max_tokens is None else tokens[:max_tokens]


def with_begin(options: Options, checkpoint: Checkpoint) -> Options:
  """Options of a run whose windows begin as the model needs it.

  Gemma 3 predicts next to nothing of a text without its begin token. Other
  models read the text's own token there, as they were measured.

  Args:
    options: of the run; a begin token that they name stays.
    checkpoint: of the frozen model.

  Raises:
    InputError: the model's tokenizer is missing or damaged.
  """
  given = options.begin not in (None, -1)
  if given or not checkpoint.config.post_norms:
    return options
  begin = tokenizer_lib.load_tokenizer(checkpoint).bos_id
  return dataclasses.replace(options, begin=begin)


def _sampled(
  name: str, checkpoint: Checkpoint, folder: pathlib.Path | None
) -> np.ndarray:
  try:
    seed, count = (int(x) for x in name.removeprefix(SAMPLES).split(":"))
    if count < 1:
      raise ValueError(count)
  except ValueError as error:
    raise InputError(
      f"{name!r} is no text: write samples:SEED:N with two integers, N > 0"
    ) from error
  if folder is None:
    return _drawn(checkpoint, seed, count)
  precision = jax.config.jax_default_matmul_precision
  owner = [checkpoint.name, seed, count, precision, checkpoint.params]
  path = folder / f"samples_{files.digest(owner)[:16]}.npz"
  made = files.kept(
    path, owner, lambda: {"tokens": _drawn(checkpoint, seed, count)}
  )
  return made["tokens"]


def _drawn(checkpoint: Checkpoint, seed: int, count: int) -> np.ndarray:
  length = min(256, checkpoint.config.max_position)
  rounds = -(-count // (_BATCH * length))
  key = jax.random.key(seed)
  one = lambda i: _stories(checkpoint, length, jax.random.fold_in(key, i))
  # The first round compiles; steps are so small that one core is busy a round.
  first = one(0)
  with futures.ThreadPoolExecutor(2) as pool:
    rest = pool.map(one, range(1, rounds))
    return np.concatenate([first, *rest])[:count]


def _stories(checkpoint: Checkpoint, length: int, key: jax.Array) -> np.ndarray:
  """Tokens (64 * length,) of stories that begin with the begin token."""
  method = Plain(config=checkpoint.config, sampling=Sampling())
  params = checkpoint.params
  begin = jnp.ones((_BATCH, 1), jnp.int32)
  # All rows share one key, because committed results rest on stories that were
  # drawn so.
  batch, first = loop.begin(
    method, params, begin, begin[:, 0], key, cache_size=length
  )
  _, rest = loop.advance(method, params, batch, steps=length - 2)
  return np.hstack([begin, first.tokens[..., 0], rest.tokens[..., 0]]).ravel()


def split(tokens: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
  """The first part of a stream, and its last `share`."""
  at = int(len(tokens) * (1 - share))
  return tokens[:at], tokens[at:]
