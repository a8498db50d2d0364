"""Ops of Frugax: arrays in, arrays out.

Sparsity and quantization of activations:
  fake_quantize: rounds each token to a symmetric grid of some bits and back.
  keep_top_channels: zeros all but the largest channels of each token.

Sparse attention:
  page_bounds: channel-wise minimum and maximum of every page of keys.
  page_scores: upper bounds of the attention logits of a page.
  select_pages: marks the best valid pages of a budget.
  sparse_attention: many rollouts over one shared prefix, by selected pages.
"""

from ops.fake_quantize import fake_quantize as fake_quantize
from ops.keep_top_channels import keep_top_channels as keep_top_channels
from ops.select_pages import page_bounds as page_bounds
from ops.select_pages import page_scores as page_scores
from ops.select_pages import select_pages as select_pages
from ops.sparse_attention import sparse_attention as sparse_attention
