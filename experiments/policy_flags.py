"""Flags of decoding under a compute policy (SOL)."""

from collections.abc import Sequence
from typing import Any

from absl import flags

import cli
from models.errors import InputError

_POLICY = flags.DEFINE_string(
  "policy", None, "run of train_sol.py whose policy chooses each token's work"
)
_BUDGET = cli.number(
  "budget", None, "what a token may spend, in the policy's unit", 0.0, 2.0
)
_DENSE_BELOW = cli.integer(
  "dense_below", 0, "tokens up to which the policy's steps leave out nothing", 0
)


def check() -> None:
  """Raises InputError where one flag lacks the other."""
  if (_POLICY.value is None) != (_BUDGET.value is None):
    raise InputError("--policy and --budget need each other")
  if _DENSE_BELOW.value and _POLICY.value is None:
    raise InputError("--dense_below is for --policy: leave it out")


def played(
  checkpoint: Any,
  tokenizer: Any,
  prompts: Sequence[Any],
  max_tokens: int,
  temperature: float,
  seed: int,
) -> bool:
  """Prints the prompts' continuations and what each spent, if asked for."""
  if _POLICY.value is None:
    return False
  from models import control_tokens
  from research.sol import generation, load_policy

  policy = load_policy(_POLICY.value)
  for prompt in prompts:
    if not isinstance(prompt, str):
      raise InputError("--policy continues texts: give no chats")
    encoded = control_tokens.begun(tokenizer, tokenizer.encode(prompt))
    found = generation.continue_text(
      policy,
      checkpoint,
      encoded,
      _BUDGET.value,
      max_tokens=max_tokens,
      temperature=temperature,
      seed=seed,
      dense_below=_DENSE_BELOW.value,
    )
    print(tokenizer.decode([*encoded, *found.tokens]))
    cli.say(str(found))
  return True
