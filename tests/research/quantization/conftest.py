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
  """A config and parameters whose norms are not one, and which say much.

  NumPy draws the noise, since three programs a shape take seconds to compile.
  """
  config = GEMMA if name == "gemma" else CONFIGS[name]
  params = language_model.init(config, jax.random.key(0))
  generator = np.random.default_rng(1)

  def noisy(leaf):
    noise = np.exp(0.3 * generator.normal(size=leaf.shape))
    return jnp.asarray(np.asarray(leaf) * noise, leaf.dtype)

  return config, jax.tree.map(noisy, params)


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
