import gzip
import json

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import public_sets, splits, tables

CSV = """kind,width,depth,score,seconds
conv,16,2,0.5,1.0
conv,32,2,0.6,
dense,16,3,,
dense,64,1,0.7,4e-3
"""


@pytest.fixture
def csv_file(tmp_path):
  path = tmp_path / "runs.csv"
  path.write_text(CSV)
  return path


def test_csv_columns_become_text_features_and_targets(csv_file):
  found = tables.read_csv(csv_file, ["score", "seconds"])
  assert found.texts == [
    "kind: conv, width: 16, depth: 2",
    "kind: conv, width: 32, depth: 2",
    "kind: dense, width: 64, depth: 1",
  ]
  np.testing.assert_array_equal(
    found.values, [[0.5, 1.0], [0.6, np.nan], [0.7, 4e-3]]
  )
  assert found.feature_names == [
    "kind = conv",
    "kind = dense",
    "width",
    "depth",
  ]
  np.testing.assert_array_equal(
    found.features, [[1, 0, 16, 2], [1, 0, 32, 2], [0, 1, 64, 1]]
  )
  examples = found.examples(np.array([1, 2]))
  assert examples[0].y == [0.6, None] and examples[1].y == [0.7, 4e-3]


def test_csv_with_a_column_of_texts_and_groups(csv_file):
  found = tables.read_csv(
    csv_file, ["score"], tables.Layout(text="kind", group="depth")
  )
  assert found.texts == ["conv", "conv", "dense"]
  assert found.groups == ["2", "2", "1"] and found.features.shape == (3, 0)


BESIDE = """lr,code,opt,id,ms
0.10,"a = 1
b",adam,7,1.5
NA,"c, d",sgd,8,2
"""


def test_columns_stand_in_front_of_a_column_of_texts(tmp_path):
  (tmp_path / "a.csv").write_text(BESIDE)
  layout = tables.Layout(text="code", columns=("opt", "lr", "code"))
  found = tables.read_csv(tmp_path / "a.csv", ["ms"], layout)
  assert found.texts == [
    "opt: adam, lr: 0.10\na = 1\nb", "opt: sgd, lr: NA\nc, d"
  ]  # fmt: skip
  assert found.words == ["a = 1\nb", "c, d"]
  assert found.columns == ["opt", "lr"]
  assert found.feature_names == ["opt = adam", "opt = sgd", "lr"]
  np.testing.assert_array_equal(found.features, [[1, 0, 0.1], [0, 1, np.nan]])
  assert found.notes == ["not read: id; --columns names more"]
  # JSON lines say the same, with the digits that stand there.
  lines = [
    '{"lr": 0.10, "code": "a = 1\\nb", "opt": "adam", "ms": 1.5}',
    '{"lr": "NA", "code": "c, d", "opt": "sgd", "ms": 2}',
  ]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  same = tables.read_jsonl(tmp_path / "a.jsonl", ["ms"], layout)
  assert same.texts == found.texts and same.words == found.words
  np.testing.assert_array_equal(same.features, found.features)
  np.testing.assert_array_equal(same.values, found.values)
  for line, words in [
    ('{"code": "x", "opt": "adam", "ms": 1}', "line 1: has no 'lr', but"),
    ('{"code": "x", "opt": [1], "lr": 1, "ms": 1}', "opt is .1.: write a"),
  ]:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(InputError, match=words):
      tables.read_jsonl(tmp_path / "a.jsonl", ["ms"], layout)


def test_jsonl_packed_and_plain(tmp_path):
  rows = [{"x": "a\nb", "y": 1}, {"x": "c", "y": None}, {"x": "d", "y": 2.5}]
  text = "\n".join(map(json.dumps, rows)) + "\n\n"
  (tmp_path / "a.jsonl").write_text(text)
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
  for name in ("a.jsonl", "a.jsonl.gz"):
    found = tables.read_jsonl(tmp_path / name, ["y"])
    assert found.texts == ["a\nb", "d"]
    assert found.values.tolist() == [[1.0], [2.5]]


