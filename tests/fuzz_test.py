"""Readers of every format, each against some mutated files; see `fuzz.py`."""

import itertools
import json
import time

import pytest

from models import input_files
from models.errors import InputError
from tests.fuzz import SECONDS, Format, Outcome, main, mutate, outcome, run
from tests.fuzz_formats import FORMATS

# Those that make arrays of JAX take a hundred times as long as others.
_SLOW = (
  "safetensors",
  "quantized",
  "config",
  "index",
  "gguf",
  "gguf_gemma",
  "llama2c",
)
_SLOWER = ("checkpoint", "regression_lm")


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused_in_one_line(name):
  count = 8 if name in _SLOWER else 25 if name in _SLOW else 100
  assert outcome(FORMATS[name], range(count)).faults == []


def test_mutations_are_the_same_for_a_seed_and_differ_between_seeds():
  data = b'{"a": [1, 2], "b": "text"}'
  found = [mutate(data, seed) for seed in range(200)]
  assert found == [mutate(data, seed) for seed in range(200)]
  assert len(set(found)) > 100 and data not in found[:5]


def _reads(parse):
  """Parses as readers do, which take any exception for damage."""
  with input_files.errors_at("a"):
    parse()


def test_outcomes_of_batches_are_added():
  found = Outcome(refused=1, most_bytes=7, seconds=0.5, most_seconds=0.5)
  found.add(Outcome(refused=2, most_bytes=5, seconds=1.5, faults=[(3, "x")]))
  assert found == Outcome(
    refused=3,
    most_bytes=7,
    seconds=2.0,
    most_seconds=0.5,
    faults=[(3, "x")],
  )


def test_a_process_that_dies_is_a_fault_and_others_go_on(monkeypatch):
  # Its process ends without an outcome.
  monkeypatch.setattr("tests.fuzz._child", print)
  assert [seed for seed, _ in run("csv", range(2)).faults] == [0, 1]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
  result = tmp_path / "a.json"
  done = {"refused": 1, "faults": 0, "most_mb": 0, "ms": 1, "slowest_ms": 2}
  done |= {"format": "csv", "mutations": 3, "first_faults": []}
  bad = done | {"format": "gguf", "faults": 1}
  rows = [done, bad, done | {"format": "index", "mutations": 4}]
  result.write_text(
    json.dumps({"commit": "abc", "complete": True, "rows": rows})
  )
  tried = []
  monkeypatch.setattr(
    "tests.fuzz.run", lambda *run: tried.append(run) or Outcome(refused=2)
  )
  words = [
    "fuzz",
    "--mutations=3",
    "--formats=csv,gguf,index",
    f"--result={result}",
  ]
  monkeypatch.setattr("sys.argv", words)
  assert main() == 0
  found = json.loads(result.read_text())
  assert tried == [("gguf", range(3)), ("index", range(3))]
  assert [row["refused"] for row in found["rows"]] == [1, 2, 2]
  assert found["rows"][0]["commit"] == "abc"
  assert "gguf: 3 mutations, 2 refused" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("read", "fault"),
  [
    (lambda: 1 / 0, "ZeroDivisionError"),
    (lambda: _reads(lambda: time.sleep(SECONDS + 1)), "_HangError"),
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
  ((seed, found),) = outcome(form, range(1)).faults
  assert seed == 0 and fault in found


def test_a_clean_error_is_none():
  def read(folder):
    if (folder / "a").read_bytes() != b"abc":
      raise InputError("a: is damaged")

  form = Format(lambda folder: (folder / "a").write_bytes(b"abc"), "a", read)
  found = outcome(form, range(20))
  assert found.faults == [] and 0 < found.refused <= 20
