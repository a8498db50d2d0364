"""Continues one text while a policy chooses what each token gets.

What the prompt fills whole pages with is read densely, the rest of it by dense
steps; every token behind it is computed under the policy's action, and nothing
is replayed. Where actions drop nothing but pages that query heads share, the
pages that an action keeps are read and no others (`research.sol.paged`);
everything else is computed and masked.

Axis letters: S tokens of the prefix, F tokens of the prompt behind it, n steps,
L layers, D width of the LLM, A actions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.convert import Checkpoint
from models.errors import InputError
from models.module import num_params
from research.sol import calibrate, paged, rollout
from research.sol import policy as policy_lib
from research.sol.artefact import Artefact
from research.sol.cost import StepCosts
from research.sol.learn import Method


@dataclasses.dataclass(frozen=True)
class Continued:
  """A text that was continued.

  Attributes:
    tokens: (n,) int32, new ones.
    actions: (n,) int32.
    spent: mean (kappa, rho, bits / 16).
    cost: mean of what a token spent in the budget's unit, the policy's own
      cost with it.
    unit: of the budget.
    skipped: whether what actions drop was not read, or else masked.
  """

  tokens: np.ndarray
  actions: np.ndarray
  spent: np.ndarray
  cost: float
  unit: str
  skipped: bool

  def __str__(self) -> str:
    """What was spent, in one line."""
    kappa, rho, bits = self.spent
    unit = self.unit.replace("_", " ")
    return (
      f"spent {self.cost:.3f} in {unit} a token, dense is 1: {kappa:.2f} of "
      f"the tokens, {rho:.2f} of the channels, {16 * bits:.1f} bits; what was "
      f"left out was {'not read' if self.skipped else 'masked'}"
    )


def continue_text(
  artefact: Artefact,
  checkpoint: Checkpoint,
  prompt: np.ndarray,
  budget: float,
  *,
  max_tokens: int,
  temperature: float = 0.0,
  seed: int = 0,
  dense_below: int = 0,
) -> Continued:
  """Continues a prompt (P,) at a budget that the policy was trained for.

  Args:
    artefact: a policy with prices.
    checkpoint: the frozen LLM.
    prompt: tokens, more than a page of them.
    budget: in the policy's unit, see `Artefact.spent`.
    max_tokens: to add.
    temperature: of the draws; 0 is greedy.
    seed: of the draws.
    dense_below: tokens of a context, up to which nothing is left out.

  Raises:
    InputError: policy, model, prompt and budget do not fit.
  """
  options = artefact.options
  if artefact.model != checkpoint.name:
    raise InputError(
      f"the policy was trained on {artefact.model}, not on {checkpoint.name}"
    )
  if not artefact.prices.size:
    raise InputError("the policy knows no prices: train it with budget=price")
  low, high = float(artefact.spent.min()), float(artefact.spent.max())
  if not low - 0.005 <= budget <= high + 0.005:
    raise InputError(
      f"budget={budget:g}: the policy spends {low:.3f} to {high:.3f}"
    )
  method = options.method(
    checkpoint.config, None, artefact.action_costs.tolist()
  )
  page = options.page_size
  length = max((len(prompt) - 1) // page * page, 0)
  if length < max(page, 2):
    raise InputError(f"the prompt has {len(prompt)} tokens: give over {page}")
  if len(prompt) + max_tokens > checkpoint.config.max_position:
    raise InputError("prompt and continuation are longer than the model reads")
  price = calibrate.knob_for([budget], artefact.prices, artefact.spent)
  tokens, actions = _play(
    method,
    checkpoint.params,
    (artefact.params, artefact.stats),
    jnp.asarray(prompt[: length + 1], jnp.int32)[None],
    jnp.asarray(prompt[length:], jnp.int32),
    jnp.asarray(price, jnp.float32).reshape(1, 1, 1),
    jax.random.key(seed),
    steps=max_tokens,
    temperature=temperature,
    dense_below=dense_below,
  )
  tokens, actions = np.asarray(tokens), np.asarray(actions)
  table = method.setup.table
  cost = float(method.policy.spent[actions].mean())
  if options.budget_unit in ("flops", "bytes"):
    costs = StepCosts(
      setup=method.setup,
      context=float(len(prompt) + max_tokens / 2),
      page_union=dict.fromkeys(table.kappa, 1.0),
    )
    own = method.policy.own_cost(num_params(artefact.params))
    cost += costs.overhead(
      options.budget_unit, own, refreshed=False, head=False
    )
  spent = np.asarray(rollout.action_costs(table))[actions].mean(0)
  skipped = paged.reads_pages(method.setup)
  return Continued(tokens, actions, spent, cost, options.budget_unit, skipped)


def _play(
  method: Method,
  lm: Any,
  policy: Any,
  prefix: jax.Array,
  tail: jax.Array,
  price: jax.Array,
  key: jax.Array,
  **options: Any,
) -> tuple[jax.Array, jax.Array]:
  """New tokens and their actions (n,), see `rollout.extend`."""
  setup = method.setup
  known = setup.build_prefix(lm, prefix, prefix.shape[1] - 1)

  @jax.jit
  def run(lm, known, policy, tail, price, key):
    by_pages = {}
    if paged.reads_pages(setup):
      room = tail.shape[0] + options["steps"]
      by_pages["memory"] = paged.memory(setup, known, room)
      by_pages["forward"] = paged.forward(setup, lm)
    return rollout.extend(
      setup,
      lm,
      known,
      tail,
      rollout.Play(
        controller=policy_lib.controller(method.policy, greedy=True),
        params=policy,
        goal=price,
      ),
      key,
      **by_pages,
      **options,
    )

  return run(lm, known, policy, tail, price, key)
