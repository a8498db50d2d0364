"""What an action costs: net keep, FLOPs and bytes.

Net keep is the published proxy. FLOPs and bytes are those of a decoder that
really skips the work (`research/cost/decode_step.py`). Bits save neither: they
round the MLP's *output*, which is neither a weight, nor the input of a matrix
product, nor cached, so a bfloat16 decoder reads and multiplies as much as
before.
"""

import numpy as np

from research.cost import decode_step
from research.sol.actions import FULL_BITS, ActionTable
from research.sol.rollout import Setup


def net_keep(table: ActionTable) -> np.ndarray:
  """Returns (kappa + rho + bits / 16) / 3 of each action, (A,)."""
  bits = np.asarray(table.bits) / FULL_BITS
  return (np.asarray(table.kappa) + np.asarray(table.rho) + bits) / 3


def shares_of_dense(
  setup: Setup, context: float, policy_params: int = 0
) -> np.ndarray:
  """FLOPs and bytes of a decode step as shares of the dense one: (A, 2).

  Args:
    setup: the model and the A actions.
    context: Visible tokens, the current one included.
    policy_params: Parameters of the policy, each multiplied and read once.
  """
  table = setup.table
  pages = {"page_size": setup.page_size}
  own = pages | {"prune": setup.prune, "policy_params": policy_params}
  columns = [
    count(setup.config, table.kappa, table.rho, context, **own)
    / count(setup.config, 1.0, 1.0, context, **pages)
    for count in (decode_step.flops_per_token, decode_step.bytes_per_token)
  ]
  return np.stack(columns, axis=1)
