"""The flags of every script: `--help` lists them, and something uses them."""

import pytest

from tests import house_rules_test as rules
from tests.experiments import scripts


@pytest.fixture(scope="module")
def used():
  # The house rule, which reads sources, knows whose keyword it is.
  names, keywords = rules.flags_in_use(rules.ROOT)
  return names | {field for _, field in keywords}


@pytest.mark.parametrize("name", scripts.names())
def test_help_lists_every_flag_that_the_script_takes(name):
  with scripts.loaded(name) as (defined, listed):
    assert defined and defined <= listed, sorted(defined - listed)


@pytest.mark.parametrize("name", scripts.names())
def test_a_page_a_flagfile_or_a_test_uses_every_flag(name, used):
  with scripts.loaded(name) as (defined, _):
    assert defined <= used, sorted(defined - used)
