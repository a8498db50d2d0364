import pytest

from research.regression_lm.kernelbench.program_text import canonical

PROGRAM = '''
import torch
import torch.nn as nn

class Model(nn.Module):
  """Says much."""

  def __init__(self, wide: int, depth: int = 2, **more):
    """Says more."""
    super(Model, self).__init__()
    self.layer = nn.Linear(wide, 2 * wide)  # a comment
    self.depth = depth

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    hidden = self.layer(x)
    return hidden * self.depth

rows, wide = 4, 16
shape = (wide,)

def get_inputs():
  return [torch.rand(rows, *shape)]

def get_init_inputs():
  return [wide]
'''


def test_constants_stand_where_they_are_used():
  text = canonical(PROGRAM)
  assert text.splitlines() == [
    "inputs 2^6",
    "return [torch.rand(4, 16)]",
    "Model",
    "self.layer = nn.Linear(16, 32)",
    "self.depth = 2",
    "forward x",
    "hidden = self.layer(x)",
    "return hidden * self.depth",
  ]


def test_a_name_that_changes_is_no_constant():
  code = "n = 2\nn = 3\ndef get_inputs():\n  return [torch.rand(n, 4)]"
  assert "torch.rand(n, 4)" in canonical(code)


def test_names_change_with_the_number_alone():
  own, first = canonical(PROGRAM), canonical(PROGRAM, 1)
  assert first == canonical(PROGRAM, 1) != canonical(PROGRAM, 2)
  assert "hidden" in own and "hidden" not in first and "layer" not in first
  assert "nn.Linear(16, 32)" in first and "forward x" in first
  # One name everywhere.
  (new,) = {
    line.split(" = ")[0] for line in first.splitlines() if "Linear" in line
  }
  assert f"{new}(x)" in first


@pytest.mark.parametrize("code", ["def", "\0", "", "x = " + "(" * 300])
def test_what_is_no_program_does_no_harm(code):
  assert isinstance(canonical(code), str)


def test_nothing_is_run():
  bomb = "n = 9 ** 9 ** 9\nm = [0] * 10 ** 9\nk = 1 / 0\n" + PROGRAM
  assert "nn.Linear(16, 32)" in canonical(bomb)
