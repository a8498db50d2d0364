"""Runs scripts as users do, in processes of their own."""

import os
import socket
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


def start(home, script, *arguments, **variables):
  """Starts `script`, its path and first arguments, with more of environment."""
  return subprocess.Popen(
    [sys.executable, *script, *map(str, arguments)],
    cwd=ROOT,
    env=environment(home) | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run_together(home, script, each):
  """Exit codes and what was printed, by processes that make one run.

  Args:
    home: as for `environment`.
    script: as for `start`.
    each: arguments of every process.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  together = [
    start(
      home,
      script,
      "--multihost",
      *arguments,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES=str(len(each)),
      JAX_PROCESS_ID=str(number),
    )
    for number, arguments in enumerate(each)
  ]
  try:
    told = [process.communicate(timeout=600) for process in together]
  finally:
    for process in together:
      process.kill()
  return [(p.returncode, *text) for p, text in zip(together, told)]


def run(home, script, *arguments, **variables):
  """Exit code and what was printed, there and to stderr."""
  process = start(home, script, *arguments, **variables)
  try:
    out, err = process.communicate(timeout=600)
  finally:
    process.kill()
  return process.returncode, out, err
