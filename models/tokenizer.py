"""Text to tokens and back, for every kind of checkpoint that can be read."""

import dataclasses
import itertools
import json
import pathlib
import struct

import tokenizers
from tokenizers import decoders, normalizers
from tokenizers import models as bpe_models

from models import gguf_tokenizer, input_files, sentence_piece
from models.convert import Checkpoint, shards
from models.encoding import Tokenizer as Tokenizer
from models.encoding import put_begin, quiet_panics, table_size, with_said
from models.errors import InputError

# Of a tokenizer in a folder; the first one that is there counts.
FILES = ("tokenizer.json", "tokenizer.model")
# Special tokens that files name.
_PARTS = tuple(
  f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
  """Builds the tokenizer that belongs to a checkpoint.

  A `tokenizer.json`, or else a `tokenizer.model`, in or beside the checkpoint
  wins; else GGUF files hold their own, and llama2.c files have one beside them.

  Raises:
    InputError: there is none, or it is damaged or of an unsupported kind.
  """
  path, rows = checkpoint.path, checkpoint.config.vocab_size
  directory = path if path.is_dir() else path.parent
  if path.is_dir() or any((directory / name).exists() for name in FILES):
    tokenizer = in_folder(directory)
  elif path.suffix == ".gguf":
    return within(gguf_tokenizer.read(path), rows, path)
  elif (directory / "config.json").exists():
    raise InputError(_missing(directory))
  else:
    tokenizer = from_llama2c(directory / f"tok{rows}.bin", rows)
  return within(with_files_of(checkpoint, tokenizer), rows, path)


def with_files_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Tokenizer:
  """Adds what a checkpoint's files say: ends of texts, names, chat template.

  What the tokenizer has of its own stays.

  Raises:
    InputError: one of the files is damaged.
  """
  path = checkpoint.path
  if path.suffix == ".gguf":
    return gguf_tokenizer.said(tokenizer, path)
  return _with_files(tokenizer, path if path.is_dir() else path.parent)


def in_folder(directory: pathlib.Path) -> Tokenizer:
  """Reads the tokenizer of a folder as Hugging Face has it.

  Raises:
    InputError: there is none, or it is damaged.
  """
  path = next((directory / n for n in FILES if (directory / n).exists()), None)
  if path is None:
    raise InputError(_missing(directory))
  if path.suffix == sentence_piece.SUFFIX:
    tokenizer = _with_added(sentence_piece.read_marked(path), directory)
  else:
    tokenizer = from_json(path)
  return _with_files(tokenizer, directory)


def _with_added(tokenizer: Tokenizer, directory: pathlib.Path) -> Tokenizer:
  """Adds the tokens that other files put behind those of a `.model` file.

  Raises:
    InputError: a file is damaged, or the ids have a gap.
  """
  path = directory / "tokenizer_config.json"
  described = shards.read_json(path) if path.exists() else {}
  added = {}
  older = directory / "added_tokens.json"
  if older.exists():
    added = {i: {"content": x} for x, i in shards.read_json(older).items()}
  with input_files.errors_at(path, wrong="its added tokens are damaged"):
    for i, token in described.get("added_tokens_decoder", {}).items():
      added[int(i)] = token
    backend = tokenizer.backend
    for i in sorted(added):
      text, special = added[i]["content"], added[i].get("special", True)
      token = tokenizers.AddedToken(text, special=special, normalized=False)
      backend.add_tokens([token])
      if backend.token_to_id(text) != i:
        raise ValueError(f"token {i} does not follow those before")
  begins = described.get("add_bos_token", True)
  return dataclasses.replace(
    tokenizer,
    vocab_size=table_size(backend),
    bos_id=tokenizer.bos_id if begins else None,
  )


def _missing(directory: pathlib.Path) -> str:
  return (
    f"{directory / FILES[0]}: is missing: put the model's tokenizer.json there,"
    " or give --tokenizer"
  )


def from_json(path: pathlib.Path) -> Tokenizer:
  """Reads a `tokenizer.json` of Hugging Face.

  Raises:
    InputError: the file is missing or damaged.
  """
  if not path.exists():
    raise InputError(_missing(path.parent))
  backend = read_backend(path)
  wrong = "is no readable tokenizer"
  with input_files.errors_at(path, wrong=wrong), quiet_panics():
    begin = _begin_id(backend)
  return Tokenizer(
    backend=backend, vocab_size=table_size(backend), bos_id=begin, path=path
  )


def read_backend(path: pathlib.Path) -> tokenizers.Tokenizer:
  """The same, as the library has it; the file may be packed by gzip.

  Raises:
    InputError: the file is missing or damaged.
  """
  text, wrong = input_files.read_text(path), "is no readable tokenizer"
  with input_files.errors_at(path, wrong=wrong), quiet_panics():
    return tokenizers.Tokenizer.from_str(text)


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
  described, special, generation, config, chat = (
    shards.read_json(path) if (path := directory / name).exists() else {}
    for name in (
      "tokenizer_config.json",
      "special_tokens_map.json",
      "generation_config.json",
      "config.json",
      "chat_template.json",
    )
  )
  names = {}
  for part in _PARTS:
    for file in (described, special):
      token = file.get(part)
      token = token.get("content") if isinstance(token, dict) else token
      if isinstance(token, str):
        names.setdefault(part, token)
  ends = [tokenizer.backend.token_to_id(names.get("eos_token", ""))]
  for found in (generation.get("eos_token_id"), config.get("eos_token_id")):
    ends += found if isinstance(found, list) else [found]
  template = (chat | described).get("chat_template")
  path = directory / "chat_template.jinja"
  if path.exists():
    template = input_files.read_text(path)
  return with_said(tokenizer, ends=ends, chat_template=template, names=names)


def within(tokenizer: Tokenizer, rows: int, model: object) -> Tokenizer:
  """The tokenizer without special tokens that a token table does not hold.

  Gemma 3 has one for pictures behind the last row of its table.

  Args:
    tokenizer: of Hugging Face.
    rows: of the table.
    model: whose table it is, for people.

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
      tokenizer, backend=backend, vocab_size=table_size(backend)
    )
  if tokenizer.vocab_size > rows:
    raise InputError(
      f"{model}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
      f"{rows}: get the tokenizer that belongs to it"
    )
  return tokenizer


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
  put_begin(backend, 1)
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
