"""The one error for bad user input; what errors of a machine mean."""

import errno
import re
import reprlib
from typing import Any

_DENIED = ("EACCES", "EEXIST", "ENOTDIR", "EPERM", "EROFS")
# NumPy, safetensors, tokenizers and TensorStore (of Orbax) tell of a full disk
# or quota in words of their own.
_DISK_FULL = re.compile(
  r"no space left on device|disk quota exceeded|storagefull|quotaexceeded"
  r"|os error (28|122)\b|code: (28|122)\b|\b\d+ requested and \d+ written",
  re.IGNORECASE,
)


# Characters of a message, and of a value inside of one.
_LONGEST, _LONGEST_VALUE = 1000, 60


class InputError(ValueError):
  """Bad input from a user: one line that says what, where and what to do.

  Scripts in `experiments/` print the line and exit with code 2. A long line
  loses its middle: files decide what stands in messages.
  """

  def __init__(self, message: object = ""):
    """Takes the line."""
    super().__init__(_without_middle(str(message), _LONGEST))


def _without_middle(text: str, length: int) -> str:
  if len(text) <= length:
    return text
  end = length // 4
  return f"{text[: length - end - 5]} ... {text[-end:]}"


def shown(value: Any, length: int = _LONGEST_VALUE) -> str:
  """A value of a file as a message may show it: short, on one line.

  No value costs much: neither long texts, nor deep lists, nor tuples that hold
  themselves a thousand times are written out.
  """
  short = reprlib.Repr()
  short.maxlevel = 2
  short.maxlist = short.maxtuple = short.maxdict = short.maxset = 4
  short.maxfrozenset = short.maxdeque = short.maxarray = 4
  short.maxstring = short.maxlong = short.maxother = length
  try:
    return _without_middle(short.repr(value), length)
  except Exception:  # Python refuses to write integers of 4,300 digits.
    return f"<{type(value).__name__}>"


def reason(error: BaseException) -> str:
  """What an exception of a library says, in a few words.

  An error's own text is not asked for, since that of a KeyError writes out the
  whole key, which may come of a file.
  """
  detail = error.args[0] if error.args else ""
  if isinstance(error, OSError):
    detail = error.strerror or detail
  text = detail if isinstance(detail, str) else shown(detail)
  line = " ".join(text[:1000].split())
  name = type(error).__name__
  return _without_middle(f"{name}: {line}" if line else name, 120)


def not_finite() -> InputError:
  """The error for a model whose logits no token can be read from."""
  return InputError(
    "the model's logits are NaN or infinite: its weights are damaged, or too "
    "large for their dtype; get the checkpoint again, or give --dtype=float32"
  )


def is_panic(error: BaseException) -> bool:
  """Whether a library in Rust failed a check of its own.

  The class is pyo3's, is made at the first such error, and is no Exception.
  """
  return type(error).__name__ == "PanicException"


def is_disk_full(error: BaseException | None) -> bool:
  """Whether an error, or the one it came of, is a full disk or quota."""
  while error is not None:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      return True
    # An error that holds a value of a file is not asked for its text, since
    # that writes out the whole value.
    told = " ".join(arg[:10_000] for arg in error.args if isinstance(arg, str))
    if _DISK_FULL.search(told):
      return True
    error = error.__cause__ or error.__context__
  return False


def advice_on(error: Exception) -> str | None:
  """What went wrong and what a user can do about it; None for a bug."""
  if isinstance(error, InputError):
    return str(error)
  if is_disk_full(error):
    place = getattr(error, "filename", None) or "the disk"
    return f"{place}: no space is left: make room, and the same command goes on"
  if errno.errorcode.get(getattr(error, "errno", None)) in _DENIED:
    return f"{error.filename}: {error.strerror}"
  return _advice_on_device(str(error))


def _advice_on_device(message: str) -> str | None:
  """What to do about an error that JAX tells of a device; None for others."""
  if "Unable to initialize backend" in message:
    return f"{message}; python launch/doctor.py shows what is here"
  _, found, asked = message.partition("RESOURCE_EXHAUSTED: ")
  first = asked.partition("\n")[0]
  if found:
    return (
      f"the device has too little memory left: {first}; smaller batches or "
      "shorter texts need less, and other programs may hold some"
    )
  return None
