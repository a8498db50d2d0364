"""Fields of text forms, and their orders."""

import json
import pathlib

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import made_up_numbers, text_forms

ROOT = pathlib.Path(__file__).resolve().parents[3]
CELLS = """arch_str,val_acc_x,lat_a
|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|avg_pool_3x3~1|none~2|,90,1
|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|,10,
"""


@pytest.fixture
def cells(tmp_path):
  path = tmp_path / "cells.csv"
  path.write_text(CELLS)
  return path


def test_cells_are_told_by_what_lives_and_by_what_is_built(cells):
  facts = text_forms.load("nasbench201", cells)
  first, second = facts.forms["live"]
  assert first[-3:] == ["paths 2", "skip", "conv pool"]
  assert "conv 1" in first and "depth 1" in first
  assert second[-2:] == ["paths 1", "skip"]
  assert facts.forms["built"][0] == [
    "a conv", "b none", "c none", "d skip", "e pool", "f none",
  ]  # fmt: skip
  extra = facts.features["built"].shape[1] - facts.features["live"].shape[1]
  assert extra == 30
  assert np.isnan(facts.column("lat_a")[1])
  with pytest.raises(InputError, match="no column 'lat_b'"):
    facts.column("lat_b")


def test_proxies_are_columns_of_the_cells_that_have_them(cells, tmp_path):
  path = tmp_path / "proxies.json"
  facts = {"arch": "x", "val_accuracy": 90.0, "nwot": {"score": 7, "time": 1}}
  # conv, none, skip, none, pool, none: NASLib has the edge 0->3 third.
  path.write_text(json.dumps({"cifar10": {"(2, 1, 0, 1, 4, 1)": facts}}))
  found = text_forms.load("nasbench201", cells, path)
  assert found.column("proxy_nwot_cifar10")[0] == 7
  assert np.isnan(found.column("proxy_nwot_cifar10")[1])
  assert sum(name.startswith("proxy") for name in found.columns) == 1
  path.write_text(json.dumps({"cifar10": {"(9, 1, 0, 1, 4, 1)": facts}}))
  with pytest.raises(InputError, match="no proxies of these cells"):
    text_forms.load("nasbench201", cells, path)
  with pytest.raises(InputError, match="not of 'kernel_tuner'"):
    text_forms.load("kernel_tuner", cells, path)


@pytest.mark.parametrize(
  "text",
  [
    CELLS.replace("val_acc_x", "accuracy"),
    CELLS.replace("|none~2|", "|pass~2|"),
    CELLS.replace("|none~0|", "||", 1),
  ],
)
def test_cells_of_another_kind_are_one_line(cells, text):
  cells.write_text(text)
  with pytest.raises(InputError, match="nasbench201|NAS-Bench-201|val_acc"):
    text_forms.load("nasbench201", cells)


def test_settings_that_never_change_are_left_out():
  facts = text_forms.load(
    "kernel_tuner", ROOT / "data/kernel_tuner/convolution.csv.xz"
  )
  told = dict(field.split() for field in facts.forms["settings"][0])
  assert "filterheight" not in told and "blocksizex" in told
  threads = float(told["blocksizex"]) * float(told["blocksizey"])
  assert float(told["threads"]) == threads
  assert not any("time" in name for name in told)


def test_views_are_orders_of_the_same_fields():
  fields = ["a 1", "b 2", "c 3", "d 4"]
  found = text_forms.views(fields, 6, np.random.default_rng(0))
  assert found[0] == "a 1 ; b 2 ; c 3 ; d 4"
  assert all(sorted(text.split(" ; ")) == fields for text in found)
  assert len(set(found)) > 3


def test_an_unknown_set_is_named():
  with pytest.raises(InputError, match="'cells' is unknown"):
    text_forms.load("cells", "none.csv")


def test_words_tell_what_lives_and_made_up_columns_are_smooth_in_counts(cells):
  facts = text_forms.load("nasbench201", cells)
  words = facts.forms["words"]
  assert words[0][-3:] == ["pathsc", "skip", "convpool"]
  assert len(words[1]) == len(facts.forms["live"][1])
  found = text_forms.with_made_up(facts, "words", 3)
  assert text_forms.with_made_up(facts, "words", 0) is facts
  drawn = np.stack([found.column(f"made_up_{i}") for i in range(3)])
  assert drawn.shape == (3, 2) and (drawn[:, 0] != drawn[:, 1]).all()
  counts = np.random.default_rng(0).integers(0, 4, size=(150, 5)).astype(float)
  many = made_up_numbers.columns(counts, 60)
  np.testing.assert_array_equal(many, made_up_numbers.columns(counts, 60))
  apart = np.linalg.norm(np.sqrt(counts[:, None]) - np.sqrt(counts), axis=2)
  alike = np.corrcoef(many)
  near, far = alike[(apart > 0) & (apart < 1)], alike[apart > 3]
  assert near.mean() > far.mean() + 0.2
  with pytest.raises(InputError, match="below 0"):
    made_up_numbers.columns(-counts - 1, 1)


def test_any_table_of_settings_is_read(tmp_path):
  path = tmp_path / "gemm.csv"
  path.write_text(
    "MWG,KWG,layout,fixed,gflops,time_ms_A100\n"
    "128,16,row,1,7,10.1\n64,32,column,1,8,\n64,16,row,1,,24.4\n"
  )
  facts = text_forms.load("kernel_tuner", path, hidden=["gf*"])
  assert facts.forms["settings"][1] == ["MWG 64", "KWG 32", "layout column"]
  np.testing.assert_array_equal(
    facts.features["settings"],
    [[128, 16, 0, 1, 1], [64, 32, 1, 0, 1], [64, 16, 0, 1, 1]],
  )
  np.testing.assert_array_equal(
    facts.column("time_ms_A100"), [10.1, np.nan, 24.4]
  )
  path.write_text("time_ms_A100\n1\n")
  with pytest.raises(InputError, match="no column of settings"):
    text_forms.load("kernel_tuner", path)
