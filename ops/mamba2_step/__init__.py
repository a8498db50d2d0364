"""One token through a stack of Mamba-2 layers, for decoding."""

from ops.mamba2_step.api import Mamba2Weights as Mamba2Weights
from ops.mamba2_step.api import mamba2_step as mamba2_step
from ops.mamba2_step.reference import (
  mamba2_step_reference as mamba2_step_reference,
)
