"""The one error for bad user input, and advice on errors of a device."""


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


def advice_on_device(message: str) -> str | None:
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
