import jax
import jax.numpy as jnp

from models.mamba_config import MambaConfig
from research.bench.suites import language_model as bench


def test_the_error_of_decoding_sees_the_layers():
  config = MambaConfig.tiny(num_layers=2)
  params = bench._initial(config)
  without = jax.tree_util.tree_map_with_path(
    lambda path, leaf: 0 * leaf if "out_proj" in str(path) else leaf, params
  )
  exact = bench._logits(
    config,
    jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
    2,
    jnp.float32,
    "xla",
  )
  error = lambda params: (
    jnp.linalg.norm(
      bench._logits(config, params, 2, jnp.bfloat16, "xla") - exact
    )
    / jnp.linalg.norm(exact)
  )
  assert error(params) < 0.03
  assert error(without) > 0.3
