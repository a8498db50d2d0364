"""Readers of every format, each against some mutated files; see `fuzz.py`."""

import itertools
import time

import pytest

from models.errors import InputError
from tests.fuzz import SECONDS, Format, faults, mutate
from tests.fuzz_formats import FORMATS

# Those that make arrays of JAX take a hundred times as long as others.
_SLOW = ("safetensors", "quantized", "config", "index", "gguf", "llama2c")
_SLOWER = ("checkpoint", "regression_lm")


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused_in_one_line(name):
  count = 8 if name in _SLOWER else 25 if name in _SLOW else 200
  assert list(faults(FORMATS[name], range(count))) == []


def test_mutations_are_the_same_for_a_seed_and_differ_between_seeds():
  data = b'{"a": [1, 2], "b": "text"}'
  found = [mutate(data, seed) for seed in range(200)]
  assert found == [mutate(data, seed) for seed in range(200)]
  assert len(set(found)) > 100 and data not in found[:5]


@pytest.mark.parametrize(
  ("read", "fault"),
  [
    (lambda: 1 / 0, "ZeroDivisionError"),
    (lambda: time.sleep(SECONDS + 1), "TimeoutError"),
    (lambda: b"x" * (100 << 20), "MB for a file"),
  ],
)
def test_what_readers_do_wrong_is_found(monkeypatch, read, fault):
  monkeypatch.setattr("tests.fuzz.SECONDS", 0.5)
  calls = itertools.count()
  form = Format(
    lambda folder: (folder / "a").write_bytes(b"abc"),
    "a",
    lambda folder: read() if next(calls) else None,
  )
  ((seed, found),) = faults(form, range(1))
  assert seed == 0 and fault in found


def test_a_clean_error_is_none():
  def read(folder):
    if (folder / "a").read_bytes() != b"abc":
      raise InputError("a: is damaged")

  form = Format(lambda folder: (folder / "a").write_bytes(b"abc"), "a", read)
  assert list(faults(form, range(20))) == []
