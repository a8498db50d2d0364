"""Data in the benchmark's formats, and what is said where it is not there."""

import json
import lzma

import numpy as np
import pytest
from PIL import Image

from models.errors import InputError
from research.lra import data
from research.lra.options import Options
from research.lra.tasks import TASKS


def load(task, path, length=None):
  options = Options(task=task, length=length)
  return data.load(TASKS[task], data.Options.of(options, str(path), "none"))


def text_of(tokens):
  return bytes(int(token) - 1 for token in tokens if token).decode()


def test_listops(tmp_path):
  for part, value in (("train", 4), ("val", 1), ("test", 3)):
    (tmp_path / f"basic_{part}.tsv").write_text(
      f"Source\tTarget\n( ( ( [SM 1 ) {value - 1} ) ] )\t{value}\n"
    )
  found = load("listops", tmp_path, 16)
  assert found.train.tokens.shape == (1, 16)
  # An operation, two digits and what closes it; digits begin at 1.
  assert found.train.tokens[0, :6].tolist() == [14, 2, 4, 15, 0, 0]
  assert found.train.lengths.tolist() == [4]
  labels = (found.train.labels, found.valid.labels, found.test.labels)
  assert [int(x[0]) for x in labels] == [4, 1, 3]


def reviews():
  for number in range(24):
    part = "test" if number % 3 == 0 else "train"
    yield part, number % 2, f"film {number} – {'good' * number}"


def test_text_of_lines_and_of_folders_is_the_same(tmp_path):
  lines = [
    json.dumps({"split": part, "label": str(label), "text": text})
    for part, label, text in reviews()
  ]
  (tmp_path / "imdb.jsonl.xz").write_bytes(
    lzma.compress("\n".join(lines).encode())
  )
  found = load("text", tmp_path, 24)
  assert len(found.test.labels) == 8 and len(found.valid.labels) == 1
  assert text_of(found.test.tokens[0][:6]) == "film 0"
  wanted = [(text.encode()[:24], label) for part, label, text in reviews()
            if part == "test"]  # fmt: skip
  for row, (text, label) in enumerate(wanted):
    own = found.test.tokens[row][: found.test.lengths[row]]
    assert bytes((own - 1).tolist()) == text
    assert found.test.labels[row] == label
  folder = tmp_path / "aclImdb"
  for number, (part, label, text) in enumerate(reviews()):
    path = folder / part / ("neg", "pos")[label]
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{number:02}_7.txt").write_text(text)
  again = load("text", tmp_path, 24)
  key = lambda part: sorted(
    (row.tobytes(), int(label)) for row, label in zip(part.tokens, part.labels)
  )
  assert key(again.test) == key(found.test)


@pytest.mark.parametrize("task", ["listops", "retrieval", "image"])
def test_one_file_is_not_read_as_all_parts(tmp_path, task):
  file = tmp_path / "basic_train.tsv"
  file.write_text("Source\tTarget\n7\t7\n")
  with pytest.raises(InputError, match=r"basic_train.tsv: has no \*train"):
    load(task, file)


def test_text_may_be_one_file_since_its_lines_name_their_part(tmp_path):
  file = tmp_path / "reviews.jsonl"
  file.write_text("\n".join(
    json.dumps({"split": part, "label": label, "text": text})
    for part, label, text in reviews()
  ))  # fmt: skip
  assert len(load("text", file, 24).test.labels) == 8


def test_retrieval(tmp_path):
  for part in ("train", "eval", "test"):
    (tmp_path / f"new_aan_pairs.{part}.tsv").write_text(
      "1.0\tA\tB\tb'one \\xc3\\xa9'\tb'two'\n0.0\tC\tD\tthree\tfour\n"
    )
  found = load("retrieval", tmp_path, 16)
  assert found.train.tokens.shape == (2, 2, 16)
  assert found.train.lengths.tolist() == [[6, 3], [5, 4]]
  assert found.valid.labels.tolist() == [1, 0]
  assert text_of(found.test.tokens[1, 0]) == "three"


