import numpy as np
import pytest

from models.errors import InputError
from research.quantization.measures import Sample, Seen, mean_of


def test_samples_give_weighted_means_and_exponentials():
  plain = Sample(values=np.array([1.0, 3.0]), weights=np.array([3.0, 1.0]))
  value, low, high = plain.interval()
  assert value == 1.5 and low == 1.0 and high == 3.0
  logs = Sample(values=np.log([2.0, 8.0]), is_log=True)
  assert logs.interval().value == pytest.approx(4.0)


def test_the_mean_of_models_is_taken_item_by_item():
  first, second = (
    Sample(values=np.array(values), weights=np.array([1.0, 2.0]))
    for values in ([1.0, -1.0], [-1.0, 1.0])
  )
  both = mean_of([first, second])
  np.testing.assert_array_equal(both.values, [0, 0])
  # What one model gains where the other loses leaves no spread.
  assert both.interval() == (0, 0, 0)
  with pytest.raises(InputError, match="other windows"):
    mean_of([first, Sample(values=np.zeros(3))])


def test_what_is_seen_comes_back_from_a_file():
  names = ("nll", "counts", "decoded", "drawn", "kept", "own")
  arrays = {name: np.full(2, i) for i, name in enumerate(names)}
  seen = Seen(**arrays, acc={"piqa": np.ones(3), "lambada": np.zeros(1)})
  again = Seen.of(seen.arrays())
  assert again.acc.keys() == seen.acc.keys()
  for name, array in seen.arrays().items():
    np.testing.assert_array_equal(again.arrays()[name], array)
