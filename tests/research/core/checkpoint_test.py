import asyncio
import gc
import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from research.core import checkpoint, mesh
from research.core.checkpoint import Checkpointer


def _tree(seed=0, width=4):
  key = jax.random.key(seed)
  return {
    "w": jax.random.normal(key, (3, width)),
    "half": jnp.arange(5, dtype=jnp.bfloat16),
    "step": jnp.int32(seed),
    "key": key,
    "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
    "nothing": None,
    "empty": jnp.zeros((0, 2)),
    "nested": ({"b": jnp.array([True, False])},),
  }


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert one.dtype == two.dtype
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
      one, two = jax.random.key_data(one), jax.random.key_data(two)
    np.testing.assert_array_equal(one, two)


def _array_file(folder):
  """The largest file Orbax wrote: the arrays themselves."""
  files = [p for p in (folder / "state").rglob("*") if p.is_file()]
  return max((p for p in files if p.parent.name == "d"), key=os.path.getsize)


def test_round_trip_is_bit_exact_and_keeps_keys(tmp_path):
  kept = Checkpointer(tmp_path)
  assert kept.restore_latest(_tree()) is None
  kept.save(7, _tree(1))
  step, back = kept.restore_latest(_tree())
  assert step == 7
  _assert_same(back, _tree(1))
  jax.random.normal(back["key"])


def test_restores_into_abstract_arrays_with_their_shardings(tmp_path):
  kept = Checkpointer(tmp_path)
  kept.save(1, _tree(2))
  sharding = mesh.replicated_sharding(mesh.data_mesh())
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _tree()
  )
  _, back = kept.restore_latest(abstract)
  _assert_same(back, _tree(2))
  assert back["w"].sharding == sharding
  _, plain = kept.restore_latest(jax.eval_shape(_tree))
  _assert_same(plain, _tree(2))


def test_only_the_newest_are_kept(tmp_path):
  kept = Checkpointer(tmp_path, keep=2)
  for step in (8, 9, 10):
    kept.save(step, _tree(step))
  assert kept.steps() == [9, 10]
  assert kept.restore_latest(_tree())[0] == 10


def test_a_step_is_never_overwritten_with_other_content(tmp_path):
  kept = Checkpointer(tmp_path)
  kept.save(1, _tree(1))
  kept.save(1, _tree(1))
  with pytest.raises(InputError, match="exists with other content"):
    kept.save(1, _tree(2))
  _assert_same(kept.restore_latest(_tree())[1], _tree(1))


def _truncate(folder):
  file = _array_file(folder)
  file.write_bytes(file.read_bytes()[:20])


def _flip_a_bit(folder):
  file = _array_file(folder)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 16
  file.write_bytes(data)


def _lose_arrays(folder):
  _array_file(folder).unlink()


def _lose_metadata(folder):
  (folder / "state" / "_CHECKPOINT_METADATA").unlink()


def _cut_manifest(folder):
  file = folder / "manifest.json"
  file.write_text(file.read_text()[:100])


def _lose_everything(folder):
  for file in sorted(folder.rglob("*"), reverse=True):
    file.unlink() if file.is_file() else file.rmdir()


def _other_tree(folder):
  file = folder / "manifest.json"
  manifest = json.loads(file.read_text())
  manifest["leaves"]["w"] = "float32[3, 5]"
  file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
  "damage",
  [
    _truncate,
    _flip_a_bit,
    _lose_arrays,
    _lose_metadata,
    _cut_manifest,
    _lose_everything,
    _other_tree,
  ],
)
def test_a_bad_newest_is_told_and_the_one_before_used(tmp_path, capfd, damage):
  kept = Checkpointer(tmp_path)
  kept.save(4, _tree(4))
  kept.save(8, _tree(8))
  damage(tmp_path / "8")
  step, back = kept.restore_latest(_tree())
  assert step == 4
  _assert_same(back, _tree(4))
  told = capfd.readouterr().err
  assert told.count("\n") == 1
  assert f"warning: checkpoint {tmp_path / '8'}: " in told
  assert "going on from step 4" in told
  assert (tmp_path / "8.unusable").is_dir()
  kept.save(8, _tree(8))
  _assert_same(kept.restore_latest(_tree())[1], _tree(8))
  assert capfd.readouterr().err == ""


