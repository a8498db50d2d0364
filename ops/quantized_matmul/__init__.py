"""Products of activations with weights of any format, or of none."""

from ops.quantized_matmul.api import quantized_matmul as quantized_matmul
from ops.quantized_matmul.reference import (
  quantized_matmul_reference as quantized_matmul_reference,
)
