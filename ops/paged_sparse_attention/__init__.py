"""Attention of one token a row to the best pages of its cache.

`KINDS` names what a `PageSummary` can hold of a page's keys: "bounds", their
minima and maxima, or "moments", their means and standard deviations.
"""

from ops.paged_sparse_attention.api import (
  paged_sparse_attention as paged_sparse_attention,
)
from ops.paged_sparse_attention.reference import (
  paged_sparse_attention_reference as paged_sparse_attention_reference,
)
from ops.paged_sparse_attention.summary import KINDS as KINDS
from ops.paged_sparse_attention.summary import KeptPages as KeptPages
from ops.paged_sparse_attention.summary import PageSummary as PageSummary
from ops.paged_sparse_attention.summary import (
  last_page_summary as last_page_summary,
)
from ops.paged_sparse_attention.summary import page_summary as page_summary
from ops.paged_sparse_attention.summary import (
  update_page_summary as update_page_summary,
)
from ops.paged_sparse_attention.summary import (
  write_page_summary as write_page_summary,
)
