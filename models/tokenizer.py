"""Text to tokens and back, for every kind of checkpoint that can be read."""

import dataclasses
import itertools
import json
import pathlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers import models as bpe_models

from models import input_files
from models.convert import Checkpoint, gguf_io, shards
from models.errors import InputError, is_panic, reason

_CONTROL = int(gguf.TokenType.CONTROL)
_USER_DEFINED = int(gguf.TokenType.USER_DEFINED)


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
  """

  backend: tokenizers.Tokenizer
  vocab_size: int
  bos_id: int | None
  end_ids: tuple[int, ...] = ()
  chat_template: str | None = None
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def encode(self, text: str) -> np.ndarray:
    """The int32 ids (T,) of `text`, without a begin token.

    Raises:
      InputError: the tokenizer has no token for a part of it.
    """
    return np.asarray(self.encode_all([text])[0], np.int32)

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without begin tokens; uses all cores.

    Raises:
      InputError: the tokenizer has no token for a part of one.
    """
    try:
      found = self.backend.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    except BaseException as error:  # The library raises nothing narrower.
      if not isinstance(error, Exception) and not is_panic(error):
        raise
      text = repr(texts[0][:40]) if len(texts) == 1 else "one of the texts"
      raise InputError(
        f"the tokenizer cannot read {text} ({reason(error)}): give a text of "
        "its own words"
      ) from error
    return [encoding.ids for encoding in found]

  def decode(self, ids: np.ndarray) -> str:
    """The text of `ids` (T,), control tokens left out."""
    return self.backend.decode(np.asarray(ids).tolist())


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
  """Builds the tokenizer that belongs to a checkpoint.

  A `tokenizer.json` in or beside the checkpoint wins; else GGUF files hold
  their own, and llama2.c files have one beside them.

  Raises:
    InputError: there is none, or it is damaged or of an unsupported kind.
  """
  path, rows = checkpoint.path, checkpoint.config.vocab_size
  directory = path if path.is_dir() else path.parent
  if path.is_dir() or (directory / "tokenizer.json").exists():
    tokenizer = _with_files(from_json(directory / "tokenizer.json"), directory)
  elif path.suffix == ".gguf":
    tokenizer = from_gguf(path)
  else:
    tokenizer = from_llama2c(directory / f"tok{rows}.bin", rows)
  return within(tokenizer, rows)


def from_json(path: pathlib.Path) -> Tokenizer:
  """Reads a `tokenizer.json` of Hugging Face.

  Raises:
    InputError: the file is missing or damaged.
  """
  if not path.exists():
    raise InputError(
      f"{path}: is missing: put the model's tokenizer.json there, or give "
      "--tokenizer"
    )
  backend = read_backend(path)
  with input_files.errors_at(path, wrong="is no readable tokenizer"):
    return Tokenizer(
      backend=backend, vocab_size=_size(backend), bos_id=_begin_id(backend)
    )


def read_backend(path: pathlib.Path) -> tokenizers.Tokenizer:
  """The same, as the library has it; the file may be packed by gzip.

  Raises:
    InputError: the file is missing or damaged.
  """
  text = input_files.read_text(path)
  with input_files.errors_at(path, wrong="is no readable tokenizer"):
    return tokenizers.Tokenizer.from_str(text)


def _size(backend: tokenizers.Tokenizer) -> int:
  """The largest id and one: some tokenizers leave ids out."""
  return 1 + max(backend.get_vocab().values(), default=-1)


def _begin_id(backend: tokenizers.Tokenizer) -> int | None:
  """The id that is put in front of a text, if there is one."""
  # Some vocabularies, such as those of proteins, have no "a".
  texts = itertools.chain(["a"], itertools.islice(backend.get_vocab(), 64))
  for text in texts:
    try:
      plain = backend.encode(text, add_special_tokens=False).ids
      whole = backend.encode(text, add_special_tokens=True).ids
    except Exception:  # Unknown, and the library raises nothing narrower.
      continue
    if plain and whole:
      return whole[0] if whole[0] != plain[0] else None
  return None


def _with_files(tokenizer: Tokenizer, directory: pathlib.Path) -> Tokenizer:
  """Adds what other files of a Hugging Face checkpoint say about a tokenizer.

  Raises:
    InputError: one of them is damaged.
  """
  described, generation, config, chat = (
    shards.read_json(path) if (path := directory / name).exists() else {}
    for name in (
      "tokenizer_config.json",
      "generation_config.json",
      "config.json",
      "chat_template.json",
    )
  )
  names = {}
  for part in ("bos_token", "eos_token", "unk_token", "pad_token"):
    token = described.get(part)
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
      names[part] = token
  ends = [tokenizer.backend.token_to_id(names.get("eos_token", ""))]
  for found in (generation.get("eos_token_id"), config.get("eos_token_id")):
    ends += found if isinstance(found, list) else [found]
  templates = chat | described
  path = directory / "chat_template.jinja"
  if path.exists():
    templates["chat_template"] = input_files.read_text(path)
  return dataclasses.replace(
    tokenizer,
    end_ids=_ids_within(ends, tokenizer.vocab_size),
    chat_template=_template(templates.get("chat_template")),
    names=names,
  )


def _ids_within(ids: Iterable[Any], size: int) -> tuple[int, ...]:
  valid = (i for i in ids if type(i) is int and 0 <= i < size)
  return tuple(dict.fromkeys(valid))


def _template(described: Any) -> str | None:
  """The template of a chat, of several the one named "default"."""
  if isinstance(described, list):
    named = [x for x in described if isinstance(x, dict)]
    described = next(
      (x.get("template") for x in named if x.get("name") == "default"), None
    )
  return described if isinstance(described, str) else None


