"""The one error for bad user input."""


class InputError(ValueError):
  """Bad input from a user: one line that says what, where and what to do.

  Scripts in `experiments/` print the line and exit with code 2.
  """
