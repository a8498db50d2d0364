"""Data of the tasks in the formats of Long Range Arena.

Shapes by axis letter: N sequences, L tokens.
"""

import ast
import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from models import arrays, input_files
from models.errors import InputError
from research.lra import listops
from research.lra.tasks import Task

# Bytes 0 to 254 become 1 to 255; UTF-8 has no byte 255, and Latin-1 hardly.
_LAST_BYTE = 254
_TEXT_VALID, _IMAGE_VALID = 2_500, 5_000
_VALUE = re.compile(r"\s*[0-9]{1,3}\s*")
_GRAY = (0.2989, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class Split:
  """Sequences with their classes.

  Attributes:
    tokens: (N, L) uint8, or (N, 2, L) pairs; padding is 0.
    lengths: (N,) or (N, 2) int32.
    labels: (N,) int32.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  labels: np.ndarray

  def rows(self, rows: np.ndarray | slice) -> "Split":
    """Some of the sequences."""
    return Split(self.tokens[rows], self.lengths[rows], self.labels[rows])

  def first(self, count: int) -> "Split":
    """The first ones in a shuffled order that is always the same."""
    if count >= len(self.labels):
      return self
    order = np.random.default_rng(0).permutation(len(self.labels))
    return self.rows(order[:count])


def byte_tokens(
  texts: Sequence[bytes], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens (N, L) and lengths (N,) of texts, cut to `length` bytes."""
  tokens = np.zeros((len(texts), length), np.uint8)
  lengths = np.zeros(len(texts), np.int32)
  for row, text in enumerate(texts):
    own = np.frombuffer(text[:length], np.uint8)
    tokens[row, : len(own)] = np.minimum(own, _LAST_BYTE) + 1
    lengths[row] = max(len(own), 1)
  return tokens, lengths


def read_listops(
  folder: pathlib.Path, task: Task, length: int
) -> dict[str, Split]:
  """basic_{train,val,test}.tsv with columns Source and Target."""
  parts = {}
  for part, name in (("train", "train"), ("valid", "val"), ("test", "test")):
    path = _one(folder, [f"*{name}.tsv", f"*{name}.tsv.xz"], task)
    rows = []
    for number, row in _tsv(path):
      if row[:1] == ["Source"]:
        continue
      where = f"{path} line {number}"
      if len(row) != 2 or not _VALUE.fullmatch(row[1]):
        raise InputError(f"{where}: is no expression, tab, and its value")
      rows.append((listops.encode(row[0], where)[:length], int(row[1])))
    tokens = np.zeros((len(rows), length), np.uint8)
    lengths = np.array([len(own) for own, _ in rows], np.int32)
    for place, (own, _) in enumerate(rows):
      tokens[place, : len(own)] = own
    parts[part] = Split(tokens, lengths, _labels(value for _, value in rows))
  return parts


def read_text(
  folder: pathlib.Path, task: Task, length: int
) -> dict[str, Split]:
  """Reviews of IMDB as aclImdb/{train,test}/{pos,neg}/*.txt, or JSON lines.

  A tenth of the training part, drawn once and for all, is for validation; the
  benchmark validates on the test part.
  """
  found = list(_reviews(folder, task))
  parts = {}
  for part in ("train", "test"):
    own = [(text, label) for where, label, text in found if where == part]
    tokens, lengths = byte_tokens([text for text, _ in own], length)
    parts[part] = Split(tokens, lengths, _labels(label for _, label in own))
  return _with_valid(parts, _TEXT_VALID)


def _reviews(folder, task) -> Iterable[tuple[str, int, bytes]]:
  root = next(
    (p for p in (folder / "aclImdb", folder) if (p / "train/pos").is_dir()),
    None,
  )
  if root is None:
    path = folder
    if not folder.is_file():
      path = _one(folder, ["*imdb*.jsonl*", "*.jsonl*"], task)
    for number, line in enumerate(input_files.read_text(path).split("\n"), 1):
      if line.strip():
        where = f"{path} line {number}"
        row = input_files.parse_json(line, where)
        with input_files.errors_at(where, wrong="has no split, label, text"):
          yield row["split"], int(row["label"]), row["text"].encode()
    return
  for part in ("train", "test"):
    for label, name in enumerate(("neg", "pos")):
      for path in sorted((root / part / name).glob("*.txt")):
        yield part, label, input_files.read_bytes(path)


def read_retrieval(
  folder: pathlib.Path, task: Task, length: int
) -> dict[str, Split]:
  """new_aan_pairs.{train,eval,test}.tsv: label, two ids, two texts."""
  parts = {}
  for part, name in (("train", "train"), ("valid", "eval"), ("test", "test")):
    path = _one(folder, [f"*{name}.tsv", f"*{name}.tsv.xz"], task)
    labels, texts = [], []
    for number, row in _tsv(path):
      if len(row) != 5:
        raise InputError(
          f"{path} line {number}: has {len(row)} columns, not the 5 of label, "
          "two ids and two texts: give the data of --task=retrieval"
        )
      with input_files.errors_at(f"{path} line {number}", wrong="has no label"):
        labels.append(int(float(row[0])))
      texts += [_unquoted(text) for text in row[3:]]
    tokens, lengths = byte_tokens(texts, length)
    parts[part] = Split(
      tokens.reshape(-1, 2, length), lengths.reshape(-1, 2), _labels(labels)
    )
  return parts


def _unquoted(text: str) -> bytes:
  """The bytes of a text, which the benchmark's files hold as b'...'."""
  if text[:2] in ("b'", 'b"'):
    try:
      return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      return text.encode()
  return text.encode()


def read_image(folder: pathlib.Path, task: Task) -> dict[str, Split]:
  """CIFAR-10 in gray: its binary files, or arrays of images and classes.

  Training images drawn once and for all, 5,000 at most, are for validation:
  files may be sorted by class.
  """
  side = task.side
  parts = {}
  for part, names in (
    ("train", "data_batch_?.bin"),
    ("test", "test_batch.bin"),
  ):
    batches = sorted(folder.rglob(names))
    if batches:
      pixels, labels = zip(*map(_cifar, batches))
      pixels, labels = np.concatenate(pixels), np.concatenate(labels)
    else:
      pixels, labels = (
        _array(_one(folder, [f"*{part}*_{key}.npy*"], task)) for key in "xy"
      )
    if pixels.shape[1:] != (side, side) or pixels.dtype != np.uint8:
      raise InputError(
        f"{folder}: its {part} images are {pixels.dtype} {pixels.shape}, not "
        f"uint8 (N, {side}, {side}): {task.advice}"
      )
    if labels.shape != pixels.shape[:1]:
      raise InputError(
        f"{folder}: has {len(pixels)} {part} images and classes {labels.shape}"
      )
    parts[part] = _images(pixels, _labels(labels))
  return _with_valid(parts, _IMAGE_VALID)


def _images(pixels, labels) -> Split:
  tokens = pixels.reshape(len(pixels), math.prod(pixels.shape[1:]))
  lengths = np.full(len(tokens), tokens.shape[1], np.int32)
  return Split(tokens, lengths, labels)


def _cifar(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  data = np.frombuffer(input_files.read_bytes(path), np.uint8)
  with input_files.errors_at(path, wrong="is no binary file of CIFAR-10"):
    rows = data.reshape(-1, 1 + 3 * 1024)
  colours = rows[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32)
  gray = np.einsum("nchw,c->nhw", colours, np.array(_GRAY, np.float32))
  return np.round(gray).astype(np.uint8), rows[:, 0]


def _array(path: pathlib.Path) -> np.ndarray:
  data = input_files.read_bytes(path)
  with input_files.errors_at(path, wrong="is no .npy file"):
    return arrays.npy_array(data)


def read_pathfinder(folder: pathlib.Path, task: Task) -> dict[str, Split]:
  """Images that */metadata/*.npy list, cut 80 : 10 : 10 as the benchmark does.

  A line of such a file holds a folder, a name, a number and the class.
  """
  from PIL import Image  # Only these files need it.

  if not list(folder.glob("metadata/*.npy")):
    folder = next(iter(sorted(folder.glob("*_14"))), folder)
  lists = sorted(folder.glob("metadata/*.npy"), key=lambda p: (len(p.name), p))
  if not lists:
    raise InputError(
      f"{folder}: has no metadata/*.npy: give a folder such as "
      "pathfinder32/curv_contour_length_14, or leave --data out to generate"
    )
  pixels, labels = [], []
  for path in lists:
    for number, line in enumerate(input_files.read_text(path).split("\n"), 1):
      words = line.split()
      if not words:
        continue
      where = f"{path} line {number}"
      if len(words) < 4:
        raise InputError(f"{where}: is no folder, name, number and class")
      image = input_files.regular(folder / words[0] / words[1])
      with input_files.errors_at(image), Image.open(image) as opened:
        pixels.append(np.asarray(opened.convert("L"), np.uint8))
      if pixels[-1].shape != (task.side, task.side):
        raise InputError(
          f"{image}: is {pixels[-1].shape}, not {task.side} by {task.side}"
        )
      with input_files.errors_at(where, wrong="has no class"):
        labels.append(int(words[3]))
  if not labels:
    raise InputError(f"{folder}: its metadata/*.npy list no image")
  whole = _images(np.stack(pixels), _labels(labels))
  ends = [len(labels) * 8 // 10, len(labels) * 9 // 10]
  return {
    "train": whole.rows(slice(0, ends[0])),
    "valid": whole.rows(slice(*ends)),
    "test": whole.rows(slice(ends[1], None)),
  }


def _with_valid(parts, held: int) -> dict[str, Split]:
  """Takes what validates from the training part, at random but always so."""
  train = parts["train"]
  order = np.random.default_rng(0).permutation(len(train.labels))
  held = min(held, max(len(order) // 10, 1))
  return {
    "train": train.rows(order[held:]),
    "valid": train.rows(order[:held]),
    "test": parts["test"],
  }


def _labels(labels: Iterable[int]) -> np.ndarray:
  """Classes; those that no task has stay so, and are refused with the task."""
  bound = np.iinfo(np.int32).max
  return np.array([min(max(x, -1), bound) for x in labels], np.int32)


def _one(folder: pathlib.Path, patterns: list[str], task: Task) -> pathlib.Path:
  """The first file of a folder that fits.

  A file in the place of the folder is refused: all parts would be read from it,
  so that models would be tested on what they learned from.
  """
  for pattern in patterns:
    if found := sorted(folder.glob(pattern)):
      return found[0]
  advice = task.advice or "leave --data out to generate the data"
  raise InputError(f"{folder}: has no {patterns[0]}: {advice}")


def _tsv(path: pathlib.Path) -> Iterable[tuple[int, list[str]]]:
  """(line, cells) of a file with tabs between cells."""
  text = input_files.read_text(path)
  for number, line in enumerate(io.StringIO(text), 1):
    cells = line.rstrip("\r\n").split("\t")
    if cells != [""]:
      yield number, [cell.strip('"') for cell in cells]


_TEXTS = {
  "listops": read_listops,
  "text": read_text,
  "retrieval": read_retrieval,
}
_IMAGES = {"image": read_image, "pathfinder32": read_pathfinder}


def read(path: pathlib.Path, task: Task, length: int) -> dict[str, Split]:
  """The parts "train", "valid" and "test" of a task's files.

  Args:
    path: a folder; of the task text also a file, whose lines name their part.
    task: one of `tasks.TASKS`.
    length: tokens of a text at most; what is behind is cut off.

  Raises:
    InputError: files are missing, damaged, or of another task.
  """
  if task.name in _IMAGES:
    return _IMAGES[task.name](path, task)
  return _TEXTS[task.name](path, task, length)