def within(tokenizer: Tokenizer, rows: int) -> Tokenizer:
  """The tokenizer without special tokens that a token table does not hold.

  Gemma 3 has one for pictures behind the last row of its table.

  Args:
    tokenizer: of Hugging Face.
    rows: of the table.

  Raises:
    InputError: tokens that texts are made of are among them.
  """
  if tokenizer.vocab_size <= rows:
    return tokenizer
  described = json.loads(tokenizer.backend.to_str())
  kept = [token for token in described["added_tokens"] if token["id"] < rows]
  if len(kept) < len(described["added_tokens"]):
    described["added_tokens"] = kept
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    tokenizer = dataclasses.replace(
      tokenizer, backend=backend, vocab_size=_size(backend)
    )
  if tokenizer.vocab_size > rows:
    raise InputError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}: get "
      "the tokenizer that belongs to it"
    )
  return tokenizer


def from_gguf(path: pathlib.Path) -> Tokenizer:
  """Builds the byte-level BPE inside a GGUF file.

  Raises:
    InputError: the file holds none, or one of an unsupported kind.
  """
  reader = gguf_io.open_gguf(path)
  with input_files.errors_at(path, wrong="its tokenizer is damaged"):
    return _in_gguf(reader, path)


def _in_gguf(reader: gguf_io.GgufFile, path: pathlib.Path) -> Tokenizer:
  kind = gguf_io.metadata(reader, "tokenizer.ggml.model")
  pre = gguf_io.metadata(reader, "tokenizer.ggml.pre")
  tokens = gguf_io.metadata(reader, "tokenizer.ggml.tokens")
  merges = gguf_io.metadata(reader, "tokenizer.ggml.merges")
  if (kind, pre) != ("gpt2", "smollm") or not tokens or not merges:
    raise InputError(
      f"{path}: its tokenizer ({kind}, {pre}) is not supported, only "
      "(gpt2, smollm): put the model's tokenizer.json beside the file"
    )
  backend = tokenizers.Tokenizer(
    bpe_models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ", 1)) for merge in merges],
    )
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  types = gguf_io.metadata(reader, "tokenizer.ggml.token_type") or []
  special = [
    token
    for token, kind in zip(tokens, types, strict=False)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  backend.add_special_tokens(
    [tokenizers.AddedToken(token, special=True) for token in special]
  )
  adds_bos = gguf_io.metadata(reader, "tokenizer.ggml.add_bos_token", False)
  bos_id, eos_id = (
    gguf_io.metadata(reader, f"tokenizer.ggml.{part}_token_id")
    for part in ("bos", "eos")
  )
  parts = {"bos_token": bos_id, "eos_token": eos_id}
  return Tokenizer(
    backend=backend,
    vocab_size=len(tokens),
    bos_id=next(iter(_ids_within([bos_id], len(tokens))), None)
    if adds_bos
    else None,
    end_ids=_ids_within([eos_id], len(tokens)),
    chat_template=_template(
      gguf_io.metadata(reader, "tokenizer.chat_template")
    ),
    names={
      part: tokens[i]
      for part, i in parts.items()
      if _ids_within([i], len(tokens))
    },
  )


def from_llama2c(path: pathlib.Path, vocab_size: int) -> Tokenizer:
  """Reads a `tok*.bin` of llama2.c: (score, length, bytes) for every id.

  Ids 0, 1, 2 are unknown, begin, end; 3 to 258 the bytes. As in llama2.c a
  text gets a space in front, and characters outside of the vocabulary become
  bytes. The pair whose union has the best score merges first, leftmost first.

  Raises:
    InputError: the file is missing, cut short or has repeated tokens.
  """
  if not path.exists():
    raise InputError(f"{path}: is missing: put the model's tokenizer there")
  tokens, scores = _read_llama2c(path, vocab_size)
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != vocab_size:
    raise InputError(f"{path}: repeats a token: get the file again")
  # Scores fall with the id in files of SentencePiece, but nothing says that
  # they must; the merges of one token stay together either way.
  by_score = sorted(range(259, vocab_size), key=lambda i: (-scores[i], i))
  merges = [
    (tokens[i][:cut], tokens[i][cut:])
    for i in by_score
    for cut in range(1, len(tokens[i]))
    if tokens[i][:cut] in vocab and tokens[i][cut:] in vocab
  ]
  backend = tokenizers.Tokenizer(
    bpe_models.BPE(vocab=vocab, merges=merges, byte_fallback=True)
  )
  backend.normalizer = normalizers.Prepend(" ")
  backend.decoder = decoders.Sequence(
    [
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(content=" ", left=1, right=0),
    ]
  )
  return Tokenizer(backend=backend, vocab_size=vocab_size, bos_id=1)


def _read_llama2c(
  path: pathlib.Path, vocab_size: int
) -> tuple[list[str], list[float]]:
  data = input_files.read_bytes(path)
  entry = struct.Struct("<fi")
  tokens, scores = [], []
  position = 4  # Behind the length of the longest token.
  try:
    for _ in range(vocab_size):
      score, length = entry.unpack_from(data, position)
      position += entry.size
      token = data[position : position + length]
      if len(token) != length:
        raise struct.error("cut in a token")
      position += length
      tokens.append(token.decode("utf-8"))
      scores.append(score)
  except (struct.error, UnicodeDecodeError) as error:
    raise InputError(
      f"{path}: is cut short or damaged at token {len(tokens)}: get the file "
      "again"
    ) from error
  return tokens, scores
