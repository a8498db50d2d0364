"""The one error for bad user input; what errors of a machine mean."""

import errno
import re

_DENIED = ("EACCES", "EEXIST", "ENOTDIR", "EPERM", "EROFS")
# NumPy, safetensors, tokenizers and TensorStore (of Orbax) tell of a full disk
# or quota in words of their own.
_DISK_FULL = re.compile(
  r"no space left on device|disk quota exceeded|storagefull|quotaexceeded"
  r"|os error (28|122)\b|code: (28|122)\b|\d+ requested and \d+ written",
  re.IGNORECASE,
)


class InputError(ValueError):
  """Bad input from a user: one line that says what, where and what to do.

  Scripts in `experiments/` print the line and exit with code 2.
  """


def not_finite() -> InputError:
  """The error for a model whose logits no token can be read from."""
  return InputError(
    "the model's logits are NaN or infinite: its weights are damaged, or too "
    "large for their dtype; get the checkpoint again, or give --dtype=float32"
  )


def is_disk_full(error: BaseException | None) -> bool:
  """Whether an error, or the one it came of, is a full disk or quota."""
  while error is not None:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      return True
    if _DISK_FULL.search(str(error)):
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
