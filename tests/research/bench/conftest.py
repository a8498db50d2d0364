import jax
import pytest


@pytest.fixture(scope="module")
def quickly_compiled():
  """Nearly all of the time would go to optimizations of the compiler."""
  name = "jax_disable_most_optimizations"
  before = jax.config.values[name]
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)
