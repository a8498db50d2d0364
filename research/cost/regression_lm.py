"""Floating-point operations in matrix products of regression LMs.

Counted is what every way of computing the model has to spend: products with
weights, and attention.
"""

from models.regression_lm_config import RegressionLMConfig


def encoder(config: RegressionLMConfig, length: int) -> float:
  """Of a forward pass over one text, the keys for the decoder included.

  Args:
    config: of the model.
    length: tokens of the text.
  """
  c = config
  layer = _layer(config, c.num_heads + c.num_kv_heads)
  layer += 4.0 * length * c.num_heads * c.head_dim
  keys = 4.0 * c.d_model * c.num_kv_heads * c.head_dim
  return length * (c.encoder_layers * layer + c.decoder_layers * keys)


def decoder(config: RegressionLMConfig, length: int) -> float:
  """Of one token of the numbers, mean over a number.

  Args:
    config: of the model.
    length: tokens of the text that it is given.
  """
  c = config
  # It attends to the numbers and to the text, whose keys are there already.
  layer = _layer(config, 2 * c.num_heads + c.num_kv_heads)
  layer += 4.0 * c.num_heads * c.head_dim * (length + c.target_length / 2)
  return c.decoder_layers * layer + 2.0 * c.d_model * c.target_vocab_size


def update(config: RegressionLMConfig, length: int) -> float:
  """Of an update, one text; the backward pass has twice the forward's."""
  numbers = config.target_length * decoder(config, length)
  return 3.0 * (encoder(config, length) + numbers)


def _layer(config: RegressionLMConfig, heads: int) -> float:
  """A token's products with the weights of a layer of so many pairs of heads.

  A head has two projections: of query and output, or of key and value.
  """
  c = config
  return 4.0 * c.d_model * c.head_dim * heads + 6.0 * c.d_model * c.d_ff
