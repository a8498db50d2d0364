"""Tables of whole evaluations: equal costs, seeds, and no refresh."""

import pytest

from research.results import quality
from tests.research.sol.result_rows_test import ASKED, comparison, rows_of


@pytest.fixture(scope="module")
def rows():
  again = comparison(oracles={}, static={}, trials=[])
  rows = rows_of(comparison(without_refresh=again))
  return [row | {"data": "text", "preset": "x"} for row in rows]


@pytest.fixture(scope="module")
def text(rows):
  return quality.table(rows)


def lines_of(text, first):
  """Cells of the lines that begin with `first`."""
  lines = [line.strip("| ").split("|") for line in text.splitlines()]
  return [
    [cell.strip() for cell in rest]
    for name, *rest in lines
    if name.strip() == first and rest
  ]


def test_the_refresh_stands_beside_the_costs(text):
  assert "refresh is a dense replay of every 8 tokens" in text
  (without,), (charged,) = (
    lines_of(text, f"SOL policy: {title}")
    for title in ("flops, bytes", "with refresh")
  )
  assert len(without) == len(ASKED)
  for one, other in zip(without, charged, strict=True):
    plain, more = ([float(x) for x in cell.split(",")] for cell in (one, other))
    assert more[0] > plain[0] + 0.5 and more[1] > plain[1]
  assert "lacks" not in text


def test_policies_are_compared_at_equal_costs(text):
  cells = {line[0]: line[1:] for line in lines_of(text, "fixed")}
  assert {"equal FLOPs", "equal bytes"} < cells.keys()
  assert "equal bytes, refresh charged" in cells
  assert float(cells["equal FLOPs"][0].split()[0]) < 0


def test_seeds_have_a_line_a_baseline(text):
  ((first, second),) = lines_of(text, "SOL policy minus fixed")
  assert first == "-0.3500 (-0.4000 to -0.3000)"
  assert second == "-0.2500 (-0.3000 to -0.2000)"


def test_seeds_leave_out_what_does_not_reach_every_net_keep(rows):
  seeds = [row for row in rows if row["role"] == "seeds"]
  far = seeds[-1] | {"method": "SOL policy minus a far one"}
  text = quality.table([*rows, far])
  assert "SOL policy minus fixed" in text and "a far one" not in text


def test_without_a_refresh_there_is_a_table_of_its_own(rows, text):
  assert "without a refresh" not in text
  after = quality.without_refresh(rows)
  assert after.startswith("toy on text, 64 tokens, dense perplexity")
  (cells,) = lines_of(after, "fixed")
  assert cells[0].endswith("(net keep 0.500, FLOPs 0.500, bytes 0.500)")
