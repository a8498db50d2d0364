"""Random weights, compiled once for each shape of a model."""

import functools

import jax

from models import regression_lm
from models.regression_lm import Params
from models.regression_lm_config import RegressionLMConfig


@functools.partial(
  jax.jit, static_argnames=("config", "param_dtype", "without")
)
def random(
  config: RegressionLMConfig,
  key: jax.Array,
  param_dtype: str | None = None,
  without: str | None = None,
) -> Params:
  """A nested dict of arrays, as `regression_lm.init` makes it.

  Args:
    config: of the model.
    key: of the draw.
    param_dtype: of all parameters; None for float32.
    without: a part that is left out, and so never made.
  """
  params = regression_lm.init(config, key, param_dtype)
  return {name: part for name, part in params.items() if name != without}
