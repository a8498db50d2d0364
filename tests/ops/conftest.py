"""What the tests of ops share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
  """At these sizes it is what the tests wait for."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
