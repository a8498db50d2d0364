"""What a controller of the computation costs itself, for one decode step.

Counted is all of it: the weights that it multiplies and reads, the keys and
values of its own cache, the table of actions that it chooses from, and the
kernels that it launches where nothing is fused. What is decided once for N
tokens costs each of them an Nth.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerCost:
  """A token's share of a controller.

  Attributes:
    flops: operations of its products.
    bytes: read by them.
    launches: kernels, one a product, one for attention and one for the choice.
  """

  flops: float = 0.0
  bytes: float = 0.0
  launches: float = 0.0


def controller_cost(
  params: int,
  *,
  products: int,
  bits: int = 16,
  cached: float = 0.0,
  table: int = 0,
  every: int = 1,
) -> ControllerCost:
  """Counts a controller whose weights are each multiplied and read once.

  Args:
    params: weights.
    products: matrix products.
    bits: of a weight.
    cached: numbers of its own key/value cache that a step reads, in bfloat16.
    table: actions whose mean damages on three axes are multiplied by three
      sensitivities, and whose costs are taken off: four bfloat16 numbers each.
    every: tokens that a decision holds for.
  """
  multiplied = params + cached + 3 * table
  moved = params * bits / 8 + 2 * (cached + 4 * table)
  launches = products + (cached > 0) + (table > 0) + 1
  return ControllerCost(
    flops=2.0 * multiplied / every,
    bytes=float(moved) / every,
    launches=launches / every,
  )
