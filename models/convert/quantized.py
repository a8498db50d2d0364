"""Weights of few bits in files that hold plain arrays, exactly.

What is no plain array is a node: a QTensor, a QWeight, a Quantizer or the Taps
of a layer. The parts of one named N lie there by names of their own,

  QTensor    "N.values", "N.scales" and, where the format has them, "N.zeros",
             "N.choices" and "N.book"
  QWeight    "N.weight", and "N.input" where activations are quantized
  Quantizer  "N.scales" where they are static
  Taps       "N.x" and so on, of what is quantized

and a part that is a node by the parts of its own. What is no array, such as the
format's name, is text: JSON by the node's name.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import input_files
from models.errors import InputError
from ops.quantized import QTensor, Quantizer, QWeight, Taps, formats

# The entry of a file's header that holds the text.
KEY = "frugax.quantized"
_UNREADABLE = "its quantized tensors cannot be read"
_AGAIN = "get the file again, or a version of this code that knows the format"
NODES = QTensor | QWeight | Quantizer | Taps
_PARTS = {
  QTensor: ("values", "scales", "zeros", "choices", "book"),
  QWeight: ("weight", "input"),
  Quantizer: ("scales",),
  Taps: tuple(field.name for field in dataclasses.fields(Taps)),
}
_KINDS = {kind.__name__: kind for kind in _PARTS}


def to_arrays(
  tensors: Mapping[str, np.ndarray | NODES],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Takes nodes apart.

  Returns:
    Contiguous arrays by name, and what to add to the file's header.
  """
  arrays: dict[str, np.ndarray] = {}
  text: dict[str, Any] = {}

  def add(name, tensor):
    if not isinstance(tensor, NODES):
      array = np.asarray(tensor)
      if array.dtype.itemsize == 1 and array.dtype.kind not in "iu":
        array = array.view(np.uint8)  # numpy has no name for floats of a byte
      arrays[name] = np.ascontiguousarray(array)
      return
    own = {part: getattr(tensor, part) for part in _PARTS[type(tensor)]}
    own = {part: value for part, value in own.items() if value is not None}
    text[name] = {
      "kind": type(tensor).__name__,
      "parts": list(own),
      **_static(tensor),
    }
    for part, value in own.items():
      add(f"{name}.{part}", value)

  for name, tensor in tensors.items():
    add(name, tensor)
  return arrays, {KEY: json.dumps(text)} if text else {}


def _static(node: NODES) -> dict[str, Any]:
  """What of a node is no array, as JSON has it."""
  if isinstance(node, Taps):
    return {}
  if isinstance(node, QWeight):
    return {"hadamard": node.hadamard}
  if isinstance(node, Quantizer):
    return {"format": str(node.format)}
  return {
    "format": str(node.format),
    "axis": node.axis,
    "length": node.length,
    "dtype": jnp.dtype(node.dtype).name,
  }


# The inverse of `_static`, field by field.
_FIELDS: Mapping[str, Callable[[Any], Any]] = {
  "hadamard": bool,
  "format": formats.get,
  "axis": int,
  "length": int,
  "dtype": jnp.dtype,
}


class Quantized:
  """The nodes of an open file."""

  def __init__(
    self, header: Mapping[str, str] | None, stored: list[str], label: str
  ):
    """Reads their text.

    Args:
      header: text of the file.
      stored: names of all arrays of the file.
      label: of the file, for messages.

    Raises:
      InputError: the text is damaged, of a format that is not known, or of
        arrays that are not there.
    """
    self._stored, self._label = stored, label
    with input_files.errors_at(label, _AGAIN, _UNREADABLE):
      text = json.loads((header or {}).get(KEY, "{}"))
      self._kinds = {name: _KINDS[text[name]["kind"]] for name in text}
      self._parts = {name: tuple(text[name]["parts"]) for name in text}
      self._static = {
        name: {
          field.name: _FIELDS[field.name](text[name][field.name])
          for field in dataclasses.fields(kind)
          if field.metadata.get("static")
        }
        for name, kind in self._kinds.items()
      }

    held = {*stored, *self._kinds}
    for name, parts in self._parts.items():
      for part in parts:
        whole = f"{name}.{part}"
        if whole not in held:
          raise InputError(
            f"{label}: tensor {whole!r} is missing: get the file again"
          )

  def names(self) -> list[str]:
    """Names of all tensors of the file, nodes as one."""
    parts = {
      f"{name}.{part}" for name, own in self._parts.items() for part in own
    }
    return [n for n in [*self._stored, *self._kinds] if n not in parts]

  def __contains__(self, name: str) -> bool:
    """Whether a name is that of a node."""
    return name in self._kinds

  def shape(
    self, name: str, shape_of: Callable[[str], tuple[int, ...]]
  ) -> tuple[int, ...]:
    """The shape that one stands for, from those of arrays."""
    if name not in self:
      return shape_of(name)
    with input_files.errors_at(f"{self._label}: tensor {name!r}"):
      return self._shape(name, shape_of)

  def _shape(
    self, name: str, shape_of: Callable[[str], tuple[int, ...]]
  ) -> tuple[int, ...]:
    kind = self._kinds[name]
    shape = self.shape(f"{name}.{_PARTS[kind][0]}", shape_of)
    if kind is not QTensor:
      return shape
    axis, length = self._static[name]["axis"], self._static[name]["length"]
    shape = list(shape)
    shape[axis] = length
    return tuple(shape)

  def read(self, name: str, read: Callable[[str], np.ndarray]) -> NODES:
    """Puts one together.

    Args:
      name: of the node.
      read: an array of the file by its name.

    Raises:
      InputError: arrays do not fit each other or the format.
    """
    kind, static = self._kinds[name], self._static[name]
    with input_files.errors_at(f"{self._label}: tensor {name!r}"):
      own = dict.fromkeys(_PARTS[kind])
      for part in self._parts[name]:
        whole = f"{name}.{part}"
        own[part] = self.read(whole, read) if whole in self else read(whole)
      if kind is QTensor:
        if static["axis"] not in (-1, -2):
          raise ValueError(f"axis {static['axis']}")
        form = static["format"]
        stored = "uint8" if form.packed else form.dtype
        own["values"] = own["values"].view(jnp.dtype(stored))
        kept = jnp.dtype(form.scale_dtype)
        if kept.itemsize == 1 and not form.scale_format:
          own["scales"] = own["scales"].view(kept)
      node = kind(**own, **static)
      if kind is QTensor:
        node.check()
    return node


def alike(rows: list[NODES]) -> bool:
  """Whether layers of one shape can be stacked."""
  return (
    len({jax.tree.structure(row) for row in rows}) == 1
    and len(
      {tuple(leaf.shape for leaf in jax.tree.leaves(row)) for row in rows}
    )
    == 1
  )


def stack(rows: list[NODES], dtype: np.dtype) -> NODES:
  """Stacks layers that are alike, to stand for an array of `dtype`."""
  rows = [_standing_for(row, jnp.dtype(dtype)) for row in rows]
  return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def _standing_for(node, dtype):
  """A node, or an array, for an array of `dtype`."""
  if isinstance(node, QTensor):
    return dataclasses.replace(node, dtype=dtype)
  if isinstance(node, QWeight):
    return dataclasses.replace(node, weight=_standing_for(node.weight, dtype))
  return node if isinstance(node, Quantizer | Taps) else node.astype(dtype)
