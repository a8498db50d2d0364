"""The suite of SOL: floors against counts by hand, and its choices."""

import pytest

from models.errors import InputError
from research.bench import ceilings, plan, specs
from research.bench.suites import sol
from research.cost.roofline import Ceilings

WINDOWS, GROUP, HORIZON, CONTEXT = 2, 3, 4, 16
TOKENS = WINDOWS * GROUP * HORIZON


@pytest.fixture(scope="module")
def ran():
  """Rows, notes and closing lines of options, each row timed once."""

  def run(**options):
    sizes = {"model": "random:tiny", "preset": ["Q5Q16"], "context": CONTEXT}
    sizes |= {"horizon": HORIZON, "windows": WINDOWS, "group_size": GROUP}
    suite, chosen, notes = (
      sol.Suite(**sizes | options),
      plan.Plan(repeats=1),
      [],
    )
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(ceilings, "measure", lambda dtype: Ceilings(1e11, 1e10))
      cases = suite.cases(chosen, notes.append)
      rows = list(plan.run(cases, chosen, print, notes.append))
    return rows, notes, list(suite.closing(rows))

  return run


@pytest.fixture(scope="module")
def rows(ran):
  rows, notes, closing = ran()
  assert notes == closing == []
  return {row["op"]: row for row in rows}


def test_all_rows_are_timed_and_compiled_once(rows):
  assert list(rows) == [
    "prefill",
    "prefill+stats",
    "scan/uniform",
    "scan/policy",
    "block",
    "grpo_update",
  ]
  for row in rows.values():
    assert row["compiles"] == 1, row["op"]
    backward = row["op"].endswith("_update")
    assert row["pass"] == ("fwd+bwd" if backward else "fwd")
    assert row["dtype"] == "float32" and row["preset"] == "Q5Q16"
    assert row["model"] == "random:tiny"


def test_rates_and_shares_follow_from_the_times(rows):
  for name, row in rows.items():
    tokens = WINDOWS * CONTEXT if name.startswith("prefill") else TOKENS
    seconds = row["ms"] / 1e3
    assert seconds > 0
    assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])
    products = row["gflop"] / row["peak_tflops"]
    assert row["floor_products_ms"] == pytest.approx(products)
    assert row["floor_ms"] >= products * (1 - 1e-9)


def test_operations_are_those_of_the_matrix_products(rows):
  # The tiny shape: V 64, L 2, D 32, F 48, H 4, N 2, K 8.
  layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48
  head = 64 * 32
  seen = sum(CONTEXT + t + 1 for t in range(HORIZON))
  products = 2 * 2 * 4 * 8  # q k^T and its product with v, in two layers
  steps = 2 * TOKENS * (2 * layer + head)
  steps += 2 * WINDOWS * GROUP * products * seen
  assert rows["scan/uniform"]["gflop"] * 1e9 == pytest.approx(steps)
  assert rows["block"]["gflop"] * 1e9 == pytest.approx(steps)

  read = 2 * CONTEXT * 2 * layer + 2 * products * CONTEXT * (CONTEXT + 1) / 2
  prefill = rows["prefill"]["gflop"] * 1e9
  assert prefill == pytest.approx(WINDOWS * read)
  with_head = rows["prefill+stats"]["gflop"] * 1e9 - prefill
  assert with_head == pytest.approx(2 * WINDOWS * CONTEXT * head)


def test_bytes_are_weights_a_step_and_each_cache_once(rows):
  layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 48
  weights = 4 * (2 * layer + 64 * 32)
  token = 4 * 2 * 2 * 2 * 8  # keys and values of two layers, two heads
  row = rows["scan/uniform"]
  flop = row["gflop"] * 1e9 / HORIZON / (row["peak_tflops"] * 1e12)
  floor = 0.0
  for t in range(HORIZON):
    cached = token * (WINDOWS * CONTEXT + WINDOWS * GROUP * (t + 1))
    floor += max(flop, (weights + cached) / (row["peak_gb_per_s"] * 1e9))
  assert row["floor_ms"] == pytest.approx(1e3 * floor, rel=0.02)


def test_parts_are_left_out_and_rows_chosen(ran):
  names = ("scan/dense/headless", "scan/dense/headless/one_layer")
  options = {"dtype": ["bfloat16"], "matmul_precision": ["default"]}
  rows, notes, closing = ran(breakdown=True, only=names, **options)
  assert [row["op"] for row in rows] == list(names)
  assert [row["compiles"] for row in rows] == [1, 1]
  assert rows[0]["gflop"] > rows[1]["gflop"]
  (line,) = closing
  assert line.startswith("one layer of one step, Q5Q16: ")
  assert notes == []


def test_out_of_time_says_what_is_missing(ran):
  rows, notes, _ = ran(only=["block"], seconds=1e-9)
  assert rows == []
  assert notes == ["block of Q5Q16, float32, is left out: out of time"]


def test_precisions_pair_with_dtypes():
  three = ["highest", "tensorfloat32", "default"]
  assert specs.pair(["float32"], three) == [("float32", p) for p in three]
  assert specs.pair(["float32", "bfloat16"], ["highest", "default"]) == [
    ("float32", "highest"),
    ("bfloat16", "default"),
  ]
  with pytest.raises(InputError, match="2 values of dtype"):
    specs.pair(["float32", "bfloat16"], three)


@pytest.mark.parametrize(
  "options, part",
  [
    ({"dtype": ["float8"]}, "bfloat16, float32"),
    ({"matmul_precision": ["high"]}, "tensorfloat32"),
    ({"model": "random:none"}, "random:smollm2_135m"),
    ({"only": ["nothing"]}, "scan/uniform"),
    ({"preset": ["none"]}, "J-FL"),
  ],
)
def test_bad_input_says_what_is_valid(ran, options, part):
  with pytest.raises(InputError, match=part):
    ran(**options)
