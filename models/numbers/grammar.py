"""The grammar of valid continuations, as a table that a device can hold."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
  """A state machine that accepts exactly the canonical token sequences.

  Every finite number but zero has one sequence, so that probabilities of
  sequences, renormalised over what is allowed, are those of numbers. Zero has
  one for each sign and, where it may come from underflow, exponent sign. State
  0 is in front of a number; behind its last token the machine is in state 0
  again, for the next objective. Axis letters: S states, V tokens.

  Attributes:
    next_state: (S, V) int32; -1 where the token is not allowed.
  """

  next_state: np.ndarray

  @property
  def allowed(self) -> np.ndarray:
    """(S, V) bool."""
    return self.next_state >= 0

  def accepts(self, tokens: np.ndarray) -> np.ndarray:
    """Whether sequences (..., T) are whole numbers: (...) bool."""
    tokens = np.asarray(tokens)
    state = np.zeros(tokens.shape[:-1], np.int32)
    good = np.ones(tokens.shape[:-1], bool)
    for step in range(tokens.shape[-1]):
      state = self.next_state[state, tokens[..., step]]
      good &= state >= 0
      state = np.maximum(state, 0)
    return good & (state == 0)


class Builder:
  """Collects the transitions of a grammar."""

  def __init__(self, num_tokens: int):
    """A machine of `num_tokens` tokens that allows nothing yet."""
    self._num_tokens = num_tokens
    self._rows: list[dict[int, int]] = [{}]

  def state(self) -> int:
    """A new state."""
    self._rows.append({})
    return len(self._rows) - 1

  def allow(self, state: int, tokens: list[int], target: int) -> None:
    """Allows each of `tokens` in `state`; they lead to `target`."""
    for token in tokens:
      if token in self._rows[state]:
        raise ValueError(f"token {token} in state {state} leads two ways")
      self._rows[state][token] = target

  def chain(self, state: int, steps: list[list[int]], end: int) -> None:
    """Allows a sequence of choices from `state`, which ends in `end`."""
    for number, tokens in enumerate(steps):
      last = number == len(steps) - 1
      target = end if last else self.state()
      self.allow(state, tokens, target)
      state = target

  def build(self) -> Grammar:
    """The finished machine."""
    table = np.full((len(self._rows), self._num_tokens), -1, np.int32)
    for state, row in enumerate(self._rows):
      for token, target in row.items():
        table[state, token] = target
    return Grammar(table)
