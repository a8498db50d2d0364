"""launch/local.sh: what it sets, what it leaves, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOW = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ)]))"


def local(*arguments, **environment):
  kept = {"PATH": os.environ["PATH"], "HOME": "/home/someone"}
  return subprocess.run(
    ["bash", str(ROOT / "launch" / "local.sh"), *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=60,
    env={**kept, "PYTHON": sys.executable, **environment},
  )


@pytest.fixture
def script(tmp_path):
  path = tmp_path / "show.py"
  path.write_text(SHOW)
  return path


@pytest.fixture
def gpu_path(tmp_path):
  tool = tmp_path / "bin" / "nvidia-smi"
  tool.parent.mkdir()
  tool.write_text("#!/bin/sh\n")
  tool.chmod(0o755)
  return f"{tool.parent}{os.pathsep}{os.environ['PATH']}"


def test_becomes_the_script_with_its_arguments(script):
  done = local(script, "--a=b c", "--dry-run")
  assert done.returncode == 0, done.stderr
  argv, environment = json.loads(done.stdout)
  assert argv == [str(script), "--a=b c", "--dry-run"]
  assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
  assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
  cache = "/home/someone/.cache/frugax/jax"
  assert environment["JAX_COMPILATION_CACHE_DIR"] == cache
  assert environment["PYTHONPATH"] == str(ROOT)


def test_the_scripts_exit_code_is_kept(tmp_path):
  path = tmp_path / "fails.py"
  path.write_text("raise SystemExit(7)")
  assert local(path).returncode == 7


def test_dry_run_prints_and_runs_nothing(script):
  done = local("--dry-run", script, "--a=b c")
  assert done.returncode == 0
  last = done.stdout.splitlines()[-1]
  assert last.split()[0] == sys.executable
  assert r"--a=b\ c" in last
  assert "XLA_FLAGS=''" in done.stdout


def test_what_is_set_stays(script):
  done = local(
    "--dry-run",
    script,
    XLA_PYTHON_CLIENT_MEM_FRACTION="0.5",
    JAX_COMPILATION_CACHE_DIR="/there",
    XDG_CACHE_HOME="/unused",
    PYTHONPATH="/mine",
  )
  assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5\n" in done.stdout
  assert "JAX_COMPILATION_CACHE_DIR=/there\n" in done.stdout
  assert f"PYTHONPATH={ROOT}:/mine\n" in done.stdout


def test_gpu_flags_need_a_gpu_and_are_set_once(script, gpu_path):
  flag = "--xla_gpu_enable_latency_hiding_scheduler"
  done = local("--dry-run", script, PATH=gpu_path, XLA_FLAGS="--xla_a=1")
  assert f"XLA_FLAGS=--xla_a=1\\ {flag}=true\n" in done.stdout
  done = local("--dry-run", script, PATH=gpu_path, XLA_FLAGS=f"{flag}=false")
  assert f"XLA_FLAGS={flag}=false\n" in done.stdout


@pytest.mark.parametrize(
  "arguments, says",
  [
    ([], "no script named"),
    (["missing.py"], "no script at missing.py"),
    (["--fast", "x.py"], "unknown option --fast"),
  ],
)
def test_a_mistake_is_one_line_and_exit_2(arguments, says):
  done = local(*arguments)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: ") and says in done.stderr
  assert done.stderr.count("\n") == 1


def test_a_missing_python_is_one_line(script):
  done = local(script, PYTHON="/no/python")
  assert done.returncode == 2
  assert "no Python at /no/python" in done.stderr


def test_help():
  done = local("--help")
  assert done.returncode == 0 and done.stdout.startswith("Usage: ")
