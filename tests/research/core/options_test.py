"""Options that files tell."""

import dataclasses

import pytest

from models.errors import InputError
from research.core.options import from_json, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
  layers: int = option(2, "of the model", lower=1, upper=9)
  rate: float = option(0.1, "of updates", lower=0.0)
  fast: bool = option(False, "or slow")
  form: str | None = option(None, "of it", choices=("a", "b"))
  name: str | None = option(None, "of it")


def test_values_that_do_as_flags_are_taken():
  values = {"layers": 3, "rate": 1, "fast": True, "form": "b", "name": None}
  assert from_json(_Options, values) == _Options(**values)
  assert from_json(_Options, {}) == _Options()


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("layers", 0), ("layers", 10), ("layers", 2.0), ("layers", True),
    ("layers", None), ("rate", -1), ("rate", float("nan")), ("rate", "1"),
    ("fast", 1), ("form", "c"), ("form", ["a"]), ("name", 5),
    ("name", ["[" * 9000]),
  ],
)  # fmt: skip
def test_other_values_are_one_short_line(name, value):
  with pytest.raises(InputError, match=f"{name}=.* is no value") as caught:
    from_json(_Options, {name: value})
  assert len(str(caught.value)) < 120


def test_unknown_names_are_told():
  with pytest.raises(InputError, match="'x' is no option of _Options"):
    from_json(_Options, {"x": 1})
