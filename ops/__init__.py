"""Ops of Frugax: arrays in, arrays out.

Sparsity and quantization of activations:
  fake_quantize: rounds each token to a symmetric grid of some bits and back.
  keep_top_channels: zeros all but the largest channels of each token.

Numbers of few bits, in the formats of one table (`ops.quantized.FORMATS`):
  quantize: keeps an array as codes and scales, a `QTensor`.
  dequantize: the array that a QTensor stands for.
  hadamard_transform: rotates an axis, so that outliers are spread.
  quantized_matmul: activations times weights, each an array or a QTensor.

Sparse attention:
  page_bounds: channel-wise minimum and maximum of every page of keys.
  page_scores: upper bounds of the attention logits of a page.
  select_pages: marks the best valid pages of a budget.
  sparse_attention: many rollouts over one shared prefix, by selected pages.
  page_summary, update_page_summary: what is kept of the pages of a cache.
  last_page_summary, write_page_summary: the two halves of the latter.
  paged_sparse_attention: one token a row to the best pages, and to no other.

Attention to a compressed past:
  chunked_attention, chunked_attention_step: to a window of tokens, and to
    chunks in front of it.

Decoding of Transformers:
  transformer_step: the next tokens through whole layers, of stacked weights.

State-space models, each with a twin for the next few tokens:
  causal_conv1d, causal_conv1d_step: depthwise convolution over a sequence.
  selective_scan, selective_scan_step: Mamba-1's recurrence.
  ssd, ssd_step: Mamba-2's recurrence, as products of matrices in chunks.
  mamba2_step: one token through whole Mamba-2 layers, of stacked weights.

Structured matrices:
  butterfly_matmul: products with butterfly and Kaleidoscope matrices.
  fourier_mix: the real part of a Fourier transform over tokens and channels.
  monarch_matmul: products with two block-diagonal factors and a permutation.

Norms:
  rms_norm: root-mean-square norm, with a gate or after a residual sum.

Language models:
  token_logprob: log probability of tokens, without their logits in memory.
"""

from ops.butterfly_matmul import butterfly_matmul as butterfly_matmul
from ops.causal_conv1d import causal_conv1d as causal_conv1d
from ops.causal_conv1d import causal_conv1d_step as causal_conv1d_step
from ops.chunked_attention import chunked_attention as chunked_attention
from ops.chunked_attention import (
  chunked_attention_step as chunked_attention_step,
)
from ops.fake_quantize import fake_quantize as fake_quantize
from ops.fourier_mix import fourier_mix as fourier_mix
from ops.hadamard_transform import hadamard_transform as hadamard_transform
from ops.keep_top_channels import keep_top_channels as keep_top_channels
from ops.mamba2_step import Mamba2Weights as Mamba2Weights
from ops.mamba2_step import mamba2_step as mamba2_step
from ops.monarch_matmul import monarch_matmul as monarch_matmul
from ops.paged_sparse_attention import KeptPages as KeptPages
from ops.paged_sparse_attention import PageSummary as PageSummary
from ops.paged_sparse_attention import last_page_summary as last_page_summary
from ops.paged_sparse_attention import page_summary as page_summary
from ops.paged_sparse_attention import (
  paged_sparse_attention as paged_sparse_attention,
)
from ops.paged_sparse_attention import (
  update_page_summary as update_page_summary,
)
from ops.paged_sparse_attention import write_page_summary as write_page_summary
from ops.quantized import QTensor as QTensor
from ops.quantized import dequantize as dequantize
from ops.quantized import quantize as quantize
from ops.quantized_matmul import quantized_matmul as quantized_matmul
from ops.rms_norm import rms_norm as rms_norm
from ops.select_pages import page_bounds as page_bounds
from ops.select_pages import page_scores as page_scores
from ops.select_pages import select_pages as select_pages
from ops.selective_scan import selective_scan as selective_scan
from ops.selective_scan import selective_scan_step as selective_scan_step
from ops.sparse_attention import sparse_attention as sparse_attention
from ops.ssd import ssd as ssd
from ops.ssd import ssd_step as ssd_step
from ops.token_logprob import token_logprob as token_logprob
from ops.transformer_step import TransformerWeights as TransformerWeights
from ops.transformer_step import transformer_step as transformer_step
