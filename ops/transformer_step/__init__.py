"""The next tokens through a stack of Transformer layers, for decoding."""

from ops.transformer_step.api import TransformerWeights as TransformerWeights
from ops.transformer_step.api import transformer_step as transformer_step
from ops.transformer_step.reference import (
  transformer_step_reference as transformer_step_reference,
)
