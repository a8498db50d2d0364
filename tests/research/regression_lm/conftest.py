import pytest


@pytest.fixture(scope="session", autouse=True)
def everywhere(drawn_leaf_by_leaf):
  """What all tests of this folder run under."""
