"""A tokenizer as all of this project has it; `models.tokenizer` reads them."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import processors

from models.errors import InputError, is_panic, reason

_STDERR = 2
# Two threads that redirect a descriptor in turn would leave it redirected.
_REDIRECTING = threading.Lock()
# How the engine of regular expressions says that it gave up.
_TOO_LONG = "retry-limit"


@contextlib.contextmanager
def quiet_panics() -> Iterator[None]:
  """Keeps what a panic of the library writes to stderr from getting there.

  Rust writes its panic, with 80 lines of trace if RUST_BACKTRACE is set, before
  Python sees an exception. What other threads write meanwhile comes after the
  block, and is lost if there is a panic. One thread at a time is in the block.
  """
  with _REDIRECTING, contextlib.ExitStack() as stack:
    try:
      kept = os.dup(_STDERR)
      stack.callback(os.close, kept)
      written = stack.enter_context(tempfile.TemporaryFile())
    except OSError:  # It is closed, or no folder takes a file.
      yield
      return
    os.dup2(written.fileno(), _STDERR)
    panicked = False
    try:
      yield
    except BaseException as error:
      panicked = is_panic(error)
      raise
    finally:
      os.dup2(kept, _STDERR)
      written.seek(0)
      rest = b"" if panicked else written.read()
      while rest:
        rest = rest[os.write(_STDERR, rest) :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """A byte-pair encoding.

  Attributes:
    backend: of the `tokenizers` package.
    vocab_size: the largest id and one; the model's table may have more rows.
    bos_id: the id that a text should begin with, or None where the model was
      trained without; `encode` never adds it.
    end_ids: ids that the model's files name as the end of a text.
    chat_template: how the model writes a chat, in Jinja; None where no file
      says it.
    names: texts of special tokens by their part, such as "bos_token".
    path: of the file it was read from, for messages, where it is known.
  """

  backend: tokenizers.Tokenizer
  vocab_size: int
  bos_id: int | None
  end_ids: tuple[int, ...] = ()
  chat_template: str | None = None
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  path: pathlib.Path | None = None

  @functools.cached_property
  def _may_panic(self) -> bool:
    """Whether it has regular expressions, whose engine panics at its limit."""
    parts = (self.backend.normalizer, self.backend.pre_tokenizer)
    states = (part.__getstate__() for part in parts if part is not None)
    return any(b'"Regex"' in state for state in states)

  def encode(self, text: str) -> np.ndarray:
    """The int32 ids (T,) of `text`, without a begin token.

    Raises:
      InputError: the tokenizer has no token for a part of it.
    """
    return np.asarray(self.encode_all([text])[0], np.int32)

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without begin tokens; uses all cores.

    Raises:
      InputError: the tokenizer has no token for a part of one, or its regular
        expression takes too long.
    """
    guard = quiet_panics if self._may_panic else contextlib.nullcontext
    try:
      with guard():
        found = self.backend.encode_batch_fast(
          list(texts), add_special_tokens=False
        )
    except BaseException as error:  # The library raises nothing narrower.
      if not isinstance(error, Exception) and not is_panic(error):
        raise
      text = repr(texts[0][:40]) if len(texts) == 1 else "one of the texts"
      if _TOO_LONG in (why := reason(error)):
        raise InputError(
          f"{self.path or 'the tokenizer'}: its pattern takes too long on "
          f"{text}: get another tokenizer.json"
        ) from error
      raise InputError(
        f"the tokenizer cannot read {text} ({why}): give a text of its own "
        "words"
      ) from error
    return [encoding.ids for encoding in found]

  def decode(self, ids: np.ndarray) -> str:
    """The text of `ids` (T,), control tokens left out."""
    return self.backend.decode(np.asarray(ids).tolist())


def table_size(backend: tokenizers.Tokenizer) -> int:
  """The largest id and one: some tokenizers leave ids out."""
  return 1 + max(backend.get_vocab().values(), default=-1)


def ids_within(ids: Iterable[Any], size: int) -> tuple[int, ...]:
  """Those of some values of a file that are ids below `size`, each once."""
  valid = (i for i in ids if type(i) is int and 0 <= i < size)
  return tuple(dict.fromkeys(valid))


def put_begin(backend: tokenizers.Tokenizer, begin: int | None) -> None:
  """Lets a tokenizer say of itself that texts begin with a token.

  So it is known of a `tokenizer.json` that is written of it, by other programs
  too. `Tokenizer.encode` adds it as little as before.

  Args:
    backend: to change.
    begin: id of the token, or None, which changes nothing.
  """
  token = None if begin is None else backend.id_to_token(begin)
  # The rule is written as TOKEN:TYPE, and "$" names what is given.
  if token is not None and ":" not in token and not token.startswith("$"):
    backend.post_processor = processors.TemplateProcessing(
      single=[f"{token}:0", "$A:0"], special_tokens=[(token, begin)]
    )


def with_said(
  tokenizer: Tokenizer,
  *,
  ends: Iterable[Any] = (),
  chat_template: Any = None,
  names: Mapping[str, Any],
) -> Tokenizer:
  """The tokenizer with what a file of its model says, behind what is known.

  Args:
    tokenizer: of the model.
    ends: ids of end tokens; what is none is left out.
    chat_template: a template, or several: `[{"name": ..., "template": ...}]`,
      of which "default" is taken.
    names: texts of special tokens by their part; what is no text is left out.
  """
  if isinstance(chat_template, list):
    named = [x for x in chat_template if isinstance(x, dict)]
    chat_template = next(
      (x.get("template") for x in named if x.get("name") == "default"), None
    )
  if tokenizer.chat_template is not None or not isinstance(chat_template, str):
    chat_template = tokenizer.chat_template
  texts = {part: x for part, x in names.items() if isinstance(x, str)}
  ends = ids_within([*tokenizer.end_ids, *ends], tokenizer.vocab_size)
  return dataclasses.replace(
    tokenizer,
    end_ids=ends,
    chat_template=chat_template,
    names=texts | dict(tokenizer.names),
  )
