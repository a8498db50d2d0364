"""Continues prompts with a language model, the text handed out as it comes."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import control_tokens, errors, language_model
from models.errors import InputError
from models.tokenizer import Tokenizer
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling
from research.decoding.text_stream import TextStream
from research.text import buckets

END, STOP, LENGTH = "end token", "stop string", "max_tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
  """How prompts are continued.

  Attributes:
    max_tokens: at most so many tokens are added, an end token included.
    sampling: how they are drawn.
    seed: row i of a batch draws by the seed folded with i.
    stop: the text ends before the first of these strings.
    steps: that one call of the device makes; more save calls, and tokens come
      in lumps.
  """

  max_tokens: int = 128
  sampling: Sampling = Sampling(temperature=0.0)
  seed: int = 0
  stop: tuple[str, ...] = ()
  steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """The continuation of one prompt.

  Attributes:
    text: without an end token and what follows a stop string.
    tokens: all that were drawn up to the end, as ids.
    reason: why it ends: `END`, `STOP` or `LENGTH`.
  """

  text: str
  tokens: list[int]
  reason: str


@dataclasses.dataclass(kw_only=True)
class Speed:
  """Tokens and seconds, summed over batches, without padding.

  The first token of a continuation counts as part of reading the prompt:
  that is when it is there. Tokens drawn behind the end of a row do not count.
  """

  prefill_tokens: int = 0
  prefill_seconds: float = 0.0
  decode_tokens: int = 0
  decode_steps: int = 0
  decode_seconds: float = 0.0
  compile_seconds: float = 0.0

  def __str__(self) -> str:
    prefill = self.prefill_tokens / max(self.prefill_seconds, 1e-9)
    decode = self.decode_tokens / max(self.decode_seconds, 1e-9)
    step = 1e3 * self.decode_seconds / max(self.decode_steps, 1)
    return (
      f"prefill {self.prefill_tokens} tokens, {prefill:,.1f} tokens/s; "
      f"decode {self.decode_tokens} tokens, {decode:,.1f} tokens/s, "
      f"{step:.2f} ms a step; compiled in {self.compile_seconds:.1f} s"
    )


class Generator:
  """A model and its tokenizer, ready to continue prompts.

  Programs are compiled once for a shape and kept with the object.

  Attributes:
    speed: of all calls so far.
  """

  def __init__(
    self,
    config: language_model.Config,
    params: Any,
    tokenizer: Tokenizer,
    *,
    method: Callable[..., loop.Method] = Plain,
  ):
    """Keeps a reference to `params`.

    Args:
      config: of the model.
      params: of the model, or whatever else `method` needs.
      tokenizer: of the model.
      method: makes a method of `config`, `sampling` and `vocab_size`.
    """
    self.speed = Speed()
    self._config = config
    self._method = method
    self._params = params
    self._tokenizer = tokenizer
    self._end_ids = control_tokens.end_ids(tokenizer)
    self._programs = {}

  def encode(self, prompt: str) -> np.ndarray:
    """Tokens (T,) of a prompt, behind the begin token if there is one.

    Raises:
      InputError: the prompt is empty and nothing can stand in its place.
    """
    tokens = control_tokens.begun(
      self._tokenizer, self._tokenizer.encode(prompt)
    )
    if len(tokens):
      return tokens
    return np.asarray([control_tokens.start_id(self._tokenizer)], np.int32)

  def __call__(
    self,
    prompts: Sequence[np.ndarray],
    options: TextOptions,
    on_text: Callable[[int, str], None] | None = None,
  ) -> list[Completion]:
    """Continues prompts of any lengths as one batch.

    Args:
      prompts: tokens (T,) each, at least one; see `encode`.
      options: how.
      on_text: called with a row and the next piece of its text.

    Raises:
      InputError: prompt and continuation are longer than what the model was
        trained on, or its logits are not finite.
    """
    self._check(prompts, options)
    arrays = self._arrays(prompts, options)
    programs = self._compile(arrays, options)
    rows = [_Row(self._tokenizer, prompt, options) for prompt in prompts]
    speed, start = self.speed, time.perf_counter()
    for call, found in enumerate(self._found(programs, arrays, options)):
      drawn = found.rows()
      now = time.perf_counter()
      before = sum(len(row.tokens) for row in rows)
      for index, row in enumerate(rows):
        piece = row.push(drawn[index], self._end_ids)
        if piece and on_text is not None:
          on_text(index, piece)
      if call == 0:
        speed.prefill_seconds += now - start
        speed.prefill_tokens += sum(map(len, prompts))
      else:
        speed.decode_seconds += now - start
        speed.decode_steps += options.steps
        speed.decode_tokens += sum(len(row.tokens) for row in rows) - before
      if all(row.reason for row in rows):
        break
      start = now
    return [
      Completion(text=row.text, tokens=row.tokens, reason=row.reason)
      for row in rows
    ]

  def _check(self, prompts: Sequence[np.ndarray], options: TextOptions) -> None:
    longest = max(map(len, prompts)) + options.max_tokens
    limit = self._config.max_position
    if limit is not None and longest > limit:
      raise InputError(
        f"prompt and continuation may have {longest} tokens, the model was "
        f"trained on {limit}: give a shorter prompt or fewer max_tokens"
      )

  def _arrays(
    self, prompts: Sequence[np.ndarray], options: TextOptions
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), buckets.round_up(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    rows = jnp.arange(len(prompts))
    key = jax.random.key(options.seed)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    return jnp.asarray(tokens), jnp.asarray(lengths), keys

  def _compile(self, arrays: tuple[jax.Array, ...], options: TextOptions):
    """The two programs for this shape; compiled now, so that no timing has it.

    Both take the parameters and what else is not static.
    """
    shape, steps, end_ids = arrays[0].shape, options.steps, self._end_ids
    method = self._method(
      config=self._config,
      sampling=options.sampling,
      vocab_size=self._tokenizer.vocab_size,
    )
    calls = -(-(options.max_tokens - 1) // steps)
    # The cache has room for all tokens of the last step, though only some of
    # them may count.
    cache_size = shape[1] + calls * steps + method.width - 1
    key = (shape, cache_size, steps, method)
    if key not in self._programs:
      start = time.perf_counter()
      begin = loop.begin.lower(
        method, self._params, *arrays, cache_size=cache_size, end_ids=end_ids
      )
      batch, options = begin.out_info[0], {"steps": steps, "end_ids": end_ids}
      advance = loop.advance.lower(method, self._params, batch, **options)
      # The first token needs no second program.
      advance = advance.compile() if calls else None
      self._programs[key] = begin.compile(), advance
      self.speed.compile_seconds += time.perf_counter() - start
    return self._programs[key]

  def _found(
    self, programs, arrays: tuple[jax.Array, ...], options: TextOptions
  ) -> Iterator[loop.Found]:
    """What the calls find in turn, the device one call ahead.

    Every step finds a token of each row, so that `max_tokens` steps do.
    """
    begin, advance = programs
    batch, found = begin(self._params, *arrays)
    yield found
    before = None
    for _ in range(1, options.max_tokens, options.steps):
      batch, found = advance(self._params, batch)
      if before is not None:
        yield before
      before = found
    if before is not None:
      yield before


class _Row:
  """The continuation of one prompt as it grows."""

  def __init__(
    self, tokenizer: Tokenizer, prompt: np.ndarray, options: TextOptions
  ):
    self.tokens: list[int] = []
    self.reason = ""
    self._stream = TextStream(tokenizer, prompt, options.stop)
    self._max_tokens = options.max_tokens

  @property
  def text(self) -> str:
    return self._stream.text

  def push(self, drawn: np.ndarray, end_ids: Sequence[int]) -> str:
    """Adds tokens (n,) as far as the row goes on; returns new text."""
    text = ""
    for token in drawn.tolist():
      if self.reason:
        break
      if token == loop.BROKEN:
        raise errors.not_finite()
      self.tokens.append(token)
      if token in end_ids:
        self.reason = END
      else:
        text += self._stream.push(token)
        if self._stream.stopped:
          self.reason = STOP
        elif len(self.tokens) == self._max_tokens:
          self.reason = LENGTH
      if self.reason:
        text += self._stream.finish()
    return text


def generate_all(
  generator: Generator,
  prompts: Sequence[str],
  options: TextOptions,
  *,
  max_length: int,
  batch_tokens: int,
  advance: Callable[[int], None] | None = None,
) -> list[str]:
  """Continues many prompts in batches of like length; returns the texts.

  Prompts lose their beginning where they and `options.max_tokens` together
  are longer than `max_length`. `batch_tokens` bounds what a batch reads.

  Raises:
    InputError: `options.max_tokens` leaves no room for a prompt.
  """
  room = max_length - options.max_tokens
  if room < 1:
    raise InputError(
      f"{options.max_tokens} tokens to generate leave no room for a prompt "
      f"within {max_length}: give a longer --max_length"
    )
  encoded = [generator.encode(prompt)[-room:] for prompt in prompts]
  texts = [""] * len(prompts)
  lengths = list(map(len, encoded))
  for _, count, batches in buckets.batches(lengths, batch_tokens, room):
    for batch in batches:
      # The last batch is filled up with its last prompt, so that all batches of
      # a length have one shape and compile once.
      filled = [*batch, *[batch[-1]] * (count - len(batch))]
      completions = generator([encoded[i] for i in filled], options)
      # The seed differs between batches, so that their rows draw by other keys.
      options = dataclasses.replace(options, seed=options.seed + 1)
      for index, completion in zip(batch, completions, strict=False):
        texts[index] = completion.text
      if advance is not None:
        advance(len(batch))
  return texts
