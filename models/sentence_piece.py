"""SentencePiece models (`.model` files) as tokenizers, without the package.

A file is a message of protocol buffers (sentencepiece_model.proto): pieces with
scores, how it was trained, and how texts are normalised. Unigram and BPE models
are rebuilt with the `tokenizers` package, and give the ids of `EncodeAsIds`: no
begin or end token, and control pieces such as "<s>" are no part of any text.
"""

import contextlib
import dataclasses
import pathlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers import models as token_models

from models import input_files
from models.encoding import Tokenizer, put_begin
from models.errors import InputError

SUFFIX = ".model"
SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
# Numbers where there should be bytes, and the like.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, struct.error)
# Below every path of other pieces: chosen by no text.
_NEVER = 1e5
# What a piece is called in the vocabulary, by its text and type.
_Name = Callable[[str, int], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """What a file says.

  Attributes:
    pieces: text, score and type of each id.
    kind: of the model.
    byte_fallback: whether unknown characters become bytes.
    charsmap: rules of normalisation, empty for none.
    dummy_prefix: whether a text gets a space in front.
    fewer_spaces: whether runs of spaces become one, and outer ones are lost.
    begin: id of the token that texts of a language model begin with; none where
      it is that of no piece.
    end: the same of their end.
  """

  pieces: list[tuple[str, float, int]]
  kind: int
  byte_fallback: bool
  charsmap: bytes
  dummy_prefix: bool
  fewer_spaces: bool
  begin: int = 1
  end: int = 2


def read(path: pathlib.Path) -> Tokenizer:
  """Reads a `.model` file.

  Ids differ from those of the package in two cases: where a text has the name
  of a byte, such as "<0x41>", and where two merges of a BPE that lead to the
  same piece overlap (the leftmost is not always the first).

  Raises:
    InputError: the file is missing, damaged, or of an unsupported kind.
  """
  model = _open(pathlib.Path(path))
  with _rebuilding(path):
    backend = build(model)
  return Tokenizer(backend=backend, vocab_size=len(model.pieces), bos_id=None)


def read_marked(path: pathlib.Path) -> Tokenizer:
  """The same for a language model, whose texts may hold begin and end tokens.

  As with Llama's tokenizer of Hugging Face, a text should begin with one.

  Raises:
    InputError: as `read`.
  """
  model = _open(pathlib.Path(path))
  kinds, size = [kind for *_, kind in model.pieces], len(model.pieces)
  with _rebuilding(path):
    backend = build(model, plain_names=True)
    backend.add_tokens(
      [
        tokenizers.AddedToken(text, special=True, normalized=False)
        for text, _, kind in model.pieces
        if kind in (_CONTROL, _UNKNOWN)
      ]
    )
    begin, end = (
      i if 0 <= i < size and kinds[i] == _CONTROL else None
      for i in (model.begin, model.end)
    )
    put_begin(backend, begin)
    names = {
      part: model.pieces[i][0]
      for part, i in (("bos_token", begin), ("eos_token", end))
      if i is not None
    }
  return Tokenizer(
    backend=backend,
    vocab_size=size,
    bos_id=begin,
    end_ids=() if end is None else (end,),
    names=names,
  )


def _open(path: pathlib.Path) -> Model:
  try:
    path = input_files.regular(path, "give a .model file")
    model = _parse(path.read_bytes())
  except InputError:
    raise
  except OSError as error:
    raise InputError(
      f"{path}: is missing or unreadable: give a .model file"
    ) from error
  except _DAMAGE as error:
    raise InputError(
      f"{path}: is no model of SentencePiece ({error}): get the file again"
    ) from error
  if model.kind not in (UNIGRAM, BPE):
    raise InputError(
      f"{path}: is of model type {model.kind}, only unigram (1) and BPE (2) "
      "are supported: use another tokenizer"
    )
  if len({text for text, _, _ in model.pieces}) != len(model.pieces):
    raise InputError(f"{path}: repeats a piece: get the file again")
  return model


@contextlib.contextmanager
def _rebuilding(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # The library raises nothing narrower.
    raise InputError(
      f"{path}: cannot be rebuilt ({error}): get the file again"
    ) from error


def build(model: Model, plain_names: bool = False) -> tokenizers.Tokenizer:
  """The tokenizer of a model, of the package `tokenizers`.

  Args:
    model: unigram or BPE.
    plain_names: give control pieces their own names, as language models need
      that search a text for them; without, no text has them.

  Raises:
    Exception: the model is damaged.
  """
  if plain_names:
    name = lambda text, kind: text
  else:
    name = _name
  backend = tokenizers.Tokenizer(
    _unigram(model, name) if model.kind == UNIGRAM else _bpe(model, name)
  )
  backend.normalizer = _normalizer(model)
  marked = [text for text, _, kind in model.pieces if kind == _USER]
  if marked and model.kind == BPE:
    # The longest first, as SentencePiece looks for them.
    longest = sorted(marked, key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(map(re.escape, longest)))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
  backend.decoder = decoder(model.dummy_prefix)
  return backend


def _unigram(model: Model, name: _Name) -> token_models.Unigram:
  normal = [score for _, score, kind in model.pieces if kind == _NORMAL]
  least, most = min(normal, default=0.0), max(normal, default=0.0)

  def score(text, value, kind):
    if kind == _USER:
      # The score is so large that the piece is always taken (unigram_model.cc).
      return len(text.encode()) * most - 0.1
    return value if kind == _NORMAL else least - _NEVER

  return token_models.Unigram(
    [
      (name(text, kind), score(text, v, kind)) for text, v, kind in model.pieces
    ],
    unk_id=_unknown(model),
    byte_fallback=model.byte_fallback,
  )


def _bpe(model: Model, name: _Name) -> token_models.BPE:
  known = {text: score for text, score, kind in model.pieces if kind == _NORMAL}
  ids = {text: i for i, (text, _, _) in enumerate(model.pieces)}
  merges = [
    (-known[text], ids[text], text[:cut], text[cut:])
    for text in known
    for cut in range(1, len(text))
    if text[:cut] in known and text[cut:] in known
  ]
  unknown = _unknown(model)
  return token_models.BPE(
    vocab={
      name(text, kind): i for i, (text, _, kind) in enumerate(model.pieces)
    },
    merges=[(left, right) for *_, left, right in sorted(merges)],
    unk_token=None if unknown is None else name(*model.pieces[unknown][::2]),
    fuse_unk=True,
    byte_fallback=model.byte_fallback,
    # Only what `pre_tokenizer` set apart is a word by itself.
    ignore_merges=any(kind == _USER for *_, kind in model.pieces),
  )


def _name(text: str, kind: int) -> str:
  """With a space, which no normalised text has, for what texts do not say."""
  return f" {text}" if kind in (_CONTROL, _UNKNOWN) else text


def _unknown(model: Model) -> int | None:
  kinds = [kind for *_, kind in model.pieces]
  return kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None


def _normalizer(model: Model) -> normalizers.Normalizer:
  rules = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
  spaces = space_rules(model.dummy_prefix, model.fewer_spaces)
  return normalizers.Sequence([*rules, *spaces])


def space_rules(
  dummy_prefix: bool = True, fewer_spaces: bool = True
) -> list[normalizers.Normalizer]:
  """What SentencePiece does to spaces: they become U+2581.

  Args:
    dummy_prefix: a text gets one in front.
    fewer_spaces: runs of spaces become one, and outer ones are lost.
  """
  steps: list[normalizers.Normalizer] = []
  if fewer_spaces:
    steps.append(normalizers.Replace(tokenizers.Regex(r"\A +"), ""))
    steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
  if dummy_prefix:
    steps.append(normalizers.Prepend(" "))
  steps.append(normalizers.Replace(" ", SPACE))
  if fewer_spaces:
    # The sign is removed after the replacement, so that a text loses its own
    # signs too.
    end = tokenizers.Regex(SPACE + r"+\z")
    steps.append(normalizers.Replace(end, ""))
  return steps


def decoder(dummy_prefix: bool = True) -> decoders.Decoder:
  """Tokens to text, the opposite of `space_rules`."""
  steps = [
    decoders.Replace(SPACE, " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if dummy_prefix:
    steps.append(decoders.Strip(" ", 1, 0))
  return decoders.Sequence(steps)


def _parse(data: bytes) -> Model:
  """The message ModelProto; raises ValueError and its like where it is none."""
  fields = list(_fields(data))
  pieces = [_piece(value) for number, value in fields if number == 1]
  trainer, normalizer = (
    dict(_fields(b"".join(v for number, v in fields if number == wanted)))
    for wanted in (2, 3)
  )
  if not any(kind == _UNKNOWN for *_, kind in pieces):
    raise ValueError("no piece stands for what is unknown")
  if trainer.get(24) or not normalizer.get(5, 1):
    raise ValueError("spaces behind words or kept are not supported")
  if any(kind not in (1, 2, 3, 4, 6) for *_, kind in pieces):
    raise ValueError("unused pieces are not supported")
  return Model(
    pieces=pieces,
    kind=trainer.get(3, UNIGRAM),
    byte_fallback=bool(trainer.get(35, 0)),
    charsmap=normalizer.get(2, b""),
    dummy_prefix=bool(normalizer.get(3, 1)),
    fewer_spaces=bool(normalizer.get(4, 1)),
    begin=trainer.get(41, 1),
    end=trainer.get(42, 2),
  )


def _piece(data: bytes) -> tuple[str, float, int]:
  found = dict(_fields(data))
  (score,) = struct.unpack("<f", found.get(2, bytes(4)))
  return found[1].decode(), score, found.get(3, _NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
  """Numbers and values of a message: integers, or bytes."""
  position = 0
  while position < len(data):
    tag, position = _varint(data, position)
    number, wire = tag >> 3, tag & 7
    if wire == 0:
      value, position = _varint(data, position)
      yield number, value
      continue
    if wire == 2:
      length, position = _varint(data, position)
    elif wire in (1, 5):
      length = 8 if wire == 1 else 4
    else:
      raise ValueError(f"wire type {wire} at byte {position}")
    if position + length > len(data):
      raise ValueError("cut short")
    yield number, data[position : position + length]
    position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[position]
    position += 1
    value |= (byte & 127) << shift
    shift += 7
    if byte < 128:
      return value, position
    if shift > 63:
      raise ValueError("a number is too long")
