import jax
import pytest

from research.bench import ceilings
from research.cost import devices


def test_what_is_not_in_the_table_is_measured(monkeypatch):
  asked = []
  monkeypatch.setattr(
    ceilings, "measure", lambda *a: asked.append(a) or "found"
  )
  assert devices.ceilings("cpu", "float32") is None
  assert ceilings.find("float32") == ("found", "measured")
  assert len(asked) == 1


def test_the_rate_of_memory_is_the_best_of_copies_and_reads(monkeypatch):
  seconds = iter([0.5, 0.1, 0.04, 0.08])
  called = []

  def seconds_of(call, **options):
    arguments = () if call.inputs is None else call.inputs()
    found = jax.tree.leaves(call.start(*arguments))
    called.append([out.shape for out in found])
    return next(seconds)

  monkeypatch.setattr(ceilings, "seconds_of", seconds_of)
  found = ceilings.measure("float32")
  # A product, and 2^27 bytes that are copied, added up and multiplied.
  assert found.flops == pytest.approx(2 * 1024**3 / 0.5)
  assert found.bytes == pytest.approx(max(2 / 0.1, 1 / 0.04, 1 / 0.08) * 2**27)
  rows = 2**27 // (2 * 4096)
  assert called == [[(1024, 1024)], [(2**25,)], [(rows,)], [(rows, 1)]]