def test_none_usable_is_an_input_error_and_nothing_is_moved(tmp_path):
  kept = Checkpointer(tmp_path)
  for step in (4, 8):
    kept.save(step, _tree(step))
    _truncate(tmp_path / str(step))
  with pytest.raises(InputError, match=r"no usable.*\(8: file .*--workdir"):
    kept.restore_latest(_tree())
  assert kept.steps() == [4, 8]


@pytest.mark.parametrize(
  "other, words",
  [
    ({"w": jnp.zeros((3, 5))}, r"w is float32\[3, 4\] in it and float32\[3, 5"),
    ({"w": jnp.zeros((3, 4), jnp.int32)}, r"w is float32.* and int32"),
    ({"key": jax.random.key}, r"key is key<fry>\[\] in it and key<rbg>"),
    ({"more": jnp.zeros(1)}, r"more is absent in it"),
  ],
)
def test_another_tree_is_an_input_error_that_names_it(tmp_path, other, words):
  kept = Checkpointer(tmp_path)
  kept.save(4, _tree(4))
  if "key" in other:
    other = {"key": jax.random.key(0, impl="rbg")}
  with pytest.raises(InputError, match=words) as error:
    kept.restore_latest(_tree() | other)
  assert str(tmp_path) in str(error.value)
  assert kept.steps() == [4]


def test_a_save_cut_by_a_kill_leaves_no_trace(tmp_path):
  kept = Checkpointer(tmp_path)
  kept.save(4, _tree(4))
  (tmp_path / ".8.0123abcd.draft" / "state").mkdir(parents=True)
  assert kept.restore_latest(_tree())[0] == 4
  kept.save(8, _tree(8))
  chex.assert_equal(sorted(p.name for p in tmp_path.iterdir()), ["4", "8"])


def test_a_full_disk_is_told_once(tmp_path, monkeypatch, caplog):
  async def write():
    raise ValueError("Failed to write 9 bytes: No space left on device")

  async def write_twice():
    both = [asyncio.ensure_future(write()) for _ in range(2)]
    await asyncio.sleep(0)
    await both[0]

  monkeypatch.setattr(
    checkpoint.ocp, "save", lambda *_: asyncio.run(write_twice())
  )
  with pytest.raises(OSError, match="No space left") as told:
    Checkpointer(tmp_path).save(1, {"x": jnp.ones(2)})
  assert told.value.filename == str(tmp_path / "1")
  # The second task is collected after the error that held it.
  del told
  gc.collect()
  assert not caplog.records


def test_signals_of_a_run_do_not_end_what_writes_its_checkpoint(monkeypatch):
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  names = (signal.SIGINT, signal.SIGTERM)
  before = {name: signal.getsignal(name) for name in names}
  try:
    checkpoint._on_cpu()
    for name in names:
      signal.raise_signal(name)
    assert [signal.getsignal(name) for name in names] == [signal.SIG_IGN] * 2
  finally:
    for name, handler in before.items():
      signal.signal(name, handler)


def test_many_processes_hold_one_leaf_of_a_restored_state_at_a_time(
  tmp_path, monkeypatch
):
  state = _tree()
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(3, state)
  told = []

  def from_writer(function):
    told.append(function())
    return told[-1]

  monkeypatch.setattr(checkpoint.mesh_lib, "is_spread", lambda _: True)
  monkeypatch.setattr(checkpoint.processes, "from_writer", from_writer)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda x: jax.device_put(x, device), state)
  step, restored = checkpointer.restore_latest(like)
  assert step == 3 and told[0] == 3
  assert len(told) == 1 + len(jax.tree.leaves(state))
  _assert_same(restored, state)
