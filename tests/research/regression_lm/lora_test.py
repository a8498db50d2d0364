import jax
import jax.numpy as jnp
import numpy as np

from models import regression_lm
from research.regression_lm import lora
from tests.research.regression_lm import toy


def test_adapters_begin_as_nothing_and_add_a_low_rank():
  model = toy.model(encoder_layers=2, decoder_layers=2)
  params = toy.params(model)
  adapters = lora.init(params, 2, jax.random.key(0))
  same = lora.merge(params, adapters, 2.0)
  assert jax.tree.structure(same) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, same, params)
  chosen = adapters["decoder"]["cross"]["q_proj"]["kernel"]
  b = chosen["b"] = jax.random.normal(jax.random.key(1), chosen["b"].shape)
  merged = lora.merge(params, adapters, 2.0)
  before, after = (
    np.asarray(p["decoder"]["cross"]["q_proj"]["kernel"])
    for p in (params, merged)
  )
  a = chosen["a"]
  for layer in range(2):
    change = after[layer] - before[layer]
    np.testing.assert_allclose(change, 2 * a[layer] @ b[layer], atol=1e-5)
    assert np.linalg.matrix_rank(change, tol=1e-4) == 2
  untouched = merged["encoder"]["mlp"]["up_proj"]["kernel"]
  np.testing.assert_array_equal(
    untouched, params["encoder"]["mlp"]["up_proj"]["kernel"]
  )


def test_every_matrix_of_the_layers_has_an_adapter_and_nothing_else():
  for encoder in ("transformer", "mamba2"):
    shapes = regression_lm.abstract_params(toy.model(encoder=encoder).config)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    adapters = lora.init(params, 3, jax.random.key(0))
    kernels = [
      jax.tree_util.keystr(path)
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      if path[0].key in ("encoder", "decoder") and path[-1].key == "kernel"
    ]
    adapted = {
      jax.tree_util.keystr(path[:-1])
      for path, _ in jax.tree_util.tree_leaves_with_path(adapters)
    }
    assert adapted == set(kernels)
    merged = lora.merge(params, adapters, 1.0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(merged))
