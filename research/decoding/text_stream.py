"""Text out of tokens as they come: whole characters, up to a stop string."""

from collections.abc import Sequence

import numpy as np

from models.tokenizer import Tokenizer

# What a decoder puts where bytes are no whole character (yet).
_BROKEN = "\ufffd"
# Tokens of the prompt that are decoded along, because what a token says may
# depend on whether it is the first.
_CONTEXT = 8
# Bytes of the longest character; each may be a token.
_LONGEST = 4


class TextStream:
  """Turns the tokens behind a prompt into text, piece by piece.

  The pieces joined, with that of `finish`, are what the tokenizer decodes the
  tokens to behind the prompt, cut off before the first stop string. No piece
  ends within a character, nor holds what may turn out to be a stop string.

  Attributes:
    stopped: a stop string has come; further tokens add nothing.
    text: all pieces so far.
  """

  def __init__(
    self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str] = ()
  ):
    """Starts behind the tokens `prompt` (T,)."""
    self.stopped = False
    self.text = ""
    self._tokenizer = tokenizer
    self._stop = [text for text in stop if text]
    self._tokens = self._whole_end(np.asarray(prompt).tolist())
    self._read = len(self._tokens)
    self._held = ""

  def push(self, token: int) -> str:
    """Adds a token; returns the text that it completes, often one word."""
    if self.stopped:
      return ""
    self._tokens.append(int(token))
    return self._emit(self._take(patience=_LONGEST), last=False)

  def finish(self) -> str:
    """Returns what was held back."""
    return "" if self.stopped else self._emit(self._take(patience=0), last=True)

  def _whole_end(self, prompt: list[int]) -> list[int]:
    """The last tokens of a prompt, of which the first begins a character.

    A character that is cut in front would make the answer broken, too: some
    decoders call all bytes around a broken one broken.
    """
    longer = range(_CONTEXT, _CONTEXT + _LONGEST)
    for size in [*longer, *range(_CONTEXT - 1, 0, -1)]:
      end = prompt[-size:]
      if _BROKEN not in self._tokenizer.decode(np.asarray(end, np.int32)):
        return end
    return []

  def _take(self, patience: int) -> str:
    """Text of the unread tokens, but for the last few that are not whole yet.

    What is left over after `patience` tokens is read bit by bit, so that a
    broken byte spoils nothing around it.
    """
    text = ""
    while unread := len(self._tokens) - self._read:
      piece = self._decode(unread)
      if _BROKEN in piece:
        if unread <= patience:
          return text
        sizes = range(unread - 1, 0, -1)
        pieces = {size: self._decode(size) for size in sizes}
        whole = [size for size in sizes if _BROKEN not in pieces[size]]
        if not whole:
          # A token that is no character is decoded on its own, so that it
          # spoils none of its neighbours.
          self._tokens, self._read = self._tokens[self._read :], 0
          whole, pieces = [1], {1: self._decode(1)}
        unread, piece = whole[0], pieces[whole[0]]
      self._tokens, self._read = self._tokens[self._read :], unread
      if _BROKEN in piece:
        self._tokens, self._read = self._tokens[unread:], 0
      text += piece
    return text

  def _decode(self, count: int) -> str:
    """Text of the first `count` unread tokens."""
    before = self._tokenizer.decode(np.asarray(self._tokens[: self._read]))
    known = self._tokens[: self._read + count]
    return self._tokenizer.decode(np.asarray(known))[len(before) :]

  def _emit(self, piece: str, last: bool) -> str:
    text = self._held + piece
    found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
    if found:
      self.stopped = True
      text, self._held = text[: min(found)], ""
    else:
      keep = 0 if last else max(map(_overlap(text), self._stop), default=0)
      text, self._held = text[: len(text) - keep], text[len(text) - keep :]
    self.text += text
    return text


def _overlap(text: str):
  """How many characters at the end of `text` a stop string may begin with."""

  def longest(stop: str) -> int:
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)

  return longest
