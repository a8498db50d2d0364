"""Directories of checkpoints: one file of tensors, or several with an index."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from models import input_files
from models.convert.names import TensorSource
from models.errors import InputError


class TensorFile(Protocol):
  """An open file of tensors."""

  def names(self) -> list[str]:
    """Names of its tensors."""

  def read(self, name: str) -> np.ndarray:
    """Reads one."""

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of one, without reading it."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    InputError: the file is missing or is no JSON object.
  """
  return input_files.read_json(path, advice="get the checkpoint again")


def open_file(
  path: pathlib.Path, opener: Callable[[pathlib.Path], TensorFile]
) -> TensorSource:
  """Offers the tensors of one file; reads none yet.

  Raises:
    InputError: the file is damaged.
  """
  file = opener(path)
  return _source(dict.fromkeys(file.names(), path), {path: file})


def open_index(
  index: pathlib.Path, opener: Callable[[pathlib.Path], TensorFile]
) -> TensorSource:
  """Offers the tensors of all files that an index names; reads none yet.

  Raises:
    InputError: a file is missing, damaged or does not fit the index.
  """
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError(f"{index}: has no weight_map: get the file again")
  paths = {
    file: input_files.beside(index, file)
    for file in _distinct(index, weight_map.values())
  }
  files = {name: paths[file] for name, file in weight_map.items()}
  opened = {path: opener(path) for path in sorted(set(files.values()))}
  held = {path: set(file.names()) for path, file in opened.items()}
  for name, path in files.items():
    if name not in held[path]:
      raise InputError(
        f"{path}: tensor {name!r} is missing, though the index lists it: get "
        "the file again"
      )
  return _source(files, opened)


def _distinct(index: pathlib.Path, names: Iterable[Any]) -> list[str]:
  """Names of files, each once; raises InputError where one is no text."""
  for name in names:
    if not isinstance(name, str):
      input_files.beside(index, name)
  return sorted(set(names))


def _source(
  held: dict[str, pathlib.Path], opened: dict[pathlib.Path, TensorFile]
) -> TensorSource:
  """Tensors by name, each from the file that `held` names."""
  first = next(iter(opened))
  return TensorSource(
    names=frozenset(held),
    read=lambda name: opened[held[name]].read(name),
    label=lambda name: f"{held.get(name, first)}: tensor {name!r}",
    shape=lambda name: opened[held[name]].shape(name),
  )
