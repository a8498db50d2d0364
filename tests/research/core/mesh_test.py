import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from models.errors import InputError
from research.core import mesh, mesh_shape, processes


def test_the_mesh_has_one_auto_axis_named_data():
  made = mesh.data_mesh(1)
  assert made.axis_names == ("data",)
  assert made.axis_types == (AxisType.Auto,)
  assert made.size == 1
  assert mesh.data_mesh().size == jax.device_count()


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_an_impossible_number_of_devices_is_told(count):
  with pytest.raises(InputError, match=f"asks for {count} devices"):
    mesh.data_mesh(count)


def test_a_process_without_a_device_is_told(monkeypatch):
  monkeypatch.setattr(processes, "count", lambda: 3)
  devices = [
    types.SimpleNamespace(process_index=i // 4, platform="cpu")
    for i in range(12)
  ]
  with pytest.raises(InputError, match="process 2 has none of them") as error:
    mesh.make({"data": 4, "tensor": 2}, devices)
  assert "--mesh=data:4,tensor:2 takes 8 of 12 devices" in str(error.value)


def test_batches_are_split_and_trees_replicated():
  made = mesh.data_mesh()
  batch = {"x": np.arange(3 * made.size * 2).reshape(3 * made.size, 2)}
  placed = mesh.shard_batch(made, batch)["x"]
  assert placed.sharding == mesh.batch_sharding(made)
  assert {s.data.shape for s in placed.addressable_shards} == {(3, 2)}
  np.testing.assert_array_equal(placed, batch["x"])
  assert mesh.shard_batch(made, None) is None
  tree = mesh.replicate(made, {"k": jax.random.key(0), "n": np.float32(2)})
  assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))


def test_a_batch_without_a_leading_axis_is_told():
  with pytest.raises(InputError, match=r"\['x'\] of shape \(\)"):
    mesh.shard_batch(mesh.data_mesh(1), {"x": np.float32(1)})


def test_shapes_in_words_are_read():
  found = mesh_shape.parse("data:4, tensor:2")
  assert found == {"data": 4, "tensor": 2}
  assert mesh_shape.words(found) == "data:4,tensor:2"


@pytest.mark.parametrize(
  "text, says",
  [
    ("data:4,tenor:2", "there is no axis 'tenor'"),
    ("data:2,data:4", "data comes twice"),
    ("fsdp", "fsdp needs a number of devices, as in fsdp:2"),
    ("fsdp:0", "fsdp needs a number"),
    ("fsdp:-1", "fsdp needs a number"),
    ("", "there is no axis ''"),
  ],
)
def test_shapes_that_are_none_are_told(text, says):
  with pytest.raises(InputError, match=says) as error:
    mesh_shape.parse(text)
  assert "\n" not in str(error.value)
