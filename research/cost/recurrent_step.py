"""What a step of a recurrent model costs at least, whatever its formats."""

from typing import Any

from models.module import Params, num_params
from research.cost.roofline import Phase
from research.cost.sizes import nbytes


def least_work(params: Params, state: Any, rows: int) -> Phase:
  """The least work of one token of each row.

  Every weight is read once, in the bits that it is kept in, and multiplied once
  for each row; every state is read and written once, with its scales. A token
  table counts where it is the head too: else some rows of it are read.

  Args:
    params: arrays, or weights in few bits, or their shapes.
    state: of all rows, or its shapes.
    rows: of the batch.
  """
  if "lm_head" in params:
    params = {name: own for name, own in params.items() if name != "embed"}
  return Phase(
    2.0 * rows * num_params(params), nbytes(params) + 2 * nbytes(state)
  )
