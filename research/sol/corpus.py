"""Token streams to train, calibrate and evaluate on."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import text as text_lib
from models import tokenizer as tokenizer_lib
from models.convert import Checkpoint
from models.errors import InputError
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling

_SAMPLES = "samples:"
_BATCH = 64


def load_tokens(
  names: Sequence[str], checkpoint: Checkpoint, *, max_tokens: int | None = None
) -> np.ndarray:
  """Encodes texts one after the other: int32 (n,).

  Args:
    names: of `models.text.load_text`, or "samples:SEED:N": N tokens that the
      model samples itself, stories of at most 256 tokens, a pure function of
      SEED; different seeds share no story.
    checkpoint: the model, which names the tokenizer.
    max_tokens: cut the stream after so many.

  Raises:
    InputError: a text is unknown or unreadable.
  """
  if not names:
    raise InputError("there is no text: name at least one")
  pieces = []
  tokenizer = None
  for name in names:
    if name.startswith(_SAMPLES):
      pieces.append(_sampled(name, checkpoint))
      continue
    tokenizer = tokenizer or tokenizer_lib.load_tokenizer(checkpoint)
    pieces.append(tokenizer.encode(text_lib.load_text(name)))
  tokens = np.concatenate(pieces).astype(np.int32)
  return tokens if max_tokens is None else tokens[:max_tokens]


def _sampled(name: str, checkpoint: Checkpoint) -> np.ndarray:
  try:
    seed, count = (int(x) for x in name.removeprefix(_SAMPLES).split(":"))
    if count < 1:
      raise ValueError(count)
  except ValueError as error:
    raise InputError(
      f"{name!r} is no text: write samples:SEED:N with two integers, N > 0"
    ) from error
  length = min(256, checkpoint.config.max_position)
  rounds = -(-count // (_BATCH * length))
  key = jax.random.key(seed)
  stories = [
    _stories(checkpoint, length, jax.random.fold_in(key, i))
    for i in range(rounds)
  ]
  return np.concatenate(stories)[:count]


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
