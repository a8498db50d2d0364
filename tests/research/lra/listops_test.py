"""ListOps: values, lengths and brackets of what is drawn and what is read."""

import numpy as np
import pytest

from models.errors import InputError
from research.lra import listops

SHAPE = listops.Shape(shorter_than=120, longer_than=30)
OPERATIONS = {
  "[MIN": min,
  "[MAX": max,
  "[MED": lambda values: int(np.median(values)),
  "[SM": lambda values: sum(values) % 10,
}


@pytest.fixture(scope="module")
def drawn():
  return listops.generate(3000, 1, SHAPE, batch=4000)


def value_of(words):
  """Evaluates an expression by a stack, as its definition says."""
  stack = [[]]
  for word in words:
    if word in OPERATIONS:
      stack.append([word])
    elif word == listops.CLOSE:
      operator, *values = stack.pop()
      stack[-1].append(OPERATIONS[operator](values))
    else:
      stack[-1].append(int(word))
  ((value,),) = stack
  return value


def test_values_are_those_of_the_text(drawn):
  tokens, lengths, values = drawn
  for row in range(400):
    words = listops.decode(tokens[row]).split()
    assert len(words) == lengths[row]
    assert value_of(words) == values[row]


def test_lengths_arguments_and_digits_are_as_the_benchmark_has_them(drawn):
  tokens, lengths, values = drawn
  assert lengths.min() > 30 and lengths.max() < 120
  assert len({row.tobytes() for row in tokens}) == len(tokens)
  digits = np.bincount(tokens[(tokens > 0) & (tokens <= 10)])[1:]
  assert digits / digits.sum() == pytest.approx(np.full(10, 0.1), abs=0.01)
  operators = np.bincount(tokens[(tokens > 10) & (tokens < 15)])[11:]
  assert operators / operators.sum() == pytest.approx(
    np.full(4, 0.25), abs=0.02
  )
  # Minima and maxima make 0 and 9 the commonest values.
  assert set(np.argsort(np.bincount(values))[-2:]) == {0, 9}


def test_the_same_seed_draws_the_same(drawn):
  again = listops.generate(300, 1, SHAPE, batch=4000)
  for one, other in zip(drawn, again):
    np.testing.assert_array_equal(one[:300], other)
  other = listops.generate(100, 2, SHAPE, batch=4000)
  assert (other[0] != drawn[0][:100]).any()


def test_brackets_survive_tokenization():
  text = "( ( ( ( [MAX 3 ) ( ( ( [SM 4 ) 9 ) X ) ) 1 ) ] )"
  tokens = listops.encode(text)
  assert listops.decode(tokens) == "[MAX 3 [SM 4 9 ] 1 ]"
  # The first public files held the words without brackets, as this one.
  with pytest.raises(InputError, match="is no word of ListOps"):
    listops.encode("MAX 3 SM 4 9 1", "basic_train.tsv line 2")
  with pytest.raises(InputError, match="brackets that open and do not close"):
    listops.encode("[MAX 3 [SM 4 9 1")


def test_too_few_expressions_are_said():
  shape = listops.Shape(shorter_than=6, longer_than=3, max_args=2)
  with pytest.raises(InputError, match="different expressions of 4 to 5"):
    listops.generate(10**5, 0, shape, batch=500)
