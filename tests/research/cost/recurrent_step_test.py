"""Bytes of a step, against sums by hand."""

import jax
import jax.numpy as jnp

from models import mamba
from models.mamba_config import MambaConfig
from models.quantized import quantize_params
from models.state_format import StateFormat
from research.cost import recurrent_step


def work(config, form=None, state_format=None, rows=3):
  def params():
    made = mamba.init(config, jax.random.key(0), "bfloat16")
    return quantize_params(made, form) if form else made

  state = lambda: mamba.init_state(
    config,
    rows,
    dtype=jnp.bfloat16,
    state_format=state_format and StateFormat.parse(state_format),
  )
  return recurrent_step.least_work(
    jax.eval_shape(params), jax.eval_shape(state), rows
  )


def test_few_bits_are_few_bytes():
  c = MambaConfig.tiny("mamba2")
  wide, narrow, small = work(c), work(c, "int8"), work(c, None, "int8")
  features = c.d_inner + c.conv_channels + c.num_heads
  kernels = c.num_layers * c.d_model * (features + c.d_inner)
  # A scale of four bytes a column.
  scales = 4 * c.num_layers * (features + c.d_model)
  assert wide.bytes - narrow.bytes == kernels - scales
  blocks = 3 * c.num_layers * c.d_inner
  # Read and written, with a scale of two bytes a block.
  state = blocks * c.d_state * 4 - blocks * (c.d_state + 2)
  assert wide.bytes - small.bytes == 2 * state
  assert wide.flops == narrow.flops == 2 * 3 * mamba.num_params(c)


def test_a_table_counts_where_it_is_the_head():
  tied, own = (
    MambaConfig.tiny("mamba2", tie_embeddings=tied) for tied in (True, False)
  )
  assert work(tied) == work(own)
