import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
  """At these sizes compiling is all the time there is."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