def test_images_of_bytes_and_of_arrays(tmp_path):
  generator = np.random.default_rng(0)
  colours = generator.integers(0, 256, (8, 3, 32, 32), np.uint8)
  labels = np.arange(8, dtype=np.uint8)
  rows = np.concatenate([labels[:, None], colours.reshape(8, -1)], axis=1)
  for name in ("data_batch_1.bin", "test_batch.bin"):
    (tmp_path / name).write_bytes(rows.tobytes())
  found = load("image", tmp_path)
  assert found.train.tokens.shape == (7, 1024) and len(found.valid.labels) == 1
  # Files may be sorted by class, and then the last one is no fair choice.
  held = [*found.train.labels, *found.valid.labels]
  assert sorted(held) == list(range(8)) != held
  gray = np.einsum("nchw,c->nhw", colours, [0.2989, 0.587, 0.114])
  np.testing.assert_allclose(
    found.test.tokens.reshape(8, 32, 32), gray, atol=0.51
  )
  arrays = tmp_path / "arrays"
  arrays.mkdir()
  for part in ("train", "test"):
    np.save(arrays / f"gray_{part}_x.npy", np.round(gray).astype(np.uint8))
    np.save(arrays / f"gray_{part}_y.npy", labels)
  again = load("image", arrays)
  np.testing.assert_array_equal(again.train.tokens, found.train.tokens)
  np.save(arrays / "gray_train_x.npy", gray)
  with pytest.raises(InputError, match="train images are float64"):
    load("image", arrays)
  (tmp_path / "test_batch.bin").write_bytes(b"")
  with pytest.raises(InputError, match="its test part is empty"):
    load("image", tmp_path)


def test_pathfinder(tmp_path):
  folder = tmp_path / "curv_contour_length_14"
  (folder / "metadata").mkdir(parents=True)
  (folder / "imgs" / "0").mkdir(parents=True)
  lines = []
  for number in range(10):
    Image.fromarray(np.full((32, 32), number, np.uint8)).save(
      folder / "imgs" / "0" / f"sample_{number}.png"
    )
    lines.append(f"imgs/0 sample_{number}.png {number} {number % 2} 1 2 3")
  (folder / "metadata" / "0.npy").write_text("\n".join(lines))
  found = load("pathfinder32", tmp_path)
  assert [len(x.labels) for x in (found.train, found.valid, found.test)] == [
    8,
    1,
    1,
  ]
  assert found.test.tokens[0, 0] == 9 and found.test.labels.tolist() == [1]


def test_images_are_not_cut(tmp_path):
  with pytest.raises(InputError, match="--length=100 cuts images of 1024"):
    load("pathfinder32", tmp_path, 100)
  (tmp_path / "metadata").mkdir()
  (tmp_path / "metadata" / "0.npy").write_text("\n")
  with pytest.raises(InputError, match="list no image"):
    load("pathfinder32", tmp_path)


@pytest.mark.parametrize(
  "task, files, message",
  [
    ("text", {}, r"has no \*imdb\*.jsonl\*: .*aclImdb"),
    ("image", {}, r"has no \*train\*_x.npy\*: .*cifar-10-batches-bin"),
    ("retrieval", {}, r"has no \*train.tsv: .*lra_release"),
    ("pathfinder32", {}, "has no metadata/"),
    ("listops", {"a_train.tsv": "one\ttwo\n"}, "is no expression, tab, and"),
    ("listops", {"a_train.tsv": "MAX 1 2\t2\n"}, "is no word of ListOps"),
    ("retrieval", {"train.tsv": "1\ta\tb\n"}, "has 3 columns, not the 5"),
    ("text", {"a.jsonl": '{"split": "train"}\n'}, "has no split, label, text"),
    ("text", {"a.jsonl": "{"}, "line 1: is no readable JSON"),
    (
      "text",
      {"a.jsonl": '{"split": "train", "label": 7, "text": "a"}\n' * 12},
      "labels of its train part are up to 7",
    ),
  ],
)  # fmt: skip
def test_data_that_is_not_there_or_of_another_task_is_one_line(
  tmp_path, task, files, message
):
  for name, text in files.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=message):
    load(task, tmp_path)
  with pytest.raises(InputError, match="no such folder"):
    load(task, tmp_path / "nowhere")
