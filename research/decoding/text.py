"""Continues prompts with a language model, the text handed out as it comes."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models import control_tokens, language_model
from models.errors import InputError
from models.tokenizer import Tokenizer
from research.decoding import loop as generation
from research.decoding.sampling import Sampling
from research.decoding.text_stream import TextStream
from research.text import buckets

END, STOP, LENGTH = "end token", "stop string", "max_tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How prompts are continued.

  Attributes:
    max_tokens: at most so many tokens are added, an end token included.
    sampling: how they are drawn.
    seed: row i of a batch draws by the seed folded with i.
    stop: the text ends before the first of these strings.
    steps: tokens that one call of the device draws; more save calls, and come
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
    params: language_model.Params,
    tokenizer: Tokenizer,
  ):
    """Keeps a reference to `params`."""
    self.speed = Speed()
    self._config = config
    self._params = params
    self._tokenizer = tokenizer
    self._end_ids = control_tokens.end_ids(tokenizer)
    self._programs = {}

  def encode(self, prompt: str) -> np.ndarray:
    """Tokens (T,) of a prompt, behind the begin token if there is one.

    Raises:
      InputError: the prompt is empty and nothing can stand in its place.
    """
    tokens = self._tokenizer.encode(prompt)
    if self._tokenizer.bos_id is None and len(tokens):
      return tokens
    start = control_tokens.start_id(self._tokenizer)
    return np.concatenate([np.asarray([start], np.int32), tokens])

  def __call__(
    self,
    prompts: Sequence[np.ndarray],
    options: Options,
    on_text: Callable[[int, str], None] | None = None,
  ) -> list[Completion]:
    """Continues prompts of any lengths as one batch.

    Args:
      prompts: tokens (T,) each, at least one; see `encode`.
      options: how.
      on_text: called with a row and the next piece of its text.

    Raises:
      InputError: prompt and continuation are longer than what the model was
        trained on.
    """
    self._check(prompts, options)
    arrays = self._arrays(prompts, options)
    programs = self._compile(arrays, options)
    rows = [_Row(self._tokenizer, prompt, options) for prompt in prompts]
    speed, start = self.speed, time.perf_counter()
    for chunk, drawn in enumerate(self._drawn(programs, arrays, options)):
      now = time.perf_counter()
      if chunk == 0:
        speed.prefill_seconds += now - start
        speed.prefill_tokens += sum(map(len, prompts))
      else:
        speed.decode_seconds += now - start
        speed.decode_steps += drawn.shape[1]
        speed.decode_tokens -= sum(len(row.tokens) for row in rows)
      for index, row in enumerate(rows):
        piece = row.push(drawn[index], self._end_ids)
        if piece and on_text is not None:
          on_text(index, piece)
      if chunk:
        speed.decode_tokens += sum(len(row.tokens) for row in rows)
      if all(row.reason for row in rows):
        break
      start = now
    return [
      Completion(text=row.text, tokens=row.tokens, reason=row.reason)
      for row in rows
    ]

  def _check(self, prompts: Sequence[np.ndarray], options: Options) -> None:
    longest = max(map(len, prompts)) + options.max_tokens
    limit = language_model.max_length(self._config)
    if limit is not None and longest > limit:
      raise InputError(
        f"prompt and continuation may have {longest} tokens, the model was "
        f"trained on {limit}: give a shorter prompt or fewer max_tokens"
      )

  def _arrays(
    self, prompts: Sequence[np.ndarray], options: Options
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), buckets.round_up(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    rows = jnp.arange(len(prompts))
    key = jax.random.key(options.seed)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    return jnp.asarray(tokens), jnp.asarray(lengths), keys

  def _compile(self, arrays: tuple[jax.Array, ...], options: Options):
    """The two programs for this shape; compiled now, so that no timing has it.

    Both take the parameters and what else is not static.
    """
    shape, steps = arrays[0].shape, options.steps
    calls = -(-(options.max_tokens - 1) // steps)
    rules = generation.Rules(
      sampling=options.sampling,
      end_ids=self._end_ids,
      vocab_size=self._tokenizer.vocab_size,
    )
    cache_size = shape[1] + calls * steps
    key = (shape, cache_size, steps, rules)
    if key not in self._programs:
      start = time.perf_counter()
      static = {"cache_size": cache_size, "rules": rules}
      begin = generation.begin.lower(
        self._config, self._params, *arrays, **static
      )
      batch = begin.out_info[0]
      advance = generation.advance.lower(
        self._config, self._params, batch, steps=steps, rules=rules
      )
      self._programs[key] = begin.compile(), advance.compile()
      self.speed.compile_seconds += time.perf_counter() - start
    return self._programs[key]

  def _drawn(
    self, programs, arrays: tuple[jax.Array, ...], options: Options
  ) -> Iterator[np.ndarray]:
    """Tokens of all rows (B, n) in turn, the device one call ahead."""
    begin, advance = programs
    batch, drawn = begin(self._params, *arrays)
    yield np.asarray(drawn)
    planned, drawn = 1, None
    while True:
      following = None
      if planned < options.max_tokens:
        batch, following = advance(self._params, batch)
        planned += options.steps
      if drawn is not None:
        yield np.asarray(drawn)
      if following is None:
        return
      drawn = following


class _Row:
  """The continuation of one prompt as it grows."""

  def __init__(
    self, tokenizer: Tokenizer, prompt: np.ndarray, options: Options
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
