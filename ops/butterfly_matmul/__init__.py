"""Products with butterfly matrices: O(n log n) parameters and operations."""

from ops.butterfly_matmul.api import butterfly_matmul as butterfly_matmul
from ops.butterfly_matmul.reference import (
  butterfly_matmul_reference as butterfly_matmul_reference,
)
from ops.butterfly_matmul.twiddles import bit_reversal as bit_reversal
from ops.butterfly_matmul.twiddles import fft_twiddle as fft_twiddle
from ops.butterfly_matmul.twiddles import init_twiddle as init_twiddle
from ops.butterfly_matmul.twiddles import padded_size as padded_size
from ops.butterfly_matmul.twiddles import twiddle_shape as twiddle_shape
