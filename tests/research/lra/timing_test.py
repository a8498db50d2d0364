"""Times of models, and dense ones as large and as fast as FABNet."""

import pytest

from models.errors import InputError
from research.lra import architectures, timing
from research.lra.options import Options

OPTIONS = Options(length=16, d_model=16, d_ff=16, layers=1, batch=2, heads=2)


def test_a_row_a_case():
  model = architectures.variant(OPTIONS, "low_rank")
  rows = timing.measure(
    timing.cases({"thin": model}, [3]), OPTIONS, repeats=3, seconds=0.01
  )
  assert [(row["pass"], row["batch"]) for row in rows] == [
    ("update", 2),
    ("forward", 3),
  ]
  for row in rows:
    assert row["ms"] > 0
    assert row["sample_ms"] == row["ms"] / row["batch"]
    assert row["block_parameters"] == architectures.block_parameters(model)


@pytest.mark.parametrize("wanted", [5000, 17152])
def test_dense_ones_of_so_many_parameters(wanted):
  like = architectures.config(Options())
  found = architectures.dense_with_parameters(like, wanted, [2])
  assert found.fourier_layers == 0 and found.ffn == "dense"
  assert architectures.block_parameters(found) == pytest.approx(wanted, rel=0.3)
  assert found.max_length == like.max_length


def test_the_largest_that_is_as_fast():
  like = architectures.config(Options())
  family = {
    str(one.d_model): one
    for one in architectures.dense_family(like, [1], [8, 16, 32, 64])
  }
  times = {"fabnet": 2.0, "8": 1.0, "16": 1.5, "32": 2.01, "64": 4.0}
  rows = [
    {"model": name, "pass": "update", "ms": ms} for name, ms in times.items()
  ]
  assert timing.as_fast(rows, "fabnet", family) == "32"
  rows[0]["ms"] = 0.1
  assert timing.as_fast(rows, "fabnet", family) == "8"
  rows[0] |= {"ms": None, "error": "out of memory"}
  with pytest.raises(InputError, match="no update of fabnet .*out of memory"):
    timing.as_fast(rows, "fabnet", family)


@pytest.mark.parametrize("kind", ["low_rank", "block_diagonal"])
@pytest.mark.parametrize("task", ["listops", "text", "image"])
def test_other_ffns_have_the_parameters_of_butterflies(task, kind):
  ours, other = (
    architectures.block_parameters(
      architectures.config(Options(task=task, model=model))
    )
    for model in ("fabnet", kind)
  )
  assert other == pytest.approx(ours, rel=0.25)
