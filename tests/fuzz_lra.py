"""The formats of Long Range Arena for `fuzz.py`, and saved classifiers."""

import json
import pathlib

import numpy as np

from models import fabnet, weight_files
from models.fabnet_config import FABNetConfig
from research.lra import data
from research.lra.options import Options
from research.lra.tasks import TASKS
from tests.fuzz import Format

_LENGTHS = {"listops": 16, "text": 16, "retrieval": 16}


def _reads(task: str):
  options = Options(task=task, length=_LENGTHS.get(task))
  return lambda folder: data.load(
    TASKS[task], data.Options.of(options, str(folder), "none")
  )


def _listops(folder: pathlib.Path) -> None:
  text = "Source\tTarget\n" + "( ( ( [SM 1 ) 3 ) ] )\t4\n7\t7\n" * 3
  for part in ("train", "val", "test"):
    (folder / f"basic_{part}.tsv").write_text(text)


def _text(folder: pathlib.Path) -> None:
  rows = [
    {"split": part, "label": n % 2, "text": f"film {n}"}
    for part in ("train", "test")
    for n in range(12)
  ]
  lines = [json.dumps(row) for row in rows]
  (folder / "imdb.jsonl").write_text("\n".join(lines))


def _pairs(folder: pathlib.Path) -> None:
  text = "1.0\tA\tB\tb'one \\xc3'\tb'two'\n0.0\tC\tD\tthree\tfour\n"
  for part in ("train", "eval", "test"):
    (folder / f"new_aan_pairs.{part}.tsv").write_text(text)


def _images(folder: pathlib.Path) -> None:
  rows = np.zeros((3, 1 + 3 * 1024), np.uint8)
  rows[:, 0] = 1, 2, 3
  for name in ("data_batch_1.bin", "test_batch.bin"):
    (folder / name).write_bytes(rows.tobytes())


def _classifier(folder: pathlib.Path) -> None:
  config = FABNetConfig.tiny()
  zeros = {
    name: np.zeros(shape, np.float32)
    for name, shape in weight_files.shapes(
      fabnet.abstract_params(config)
    ).items()
  }
  params = weight_files.unflatten(zeros)
  fabnet.save(folder / "m", config, params)


LRA = {
  "lra_listops": Format(_listops, "basic_train.tsv", _reads("listops")),
  "lra_text": Format(_text, "imdb.jsonl", _reads("text")),
  "lra_pairs": Format(_pairs, "new_aan_pairs.eval.tsv", _reads("retrieval")),
  "lra_images": Format(_images, "test_batch.bin", _reads("image")),
  "fabnet": Format(
    _classifier, "m/config.json", lambda folder: fabnet.load(folder / "m")
  ),
}
