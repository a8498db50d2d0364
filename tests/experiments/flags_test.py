"""The flags of every script: `--help` lists all that it takes."""

import pytest

from tests.experiments import scripts


@pytest.mark.parametrize("name", scripts.names())
def test_help_lists_every_flag_that_the_script_takes(name):
  with scripts.loaded(name) as (defined, listed):
    assert defined and defined <= listed, sorted(defined - listed)
