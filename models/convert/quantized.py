"""QTensors in files that hold plain arrays, exactly.

A QTensor named N lies there as the arrays "N.values", "N.scales" and, where the
format has them, "N.zeros"; scales of a second level as "N.scales.values" and so
on. What is no array, such as the format's name, is text: JSON by the QTensor's
name, one entry a level.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from ops.quantized import QTensor, formats

# The entry of a file's header that holds the text.
KEY = "frugax.quantized"
# For config.json: other programs would take the weights for missing.
CONFIG = {"quantization_config": {"quant_method": "frugax"}}
_PARTS = ("values", "scales", "zeros")


def to_arrays(
  tensors: Mapping[str, np.ndarray | QTensor],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Takes QTensors apart.

  Returns:
    Contiguous arrays by name, and what to add to the file's header.
  """
  arrays: dict[str, np.ndarray] = {}
  text: dict[str, Any] = {}

  def add(name, tensor):
    if not isinstance(tensor, QTensor):
      array = np.asarray(tensor)
      if array.dtype.itemsize == 1 and array.dtype.kind not in "iu":
        array = array.view(np.uint8)  # numpy has no name for floats of a byte
      arrays[name] = np.ascontiguousarray(array)
      return
    text[name] = {
      "format": str(tensor.format),
      "axis": tensor.axis,
      "length": tensor.length,
      "dtype": jnp.dtype(tensor.dtype).name,
    }
    for part in _PARTS:
      if (own := getattr(tensor, part)) is not None:
        add(f"{name}.{part}", own)

  for name, tensor in tensors.items():
    add(name, tensor)
  return arrays, {KEY: json.dumps(text)} if text else {}


class Quantized:
  """The QTensors of an open file."""

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
    try:
      self._text = json.loads((header or {}).get(KEY, "{}"))
      self._formats = {
        name: formats.get(entry["format"]) for name, entry in self._text.items()
      }
      self._static = {
        name: {
          "axis": int(entry["axis"]),
          "length": int(entry["length"]),
          "dtype": jnp.dtype(entry["dtype"]),
        }
        for name, entry in self._text.items()
      }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
      raise InputError(
        f"{label}: its quantized tensors cannot be read: {error}; get the file "
        "again, or a version of this code that knows the format"
      ) from error

    for name, form in self._formats.items():
      for part in _PARTS[: 3 - form.symmetric]:
        whole = f"{name}.{part}"
        if whole not in stored and whole not in self._text:
          raise InputError(
            f"{label}: tensor {whole!r} is missing: get the file again"
          )

  def names(self) -> list[str]:
    """Names of all tensors of the file, QTensors as one."""
    parts = {f"{name}.{part}" for name in self._text for part in _PARTS}
    return [n for n in [*self._stored, *self._text] if n not in parts]

  def __contains__(self, name: str) -> bool:
    """Whether a name is that of a QTensor."""
    return name in self._text

  def shape(
    self, name: str, shape_of: Callable[[str], tuple[int, ...]]
  ) -> tuple[int, ...]:
    """The shape that one stands for, from those of arrays."""
    shape = list(shape_of(f"{name}.values"))
    shape[self._static[name]["axis"]] = self._static[name]["length"]
    return tuple(shape)

  def read(self, name: str, read: Callable[[str], np.ndarray]) -> QTensor:
    """Puts one together.

    Args:
      name: of the QTensor.
      read: an array of the file by its name.

    Raises:
      InputError: arrays do not fit each other or the format.
    """
    form = self._formats[name]
    stored = "uint8" if form.packed else form.dtype
    scales = f"{name}.scales"
    try:
      whole = QTensor(
        values=read(f"{name}.values").view(jnp.dtype(stored)),
        scales=self.read(scales, read) if scales in self else read(scales),
        zeros=None if form.symmetric else read(f"{name}.zeros"),
        format=form,
        **self._static[name],
      )
      whole.check()
    except (KeyError, IndexError, ValueError, TypeError) as error:
      raise InputError(
        f"{self._label}: tensor {name!r} is damaged: {error}: get the file "
        "again"
      ) from error
    return whole


def alike(rows: list[QTensor]) -> bool:
  """Whether layers of one shape can be stacked."""
  return (
    len({jax.tree.structure(row) for row in rows}) == 1
    and len(
      {tuple(leaf.shape for leaf in jax.tree.leaves(row)) for row in rows}
    )
    == 1
  )


def stack(rows: list[QTensor], dtype: np.dtype) -> QTensor:
  """Stacks layers that are alike, to stand for an array of `dtype`."""
  rows = [dataclasses.replace(row, dtype=jnp.dtype(dtype)) for row in rows]
  return jax.tree.map(lambda *parts: np.stack(parts), *rows)
