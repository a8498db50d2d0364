import re

import numpy as np

from research.regression_lm.kernelbench import made_up_programs


def test_programs_follow_from_the_seed():
  first = made_up_programs.programs(50, 0)
  assert first == made_up_programs.programs(50, 0)
  assert first != made_up_programs.programs(50, 1)
  times = np.array([ms for _, ms in first])
  # A launch at least, and sizes that differ.
  assert times.min() >= 5e-3 and times.max() > 10 * times.min()


def test_a_product_costs_what_a_roofline_says():
  for text, ms in made_up_programs.programs(200, 0):
    found = re.search(r"rand\((\d+), (\d+)\)\nB = torch.rand\(\d+, (\d+)", text)
    if found:
      m, k, n = map(int, found.groups())
      moved = 4 * (m * k + k * n + m * n) / 1.5e12
      assert ms == 1e3 * (5e-6 + max(2 * m * k * n / 3e13, moved))
