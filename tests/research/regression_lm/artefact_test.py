"""Damaged folders: one clear line, never a traceback or a wrong model."""

import json
import shutil

import numpy as np
import pytest

from models.errors import InputError
from models.numbers import Ieee
from research.regression_lm import RegressionLM, artefact


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("rlm") / "model"
  lm = RegressionLM.from_scratch(size="tiny", numbers=Ieee(mantissa_digits=2))
  lm.save(path)
  return path


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def refused(path):
  with pytest.raises(InputError) as caught:
    artefact.load(path)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors",
                                  "tokenizer.json"])  # fmt: skip
def test_files_that_are_missing_are_named(copy, name):
  (copy / name).unlink()
  assert name in refused(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors",
                                  "tokenizer.json"])  # fmt: skip
def test_flipped_and_lost_bytes_are_found(copy, name):
  generator = np.random.default_rng(0)
  whole = (copy / name).read_bytes()
  for trial in range(25):
    data = bytearray(whole)
    if trial % 5 == 0:
      data = data[: generator.integers(len(data))]
    elif trial % 5 == 1:
      data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    else:
      place = generator.integers(len(data) - 20)
      data[place : place + 20] = generator.bytes(20)
    (copy / name).write_bytes(data)
    try:
      found = artefact.load(copy)
    except InputError as error:
      assert "\n" not in str(error)
    else:
      # Only what says nothing about the model may pass: a name, a space.
      assert name == "config.json"
      original = json.loads(whole)
      assert found.codec.format.to_json() == original["numbers"]
      assert found.config.d_model == original["model"]["d_model"]


def edited(path, change):
  described = json.loads((path / "config.json").read_text())
  change(described)
  (path / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda d: d.update(kind="llama"), "is not of a regression"),
    (lambda d: d.update(version=9), "has version 9"),
    (lambda d: d.pop("model"), "does not describe a model"),
    (lambda d: d["model"].pop("d_ff"), "does not describe a model"),
    (lambda d: d["model"].update(d_ff="24"), "d_ff='24'"),
    (lambda d: d["model"].update(rope_theta=None), "rope_theta=None"),
    (lambda d: d["model"].update(d_ff=25), "has shape"),
    (lambda d: d["model"].update(encoder_layers=2), "has shape"),
    (lambda d: d["model"].update(encoder="mamba2"), "tensor"),
    (lambda d: d["numbers"].update(mantissa_digits=4), "its numbers have"),
    (lambda d: d["numbers"].update(kind="roman"), "number format"),
    (lambda d: d.update(num_objectives=-1), "num_objectives=-1"),
    (lambda d: d.update(max_length="x"), "does not describe a model"),
    (lambda d: d.update(info=3), "does not describe a model"),
    (lambda d: d.update(weights_sha256="0"), "is not the file that"),
  ],
)
def test_descriptions_that_do_not_fit_are_refused(copy, change, words):
  edited(copy, change)
  assert words in refused(copy)


def test_weights_that_are_not_finite_are_refused(copy):
  import safetensors.numpy

  tensors = safetensors.numpy.load_file(copy / "model.safetensors")
  tensors["head.kernel"][0, 0] = np.nan
  safetensors.numpy.save_file(tensors, copy / "model.safetensors")
  assert "'head.kernel' is not finite" in refused(copy)
  tensors.pop("head.kernel")
  safetensors.numpy.save_file(tensors, copy / "model.safetensors")
  assert "lacks tensor 'head.kernel'" in refused(copy)


def test_a_folder_in_use_is_not_overwritten(folder, tmp_path):
  lm = RegressionLM.from_pretrained(folder)
  (tmp_path / "empty").mkdir()
  lm.save(tmp_path / "empty")
  (tmp_path / "file").write_text("x")
  for place in (tmp_path / "empty", tmp_path / "file"):
    with pytest.raises(InputError, match="not overwritten"):
      lm.save(place)
  leftovers = [path.name for path in tmp_path.iterdir()]
  assert not [name for name in leftovers if "partial" in name]


def test_bfloat16_weights_round_trip(tmp_path):
  lm = RegressionLM.from_scratch(size="tiny", param_dtype="bfloat16")
  lm.save(tmp_path / "model")
  found = RegressionLM.from_pretrained(tmp_path / "model")
  assert found.params["head"]["kernel"].dtype == "bfloat16"
  wide = RegressionLM.from_pretrained(tmp_path / "model", param_dtype="float32")
  np.testing.assert_array_equal(
    wide.params["head"]["kernel"], np.float32(lm.params["head"]["kernel"])
  )
