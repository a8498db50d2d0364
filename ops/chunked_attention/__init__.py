"""Attention over compressed chunks of the past and a window of recent keys.

`UNUSED` is the end of a chunk slot that holds no chunk.
"""

from ops.chunked_attention.api import UNUSED as UNUSED
from ops.chunked_attention.api import chunked_attention as chunked_attention
from ops.chunked_attention.reference import (
  chunked_attention_reference as chunked_attention_reference,
)
from ops.chunked_attention.reference import (
  chunked_attention_step_reference as chunked_attention_step_reference,
)
from ops.chunked_attention.step import (
  chunked_attention_step as chunked_attention_step,
)
