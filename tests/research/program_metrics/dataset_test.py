import json
import lzma

import pytest

from models.errors import InputError
from research.program_metrics import dataset
from research.results import tables


def made(count):
  return [
    {
      "index": i,
      "source": f"def f(): return {i}",
      "hash": f"{i:x}",
      "operators": "top_k add" if i % 5 == 0 else "add matmul",
      "argument_bytes": 10 * (i * 7919 % count),
      "output_bytes": 5,
      "latency_us": 1.0 + i,
      "latency_again_us": 2.0 + i,
      "latency_process_us": 3.0 - i if i % 10 == 0 else None,
    }
    for i in range(count)
  ]


@pytest.fixture
def rows():
  return dataset.with_splits(made(500))


def parts(rows, split):
  return {
    part: [row for row in rows if row[dataset.column(split)] == part]
    for part in dataset.PARTS
  }


def test_a_duplicate_is_dropped_and_the_first_stays():
  rows = made(4)
  rows[2]["hash"] = rows[0]["hash"]
  rows[3]["source"] = rows[1]["source"]
  assert [r["index"] for r in dataset.without_duplicates(rows)] == [0, 1]


@pytest.mark.parametrize("split", dataset.SPLITS)
def test_each_row_has_one_part_of_each_split(rows, split):
  found = parts(rows, split)
  assert sum(map(len, found.values())) == len(rows)
  assert all(found.values())


def test_random_takes_a_tenth_and_keeps_to_it(rows):
  found = parts(rows, "random")
  assert 30 <= len(found["test"]) <= 70 and 30 <= len(found["valid"]) <= 70
  more = dataset.with_splits(made(800))
  for name in ("split_random", "split_operators"):
    assert [r[name] for r in more[:500]] == [r[name] for r in rows]


def test_held_out_operators_are_in_the_test_alone(rows):
  for part, found in parts(rows, "operators").items():
    uses = [{*dataset.HELD_OUT} & {*row["operators"].split()} for row in found]
    assert all(uses) if part == "test" else not any(uses)


def test_the_test_of_sizes_is_larger_than_all_training(rows):
  found = {
    part: [dataset.total_bytes(row) for row in some]
    for part, some in parts(rows, "sizes").items()
  }
  assert max(found["train"] + found["valid"]) < min(found["test"])
  assert 60 <= len(found["test"]) <= 90
  assert dataset.largest_of_training(rows) < min(found["test"])


def test_files_are_written_as_they_are_named(tmp_path, rows):
  dataset.write(tmp_path / "a/rows.jsonl.xz", rows)
  text = lzma.open(tmp_path / "a/rows.jsonl.xz", "rt").read()
  assert [json.loads(line) for line in text.splitlines()] == rows
  assert len(list((tmp_path / "a").iterdir())) == 1
  with pytest.raises(InputError, match="is not named .jsonl"):
    dataset.write(tmp_path / "rows.csv", rows)


def test_ceilings_and_summary(rows):
  found = dataset.ceilings(rows)
  assert found["again"] == pytest.approx(1)
  assert found["again, test of sizes"] == pytest.approx(1)
  assert found["process"] == pytest.approx(-1)
  assert found["process_programs"] == 50
  (line,) = dataset.summary(rows, ["latency_us"])
  assert (line["p0"], line["p100"]) == (1, 500)
  assert line["spearman_latency"] == pytest.approx(1)
  assert line["spearman_source_length"] > 0.3
  assert "| latency_us |" in tables.KINDS["program_metrics"]([line])
  assert dataset.spearman([1, 1, 1], [1, 2, 3]) is None
