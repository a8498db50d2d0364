import jax
import pytest

from models.errors import InputError
from research.bench import mesh_runs, mesh_work, profiling
from research.bench.mesh_cases import Case
from research.core import mesh as mesh_lib


def _rows(*texts, left=lambda: 1.0):
  begun = []
  found = mesh_runs.rows(
    [Case.parse(text) for text in texts],
    dtype="float32",
    attention=None,
    seconds=0.01,
    updates=2,
    left=left,
    begin=lambda case: begun.append(case.text),
  )
  return [(case.text, row) for case, row in found], begun


def test_updates_and_ops_on_meshes_are_rows():
  texts = (
    "tiny_transformer:4x16@fsdp:2,sequence:2",
    "long.ssd=2x16x8:1x32@sequence:2",
    "long.attention=2x16:1x32@sequence:4",
  )
  found, begun = _rows(*texts)
  assert [text for text, _ in found] == begun == [*texts]
  update, scan, ring = (row for _, row in found)
  assert (update["batch"], update["length"], update["devices"]) == (4, 16, 4)
  assert update["mesh"] == "fsdp:2,sequence:2" and update["group"] == "lm"
  assert update["ms"] > 0 and update["loss"] == update["loss"]
  # A model so small holds less than a mebibyte and some.
  assert 0 < update["gib_per_device"] < 0.1
  assert update["collectives"]["all-gather"] > 0
  # States go around once, keys with each device but the last.
  assert scan["collectives"]["all-gather"] == 1
  assert ring["collectives"]["collective-permute"] > 0
  assert scan["group"] == ring["group"] == "long"
  assert ring["tokens_per_second"] == pytest.approx(32e3 / ring["ms"])


@pytest.mark.parametrize(
  "text, tokens",
  # Groups of two rollouts of an episode of eight tokens.
  [("rlm=32/1+1:4x16@data:2", 64), ("sol=tiny_transformer:2x32@data:2", 32)],
)
def test_updates_of_other_trainers_are_traced(text, tokens):
  case = Case.parse(text)
  mesh = mesh_lib.make(case.shape)
  work = mesh_work.of(case, mesh, "float32", None)
  state, metrics = jax.eval_shape(work.function, *work.shapes)
  assert "grad_norm" in metrics and work.tokens == tokens
  shape_of = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shape_of(state) == shape_of(work.shapes[0])
  rows = jax.tree.leaves(work.shapes[1])
  assert all(
    x.sharding.shard_shape(x.shape)[0] == case.batch // 2 for x in rows
  )


def test_what_fails_is_a_row_and_what_has_no_time_is_none(monkeypatch):
  def broken(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: 300 GiB")

  monkeypatch.setattr(mesh_runs.meshes, "Timing", broken)
  text = "weak.lm=tiny_transformer:4x16@data:2"
  ((_, row),), _ = _rows(text)
  assert row["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: 300 GiB"
  assert (row["group"], row["case"]) == ("weak", text)
  found, begun = _rows(text, left=lambda: 0.0)
  assert found == [(text, None)] and not begun


@pytest.mark.parametrize(
  "text, told",
  [
    ("tiny_mamba2:4x16", "write MODEL:BxL@MESH"),
    ("tiny_mamba2:4@data:1", "write MODEL:BxL@MESH"),
    ("tiny_mamba2:0x4@data:1", "write MODEL:BxL@MESH"),
    ("what=2x16:1x64@data:1", "write MODEL:BxL@MESH"),
    ("ssd=2x16:1x64@data:1", "as in ssd=64x64x128:1x262144"),
    ("no_model:4x4@data:1", "no model 'no_model'.*or ARCH/PRESET"),
    ("mamba2/no:4x4@data:1", "no model 'mamba2/no'"),
    ("sol=tiny_mamba2:4x32@data:1", "no model 'tiny_mamba2'"),
    ("tiny_mamba2:4x16@what:1", "there is no axis 'what'"),
  ],
)
def test_cases_that_are_none_are_told(text, told):
  with pytest.raises(InputError, match=told):
    Case.parse(text)


def test_what_is_sent_and_not_hidden_is_read_from_a_trace():
  million = 1e6  # Nanoseconds of a millisecond.
  span = lambda name, begin, end: (name, begin * million, end * million)
  first = [
    span("fusion_3", 0, 4),
    span("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 2, 7),
    span("ncclDevKernel_AllGather_RING_LL(x)", 6, 8),
    span("gemm", 9, 10),
  ]
  second = [
    span("MemcpyP2P", 0, 1),
    span("fused_all_reduce_input", 0, 9),
    span("all_reduce_kernel", 9, 10),
  ]
  found = profiling.sent([first, second], calls=2)
  # Sums over two calls and two devices.
  assert found["collective_ms"] == pytest.approx((6 + 2) / 4)
  assert found["exposed_ms"] == pytest.approx((4 + 1) / 4)
  assert found["busy_ms"] == pytest.approx((9 + 10) / 4)
  kinds = found["collective_kinds"]
  assert kinds["AllReduce"] == pytest.approx(5 / 4)
  assert kinds["AllGather"] == pytest.approx(2 / 4)
  assert kinds["MemcpyP2P"] == kinds["all_reduce"] == pytest.approx(1 / 4)
