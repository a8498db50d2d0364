import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig

CONFIGS = {
  "mamba1": MambaConfig.tiny("mamba1"),
  "mamba2": MambaConfig.tiny("mamba2", num_groups=2),
  "hybrid": MambaConfig.tiny("hybrid"),
  "transformer": TransformerConfig.tiny(),
}
# Of more than one kind of layer, for what differs there.
GEMMA = TransformerConfig.tiny_gemma()


def random_model(name):
  """A config and parameters whose norms are not one, and which say much."""
  config = GEMMA if name == "gemma" else CONFIGS[name]
  params = language_model.init(config, jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [
    leaf * jnp.exp(0.3 * jax.random.normal(key, leaf.shape))
    for leaf, key in zip(leaves, keys)
  ]
  return config, jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope="session", params=list(CONFIGS))
def model(request):
  return random_model(request.param)


@pytest.fixture(scope="session")
def mamba2():
  return random_model("mamba2")


@pytest.fixture(scope="session")
def batches():
  generator = np.random.default_rng(0)
  return generator.integers(0, 61, (2, 2, 32)).astype(np.int32)


def logits(config, params, batch):
  """Of one batch (B, T)."""
  return language_model.forward(config, params, jnp.asarray(batch))


def difference(first, second):
  """Relative, root mean square."""
  return float(jnp.linalg.norm(first - second) / jnp.linalg.norm(second))
