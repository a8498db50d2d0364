"""Arguments of users, checked: one line says what is wrong with one."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.errors import InputError
from models.regression_lm_config import RegressionLMConfig
from models.tokenizer import Tokenizer
from research.decoding.sampling import Sampling
from research.predictors.examples import text_of
from research.text import tokenizing


def integer(name: str, value: Any, lower: int) -> int:
  """An integer of Python or NumPy, at least `lower`.

  Raises:
    InputError: it is none.
  """
  is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not is_whole or value < lower:
    names = {0: "no count", 1: "no positive integer"}
    what = names.get(lower, f"no integer from {lower} on")
    raise InputError(f"{name}={value!r} is {what}")
  return int(value)


def number(name: str, value: Any, lower: float = 0.0) -> float:
  """A finite number of Python or NumPy, at least `lower`.

  Raises:
    InputError: it is none, such as the text "1e-3".
  """
  is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_real or not lower <= value < math.inf:
    raise InputError(f"{name}={value!r} is no number in [{lower:g}, inf)")
  return float(value)


def level(value: Any) -> float:
  """A probability between 0 and 1.

  Raises:
    InputError: it is none.
  """
  if not isinstance(value, numbers.Real) or not 0 < value < 1:
    raise InputError(f"level={value!r} is not in (0, 1)")
  return float(value)


def seed(value: Any) -> int:
  """A seed; None takes one that was never taken before.

  Raises:
    InputError: it is no integer from 0.
  """
  if value is None:
    return int(np.random.SeedSequence().entropy % (1 << 31))
  return integer("seed", value, 0)


def listed(name: str, values: Any) -> list[Any]:
  """Several texts or examples as a list, also of a generator.

  Raises:
    InputError: it is one text, or nothing that can be gone through.
  """
  if isinstance(values, str):
    raise InputError(f"{name} is one text: give a list of texts")
  try:
    return list(values)
  except TypeError as error:
    raise InputError(
      f"{name} is a {type(values).__name__}: give a list"
    ) from error


def sampling(temperature: Any, top_p: Any) -> Sampling:
  """The rule of draws.

  Raises:
    InputError: a number does not do.
  """
  try:
    return Sampling(
      temperature=number("temperature", temperature),
      top_p=number("top_p", top_p),
    )
  except (ValueError, TypeError) as error:
    raise InputError(str(error)) from error


def sizes(
  max_length: Any, given: dict[str, Any], beside: Sequence[str] = ()
) -> None:
  """Raises InputError for what is no length, or no size to be chosen."""
  integer("max_length", max_length, 1)
  names = {field.name for field in dataclasses.fields(RegressionLMConfig)}
  for name in given.keys() - (names - set(beside)):
    raise InputError(f"{name}={given[name]!r}: there is no such size")


def make_tokenizer(
  tokenizer: str | Tokenizer, texts: Sequence[Any], vocab_size: int
) -> Tokenizer:
  """A tokenizer by name, or learned from texts (or examples).

  Raises:
    InputError: there is none, or nothing to learn from.
  """
  if isinstance(tokenizer, Tokenizer):
    return tokenizer
  if tokenizer not in tokenizing.LEARNED:
    return tokenizing.load(str(tokenizer))
  documents = [text_of(text) for text in texts]
  return tokenizing.learn(tokenizer, documents, vocab_size)
