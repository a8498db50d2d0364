"""Arrays of NumPy's files, whose headers may say more than the files hold."""

import io
import math
import zipfile

import numpy as np

from models import input_files

# Characters of the text in front of an array that says its shape.
_MOST_HEADER = 10_000


def read_npz(
  path: input_files.Path, advice: str = input_files.AGAIN
) -> dict[str, np.ndarray]:
  """Arrays of any shapes, (), (N,) and so on, by name.

  Raises:
    InputError: the file is absent or damaged, or its parts unpack to more than
      `input_files.unpacking` admits.
  """
  path = input_files.regular(path, advice)
  found = {}
  with input_files.errors_at(path, advice), zipfile.ZipFile(path) as archive:
    size = path.stat().st_size
    for name in archive.namelist():
      with archive.open(name) as stream:
        data = input_files.read_bounded(stream, size, path)
      size += len(data)
      found[name.removesuffix(".npy")] = npy_array(data)
  return found


def read_npy(
  path: input_files.Path, advice: str = input_files.AGAIN
) -> np.ndarray:
  """The array of a .npy file, of any shape (...,).

  Raises:
    InputError: the file is absent or damaged.
  """
  path = input_files.regular(path, advice)
  with input_files.errors_at(path, advice):
    return npy_array(path.read_bytes())


def npy_array(data: bytes) -> np.ndarray:
  """The array of a .npy file's bytes; makes none before it has its size.

  Raises:
    ValueError: or another error; they are none, or damaged.
  """
  form = np.lib.format
  stream = io.BytesIO(data)
  version = form.read_magic(stream)
  read_header = {
    (1, 0): form.read_array_header_1_0,
    (2, 0): form.read_array_header_2_0,
  }[version]
  shape, _, dtype = read_header(stream, max_header_size=_MOST_HEADER)
  if dtype.hasobject or min(shape, default=0) < 0:
    raise ValueError("no plain array")
  if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
    raise ValueError("another size than its header says")
  stream.seek(0)
  return form.read_array(stream, allow_pickle=False)
