"""Where parameters and activations lie on eight devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import language_model, placement
from models.mamba_config import MambaConfig
from models.quantized import quantize_params
from models.transformer_config import TransformerConfig
from research.core import mesh as mesh_lib
from tests.models.quantized_test import random_params

_MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
  "function, shape, wanted",
  [
    (placement.rows, (8, 2, 6), P(("data", "fsdp"))),
    (placement.widths, (8, 2, 6), P(("data", "fsdp"), None, "tensor")),
    # Rows of rollouts: their own axis is not cut, the first one is.
    (placement.widths, (8, 4, 2, 6), P(("data", "fsdp"), None, None, "tensor")),
    (placement.heads, (8, 2, 4, 6), P(("data", "fsdp"), None, "tensor")),
    (
      placement.heads,
      (8, 4, 2, 4, 6),
      P(("data", "fsdp"), None, None, "tensor"),
    ),
    (placement.heads, (8, 4, 6), P()),
  ],
)
def test_activations_are_cut_by_rows_and_heads(function, shape, wanted):
  mesh = mesh_lib.make(_MESH)
  x = mesh_lib.replicate(mesh, np.zeros(shape, np.float32))
  found = jax.jit(mesh_lib.traced(mesh, function))(x).sharding
  wanted = jax.sharding.NamedSharding(mesh, wanted)
  assert found.is_equivalent_to(wanted, len(shape))


@functools.cache
def _quantized(name):
  config = {
    # One group of B and C.
    "mamba2": MambaConfig.tiny("mamba2", num_layers=1, vocab_multiple=1),
    "transformer": TransformerConfig.tiny(num_layers=1),
  }[name]
  params = quantize_params(random_params(config), "int4:8")
  return config, params


@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_quantized_matrices_are_cut_and_compute_the_same(name):
  config, params = _quantized(name)
  tokens = np.arange(4 * 8, dtype=np.int32).reshape(4, 8) % config.vocab_size

  def hidden(params, tokens):
    return language_model.hidden_states(config, params, tokens)

  wanted = jax.jit(hidden)(params, tokens)
  mesh = mesh_lib.make(_MESH)
  placed = mesh_lib.place(mesh, params)
  codes = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
    if jax.tree_util.keystr(path).endswith("kernel'].values")
  ]
  assert codes
  for leaf in codes:
    assert leaf.addressable_shards[0].data.size == leaf.size // 4
  many = jax.jit(mesh_lib.traced(mesh, hidden))(
    placed, mesh_lib.shard_batch(mesh, tokens)
  )
  np.testing.assert_allclose(many, wanted, rtol=2e-5, atol=2e-5)
