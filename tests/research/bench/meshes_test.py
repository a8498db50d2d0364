import pytest

from models.errors import InputError
from research.bench import meshes


def test_an_update_on_a_mesh_is_a_row():
  case = meshes.Case.parse("tiny_transformer:4x16@fsdp:2,sequence:2")
  row = meshes.timed(case, dtype="float32", attention=None, updates=1)
  assert (row["batch"], row["length"], row["devices"]) == (4, 16, 4)
  assert row["mesh"] == "fsdp:2,sequence:2"
  assert row["ms"] > 0 and row["loss"] == row["loss"]
  # A model so small holds less than a mebibyte and some.
  assert 0 < row["gib_per_device"] < 0.1
  assert row["collectives"]["all-gather"] > 0


@pytest.mark.parametrize(
  "text",
  ["tiny_mamba2:4x16", "tiny_mamba2:4@data:1", "no_model:4x4@data:1",
   "tiny_mamba2:0x4@data:1"],
)  # fmt: skip
def test_cases_that_are_none_are_told(text):
  with pytest.raises(InputError, match="write MODEL:BxL@MESH"):
    meshes.Case.parse(text)
