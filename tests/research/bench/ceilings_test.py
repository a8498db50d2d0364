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
