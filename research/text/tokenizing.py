"""Tokenizers for training: by name, by file, or made from the text itself."""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  trainers,
)

from models import gguf_tokenizer, locate, sentence_piece
from models import tokenizer as tokenizer_lib
from models.convert import Checkpoint, hub
from models.errors import InputError
from models.tokenizer import Tokenizer
from research.core.progress import counter

HUB_IDS, BYTES, BPE = locate.TOKENIZER_IDS, locate.BYTES, locate.BPE
SENTENCEPIECE = "sentencepiece"
_BOUNDARY = "<|endoftext|>"
# A BPE is learned from at most so many characters, taken evenly from the text.
_BPE_CHARACTERS = 1 << 26
_PIECE = 1 << 16
# Longer words are learned from in parts: every merge reads the whole word of
# each place that it is found at, which made texts without spaces quadratic.
_LONGEST_WORD = 256
# Fewer characters are learned from in about a second, without a word.
_QUICK = 1 << 20


def load(name: str, *, marks: bool = False) -> Tokenizer:
  """Reads a tokenizer.

  Files beside it that say which tokens end a text, or how chats are written,
  are read as well.

  Args:
    name: "bytes", a key of `HUB_IDS`, another hub id "org/name", or the path
      of a `tokenizer.json` (also .json.gz), of a folder that holds one or a
      `tokenizer.model`, of a `.model` file of SentencePiece, or of a `.gguf`
      file that holds one.
    marks: whether the begin and end tokens of a `.model` file may stand in
      texts, as a language model needs it.

  Raises:
    InputError: there is none, or it is damaged.
  """
  if name == BYTES:
    return of_bytes()
  path, hub_id = locate.find_tokenizer(name)
  if path is None:
    return tokenizer_lib.in_folder(hub.download_tokenizer(hub_id))
  if path.is_dir():
    return tokenizer_lib.in_folder(path)
  return _of_file(path, marks)


def _of_file(path: pathlib.Path, marks: bool) -> Tokenizer:
  if path.suffix == ".gz":
    return _from_gzip(path)
  if path.suffix == ".gguf":
    return gguf_tokenizer.read(path)
  if path.suffix == sentence_piece.SUFFIX:
    read = sentence_piece.read_marked if marks else sentence_piece.read
    return read(path)
  if path.name == tokenizer_lib.FILES[0]:
    return tokenizer_lib.in_folder(path.parent)
  return tokenizer_lib.from_json(path)


def of_checkpoint(checkpoint: Checkpoint, name: str | None) -> Tokenizer:
  """The tokenizer of a model, or the one that `load` finds by name.

  What the model's own files say of ends and chats counts for both.

  Raises:
    InputError: there is none, or it has more tokens than the model.
  """
  if name is None:
    return tokenizer_lib.load_tokenizer(checkpoint)
  tokenizer = load(name, marks=True)
  if name != BYTES:
    tokenizer = tokenizer_lib.with_files_of(checkpoint, tokenizer)
  rows = checkpoint.config.vocab_size
  return tokenizer_lib.within(tokenizer, rows, checkpoint.path)


def of_bytes() -> Tokenizer:
  """Every byte of UTF-8 is a token: ids 0 to 255, and 256 between documents."""
  vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=[], byte_fallback=True)
  )
  backend.decoder = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Fuse()]
  )
  # The text is split into characters, because this tokenizer has no merges and
  # longer words would only cost time.
  backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  backend.add_special_tokens([_BOUNDARY])
  return Tokenizer(backend=backend, vocab_size=257, bos_id=None)


