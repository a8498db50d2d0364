import pytest

from models.errors import InputError
from models.numbers import P10, Ieee, Normalized
from research.regression_lm.options import Options


def test_formats_of_numbers_come_from_the_options():
  assert Options().number_format() == Ieee()
  assert Options(numbers="p10", mantissa_digits=3).number_format() == P10(
    digits=3
  )
  assert Options(numbers="normalized", base=16).number_format() == Normalized(
    base=16, digits=4
  )
  assert Options(special=True).number_format().special


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"numbers": "roman"}, "--numbers='roman'"),
    ({"base": 100}, "base=100"),
    ({"numbers": "p10", "mantissa_digits": 40}, "digits=40"),
    ({"numbers": "normalized", "mantissa_digits": 30}, "more steps"),
  ],
)
def test_formats_that_do_not_exist_are_told_at_once(changes, words):
  with pytest.raises(InputError, match=words):
    Options(**changes)


def test_only_sizes_that_are_given_differ():
  found = Options(d_model=64, encoder="mamba2").sizes()
  assert found == {"d_model": 64, "encoder": "mamba2"}


def test_weights_of_losses_decide_whether_a_grid_is_needed():
  assert not Options(z_loss=1e-4, dropout=0.1).loss().needs_grid
  assert Options(ranking=0.1).loss().needs_grid
