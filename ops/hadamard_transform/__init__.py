"""Rotations by Hadamard matrices, which spread outliers over all channels."""

from ops.hadamard_transform.api import hadamard_transform as hadamard_transform
from ops.hadamard_transform.matrices import factors as factors
from ops.hadamard_transform.matrices import hadamard_matrix as hadamard_matrix
from ops.hadamard_transform.reference import (
  hadamard_transform_reference as hadamard_transform_reference,
)
