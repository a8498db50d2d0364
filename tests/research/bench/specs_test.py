"""Names that stand apart from what they name are those that there are."""

import pytest

from models import language_model
from models.errors import InputError
from research.bench import specs
from research.bench.suites.op_cases import BUILDERS


def test_names_are_those_of_what_needs_jax():
  assert tuple(BUILDERS) == specs.OPS
  assert set(language_model.FAMILIES) == set(specs.CONFIGS)


def test_a_suite_without_names_takes_any():
  specs.check("sol", {"dtype": ["float32"]})
  specs.check("ops", {"shapes": ["ssd=tiny:2x64"], "unknown": 1})
  with pytest.raises(InputError, match="^shapes=sdd: take from selective_scan"):
    specs.check("ops", {"shapes": ["sdd=tiny:2x64"]})
