"""Depthwise causal convolution over the tokens of a sequence."""

from ops.causal_conv1d.api import causal_conv1d as causal_conv1d
from ops.causal_conv1d.reference import (
  causal_conv1d_reference as causal_conv1d_reference,
)
from ops.causal_conv1d.step import causal_conv1d_step as causal_conv1d_step
