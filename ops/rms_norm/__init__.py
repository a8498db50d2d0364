"""Root-mean-square norm, alone, with a gate, or after a residual sum."""

from ops.rms_norm.api import rms_norm as rms_norm
from ops.rms_norm.reference import rms_norm_reference as rms_norm_reference
