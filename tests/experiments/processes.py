"""Runs scripts as users do, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(home):
  """Of a process on a CPU that finds in `home` what others compiled."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    # Every process would compile the same again; at these sizes that is all.
    "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }


def start(home, script, *arguments):
  """Starts `script`, its path and first arguments."""
  return subprocess.Popen(
    [sys.executable, *script, *map(str, arguments)],
    cwd=ROOT,
    env=environment(home),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(home, script, *arguments):
  """Exit code and what was printed, there and to stderr."""
  process = start(home, script, *arguments)
  try:
    out, err = process.communicate(timeout=600)
  finally:
    process.kill()
  return process.returncode, out, err