@pytest.mark.parametrize(
  "content, words",
  [
    ("", "no row below"),
    ("a,b\n", "no row below"),
    ("a,score\n1\n", "line 2: has 1 cells, the heading 2"),
    ("a,score\n1,2,3\n", "line 2: has 3 cells, the heading 2"),
    ("a,score\n1,fast\n", "line 2: score is 'fast'"),
    ("a,b\n1,2\n", "has no target 'score', but a, b"),
    ("a,score\n1,\n", "no row has a target"),
  ],
)
def test_csv_mistakes_are_one_line(tmp_path, content, words):
  (tmp_path / "a.csv").write_text(content)
  with pytest.raises(InputError, match=words) as caught:
    tables.read_csv(tmp_path / "a.csv", ["score"])
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "content, words",
  [
    ("[1]\n", "line 1: is no JSON object"),
    ('{"x": "a", "y": 1}\n{"x": ', "line 2: is no JSON object"),
    ('{"z": "a", "y": 1}\n', "line 1: has no text 'x', but z, y"),
    ('{"x": "a", "y": "b"}\n', "line 1: y is 'b'"),
    ('{"x": "a", "y": [1]}\n', r"line 1: y is \[1\]"),
    ("", "has no row"),
  ],
)
def test_jsonl_mistakes_are_one_line(tmp_path, content, words):
  (tmp_path / "a.jsonl").write_text(content)
  with pytest.raises(InputError, match=words):
    tables.read_jsonl(tmp_path / "a.jsonl", ["y"])


def test_files_that_cannot_be_read(tmp_path):
  (tmp_path / "latin.csv").write_bytes(b"a,b\n\xff,1\n")
  (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(CSV.encode())[:-9])
  for name, words in [
    ("none.csv", "no such file"),
    ("latin.csv", "not UTF-8"),
    ("cut.csv.gz", "cut short"),
  ]:
    with pytest.raises(InputError, match=words):
      tables.read_csv(tmp_path / name, ["b"])
  with pytest.raises(InputError, match="at least one column"):
    (tmp_path / "ok.csv").write_text(CSV)
    tables.read_csv(tmp_path / "ok.csv", [])


def table(rows, groups):
  return tables.Table(
    texts=[str(i) for i in range(rows)],
    values=np.zeros((rows, 1)),
    targets=["y"],
    groups=[str(i % groups) for i in range(rows)],
    features=np.zeros((rows, 0)),
  )


def test_splits_are_disjoint_whole_and_seeded():
  made = table(100, 100)
  parts = splits.split(made, train=0.6, valid=10, seed=1)
  assert [len(p) for p in (parts.train, parts.valid, parts.test)] == [
    60,
    10,
    30,
  ]
  rows = np.concatenate([parts.train, parts.valid, parts.test])
  assert sorted(rows) == list(range(100))
  again = splits.split(made, train=0.6, valid=10, seed=1)
  np.testing.assert_array_equal(parts.train, again.train)
  other = splits.split(made, train=0.6, valid=10, seed=2)
  assert set(other.train) != set(parts.train)
  assert len(splits.split(made, train=5, valid=0, seed=0, test=7).test) == 7
  with pytest.raises(InputError, match="100 rows cannot be cut"):
    splits.split(made, train=95, valid=5, seed=0)


def test_groups_stay_together():
  made = table(90, 9)
  parts = splits.split(made, train=5, valid=2, seed=3, by_group=True)
  groups = [
    {made.groups[i] for i in part}
    for part in (parts.train, parts.valid, parts.test)
  ]
  assert [len(g) for g in groups] == [5, 2, 2]
  assert not groups[0] & groups[1] and not groups[0] & groups[2]
  assert len(parts.train) == 50


