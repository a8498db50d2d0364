"""Tokens of texts on disk: made once, memory-mapped afterwards."""

import contextlib
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from models import arrays, control_tokens, input_files, text_records
from models import text as text_lib
from models.errors import InputError
from models.tokenizer import Tokenizer
from research.core import files
from research.core import progress as progress_lib
from research.text import documents as documents_lib
from research.text import tokenizing
from research.text.packing import Corpus

_VERSION = 3
_DTYPES = ("<u2", "<i4")
_PIECE = 1 << 20
_GROUP = 1 << 24


def digest_of_texts(
  names: Sequence[str], rule: str, field: str = text_records.FIELD
) -> str:
  """Identifies the documents of texts by the bytes of their files.

  Raises:
    InputError: a text does not exist, or none is given.
  """
  if not names:
    raise InputError("--text: there is none: name at least one")
  what = f"{_VERSION} {rule}"
  if field != text_records.FIELD:
    what += f" {field}"
  digest = hashlib.sha256(what.encode())
  for name in names:
    with text_lib.text_path(name).open("rb") as stream:
      digest.update(hashlib.file_digest(stream, "sha256").digest())
  return digest.hexdigest()


def read_documents(
  names: Sequence[str], rule: str, field: str = text_records.FIELD
) -> list[str]:
  """Documents of all texts; a text never goes on in the next file.

  A record of a .jsonl or .parquet file is a document, whatever the rule.

  Raises:
    InputError: a text cannot be read, or all are empty.
  """
  documents = []
  for name in names:
    parts, are_records = text_lib.load_parts(name, field)
    documents += parts if are_records else documents_lib.split(*parts, rule)
  if not documents:
    raise InputError(f"{', '.join(names)}: there is nothing but blanks in it")
  return documents


def bpe(
  names: Sequence[str],
  rule: str,
  vocab_size: int,
  folder: pathlib.Path,
  field: str = text_records.FIELD,
) -> Tokenizer:
  """The byte-level BPE of texts, learned once and kept in `folder`.

  Raises:
    InputError: a text cannot be read.
  """
  key = f"{digest_of_texts(names, rule, field)[:16]}-bpe{vocab_size}.json"
  path = folder / key
  if not path.exists():
    documents = read_documents(names, rule, field)
    tokenizer = tokenizing.train_bpe(documents, vocab_size)
    with files.whole(path) as draft:
      tokenizer.backend.save(str(draft))
  return tokenizing.load(str(path))


def load_corpus(
  names: Sequence[str],
  tokenizer: Tokenizer,
  folder: pathlib.Path,
  *,
  rule: str = "auto",
  field: str = text_records.FIELD,
  progress: bool = True,
) -> Corpus:
  """The tokens of texts, from `folder` if they were made before.

  A document longer than a million characters is encoded in pieces that end
  with a line; that changes a token at a seam at most. The cache appears by one
  rename: a run that is killed leaves none.

  Args:
    names: of `models.text.load_text`.
    tokenizer: its boundary token is put in front of every document.
    folder: of the cache; made if absent.
    rule: of `documents.split`.
    field: of the records of .jsonl and .parquet files.
    progress: show progress on stderr.

  Raises:
    InputError: a text cannot be read, or the cache is damaged.
  """
  digest = hashlib.sha256(digest_of_texts(names, rule, field).encode())
  digest.update(tokenizer.backend.to_str().encode())
  digest = digest.hexdigest()[:16]
  place = folder / digest
  if not place.exists():
    # Another run may have written the same tokens meanwhile.
    with contextlib.suppress(FileExistsError):
      documents = read_documents(names, rule, field)
      _write(place, documents, tokenizer, progress)
  return _read(place, digest)


def _read(place: pathlib.Path, digest: str) -> Corpus:
  with input_files.errors_at(
    place, "remove it, and the tokens are made again", "is damaged"
  ):
    meta = json.loads((place / "meta.json").read_bytes())
    if meta["dtype"] not in _DTYPES:
      raise ValueError("of another type of numbers")
    path = input_files.regular(place / "tokens.bin")
    tokens = np.memmap(path, meta["dtype"], "r")
    starts = arrays.read_npy(place / "starts.npy", "remove its folder")
    if _checksum(tokens, starts) != meta["checksum"]:
      raise ValueError("other bytes than were written")
  return Corpus(tokens=tokens, starts=starts, digest=digest)


def _checksum(tokens: np.ndarray, starts: np.ndarray) -> int:
  """Of all bytes; some gigabytes a second."""
  found = zlib.crc32(np.ascontiguousarray(starts))
  for first in range(0, len(tokens), _GROUP):
    found = zlib.crc32(tokens[first : first + _GROUP], found)
  return found


def _write(
  place: pathlib.Path,
  documents: Sequence[str],
  tokenizer: Tokenizer,
  progress: bool,
) -> None:
  boundary = control_tokens.start_id(tokenizer)
  dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4"
  starts, count = [], 0
  total = sum(map(len, documents))
  advance = progress_lib.counter("tokenize characters", total, progress)
  with files.whole_folder(place) as draft:
    with (draft / "tokens.bin").open("wb") as stream:
      for group in _groups(documents):
        encoded = tokenizer.encode_all([piece for piece, _ in group])
        for (_, begins), ids in zip(group, encoded, strict=True):
          if begins:
            starts.append(count)
            ids = [boundary, *ids]
          stream.write(np.asarray(ids, dtype).tobytes())
          count += len(ids)
        advance(sum(len(piece) for piece, _ in group))
    starts = np.asarray(starts, np.int64)
    np.save(draft / "starts.npy", starts)
    checksum = _checksum(np.memmap(draft / "tokens.bin", dtype, "r"), starts)
    files.write_json(
      draft / "meta.json", {"dtype": dtype, "checksum": checksum}
    )


def _groups(documents: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
  """Lists of (piece, whether a document begins with it) of some megabytes."""
  group, size = [], 0
  for document in documents:
    start = 0
    while start < len(document):
      end = len(document)
      if end - start > _PIECE:
        end = document.find("\n", start + _PIECE) + 1 or end
      group.append((document[start:end], start == 0))
      size += end - start
      start = end
      if size >= _GROUP:
        yield group
        group, size = [], 0
  if group:
    yield group