def train_bpe(
  documents: Sequence[str], vocab_size: int, *, progress: bool = True
) -> Tokenizer:
  """Learns a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2).

  Id 0 stands between documents. The same documents and size give the same
  tokenizer. Of more than 64 million characters an even share of each document
  is read.

  Args:
    documents: texts to learn from.
    vocab_size: at least 257; the result has fewer where the text gives fewer.
    progress: show progress on stderr.
  """
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  _train(
    backend,
    documents,
    vocab_size,
    progress,
    special_tokens=[_BOUNDARY],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  return Tokenizer(
    backend=backend, vocab_size=backend.get_vocab_size(), bos_id=None
  )


def train_sentencepiece(
  documents: Sequence[str], vocab_size: int, *, progress: bool = True
) -> Tokenizer:
  """Learns a BPE as the package SentencePiece does, with bytes and digits.

  Of texts in NFKC, whitespace as U+2581 in front of words (runs of it become
  one); every digit is a token; characters that the texts do not have become
  bytes. Ids 0 and 1 are "<pad>" and "<unk>", and no text has them. Much as
  `SentencePieceVocab.from_corpus` of regress-lm, whose ids are others. Of long
  texts a share is read, as by `train_bpe`.

  Args:
    documents: texts to learn from.
    vocab_size: at least 258 and the characters of the texts; the result has
      fewer where the texts give fewer.
    progress: show progress on stderr.
  """
  unknown = "<unk>"
  backend = tokenizers.Tokenizer(
    models.BPE(unk_token=unknown, fuse_unk=True, byte_fallback=True)
  )
  backend.normalizer = normalizers.Sequence(
    [
      normalizers.Nmt(),
      normalizers.NFKC(),
      *sentence_piece.space_rules(),
    ]
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(sentence_piece.SPACE, "merged_with_next"),
      pre_tokenizers.Digits(individual_digits=True),
    ]
  )
  backend.decoder = sentence_piece.decoder()
  names = ["<pad>", unknown, *(f"<0x{b:02X}>" for b in range(256))]
  _train(backend, documents, vocab_size, progress, special_tokens=names)
  # These are tokens of the model, but a text is not searched for them.
  described = json.loads(backend.to_str()) | {"added_tokens": []}
  backend = tokenizers.Tokenizer.from_str(json.dumps(described))
  return Tokenizer(
    backend=backend, vocab_size=backend.get_vocab_size(), bos_id=None
  )


LEARNED = {BPE: (train_bpe, 257), SENTENCEPIECE: (train_sentencepiece, 259)}


def learn(name: str, documents: Sequence[str], vocab_size: int) -> Tokenizer:
  """Learns a tokenizer of `LEARNED` by name.

  Raises:
    InputError: there is nothing to learn from, or the size does not do.
  """
  train, least = LEARNED[name]
  if not documents or not all(isinstance(text, str) for text in documents):
    raise InputError(
      f'tokenizer="{name}" is learned from texts: give them, or take "{BYTES}"'
    )
  if not isinstance(vocab_size, int) or vocab_size < least:
    raise InputError(f"vocab_size={vocab_size!r} is not {least} or more")
  return train(documents, vocab_size)


def _train(
  backend: tokenizers.Tokenizer,
  documents: Sequence[str],
  vocab_size: int,
  progress: bool,
  **options,
) -> None:
  """Learns the merges of `backend`, in time that grows with the texts."""
  words = backend.pre_tokenizer
  parts = tokenizers.Regex(rf"[\s\S]{{{_LONGEST_WORD}}}")
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [words, pre_tokenizers.Split(parts, "isolated")]
  )
  shown = progress and sum(map(len, documents)) > _QUICK
  # On a terminal the library has bars of its own, also while it merges.
  on_terminal = sys.stderr.isatty()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, show_progress=shown and on_terminal, **options
  )
  texts = _sample(documents, shown and not on_terminal)
  backend.train_from_iterator(texts, trainer)
  backend.pre_tokenizer = words


def _sample(documents: Sequence[str], progress: bool) -> Iterator[str]:
  total = sum(map(len, documents))
  stride = _PIECE * -(-total // _BPE_CHARACTERS)
  advance = counter("tokenizer reads characters", total, progress)
  for document in documents:
    for start in range(0, len(document), stride):
      yield document[start : start + _PIECE]
      advance(min(stride, len(document) - start))
  if progress:
    print("tokenizer: all texts are read, it merges", file=sys.stderr)


def _from_gzip(path: pathlib.Path) -> Tokenizer:
  backend = tokenizer_lib.read_backend(path)
  return Tokenizer(
    backend=backend, vocab_size=backend.get_vocab_size(), bos_id=None
  )