def test_cells_of_nasbench201(tmp_path):
  cell = (
    "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|"
    "none~2|"
  )
  empty = cell.replace("avg_pool_3x3", "none").replace("nor_conv_1x1", "none")
  rows = [["arch_str", "acc"], [cell, "91.5"], [empty, ""], [empty, "10"]]
  path = tmp_path / "nb.csv"
  path.write_text("\n".join(map(",".join, rows)) + "\n")
  found = public_sets.nasbench201(path, ["acc"])
  assert found.values.tolist() == [[91.5], [10.0]]
  # Features follow the rows that are kept, of which the empty one is second.
  # 2 paths; 3 live operations, 2 paths and 2 convolutions on one of them.
  assert found.features.sum(1).tolist() == [2 + 3 + 2 + 2, 0]
  assert found.texts[0] == (
    "depth 2 skip 0 point 1 conv 1 pool 1 paths 2 conv point ; pool"
  )
  assert found.texts[1] == ("depth 0 skip 0 point 0 conv 0 pool 0 paths 0")
  for bad in ("", "|none~0|", cell.replace("none", "conv9")):
    with pytest.raises(InputError, match="no cell of NAS-Bench-201"):
      path.write_text(f"arch_str,acc\n{bad},1\n")
      public_sets.nasbench201(path, ["acc"])


def test_kernelbench_joins_programs_with_timings(tmp_path):
  sources = [{"src": "a", "code": "import torch"}]
  timings = (
    "src,level,name,run,hardware,mode,mean_ms\n"
    "a,level1,1.py,r,H100,torch,2.5\n"
    "a,level1,1.py,r,L4,torch,9\n"
  )
  text = "\n".join(map(json.dumps, sources))
  (tmp_path / "kernelbench_sources.jsonl.gz").write_bytes(
    gzip.compress(text.encode())
  )
  place = tmp_path / "kernelbench_timings.csv.gz"
  place.write_bytes(gzip.compress(timings.encode()))
  found = public_sets.kernelbench(tmp_path, ["mean_ms"])
  assert found.groups == ["level1/1.py"] * 2
  assert found.texts[1] == "gpu: L4\nrun: r\nmode: torch\nimport torch"
  place.write_bytes(gzip.compress(timings.replace("a,", "b,").encode()))
  with pytest.raises(InputError, match="unknown program 'b'"):
    public_sets.kernelbench(tmp_path, ["mean_ms"])


def test_graph_networks_and_accelerators(tmp_path):
  np.savez(
    tmp_path / "nasbench_graph_archs.npz",
    index=np.array([4, 7]),
    link=np.array([[0, 1, 2, 3], [0, 0, 0, 0]]),
    ops=np.array([[0, 1, 0, 1], [1, 1, 1, 1]]),
    op_names=np.array(["gcn", "gat"]),
  )
  np.savez(
    tmp_path / "nasbench_graph_light.npz",
    cora_index=np.array([7]),
    cora_perf=np.array([0.8]),
  )
  found = public_sets.nasbench_graph(tmp_path, ["cora_perf"])
  assert found.texts == ["gat of 0 ; gat of 0 ; gat of 0 ; gat of 0"]
  assert found.features.shape == (1, 4 * 2 + 4 * 5)
  with pytest.raises(InputError, match="no target 'cora_speed'"):
    public_sets.nasbench_graph(tmp_path, ["cora_speed"])
  (tmp_path / "nasbench_graph_light.npz").write_bytes(b"PK broken")
  with pytest.raises(InputError, match="is damaged"):
    public_sets.nasbench_graph(tmp_path, ["cora_perf"])
  path = tmp_path / "accel.csv"
  path.write_text("id,block0_e,block0_k,block1_e,top1\n0,6,3,4,71.5\n")
  found = public_sets.accel_nasbench(path, ["top1"])
  assert found.texts == ["block0 e6 k3 | block1 e4"]
  assert found.features.tolist() == [[6, 3, 4]]
  path.write_text("block,time_ms_A,time_ms_B\n16,1.5,\n32,2,3\n")
  found = public_sets.kernel_tuner(path, ["time_ms_A"])
  assert found.texts == ["block: 16", "block: 32"]
