"""Arrays of few bits: one table of formats, one tensor, one way in and out.

`FORMATS` is that table: a `Format` by its name.
"""

from ops.quantized.formats import FORMATS as FORMATS
from ops.quantized.formats import Format as Format
from ops.quantized.quantize import Percentile as Percentile
from ops.quantized.quantize import Searched as Searched
from ops.quantized.quantize import absmax as absmax
from ops.quantized.quantize import dequantize as dequantize
from ops.quantized.quantize import quantize as quantize
from ops.quantized.quantizer import Quantizer as Quantizer
from ops.quantized.reference import quantize_reference as quantize_reference
from ops.quantized.state import QState as QState
from ops.quantized.state import like as like
from ops.quantized.taps import Taps as Taps
from ops.quantized.taps import rounded as rounded
from ops.quantized.tensor import QTensor as QTensor
from ops.quantized.weight import QWeight as QWeight
from ops.quantized.weight import as_array as as_array
from ops.quantized.weight import is_quantized as is_quantized
