"""The scripts that make the large tables again: usage, and steps that fail."""

import os
import shutil
import subprocess

import pytest

from tests.house_rules_test import ROOT

SCRIPTS = sorted((ROOT / "launch" / "reproduce").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_usage(script):
  run = lambda *arguments: subprocess.run(
    ["bash", script, *arguments], capture_output=True, text=True, check=False
  )
  for arguments, code in ((("--help",), 0), ((), 2), (("--what",), 2)):
    done = run(*arguments)
    assert done.returncode == code
    assert f"Usage: launch/reproduce/{script.name} " in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
  "script", ["programs.sh random {} 3", "transfer.sh nowhere {}"]
)
def test_a_step_that_fails_ends_a_script_and_is_told(script, tmp_path):
  (tmp_path / "python").write_text(
    "#!/bin/sh\necho 'no module of that name' >&2\nexit 1\n"
  )
  (tmp_path / "python").chmod(0o755)
  # A copy, since scripts write beside themselves.
  folder = tmp_path / "copy" / "launch" / "reproduce"
  shutil.copytree(ROOT / "launch" / "reproduce", folder)
  name, *words = script.format(tmp_path / "out").split()
  done = subprocess.run(
    [folder / name, *words],
    capture_output=True,
    text=True,
    timeout=20,
    env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
  )
  assert done.returncode == 1
  assert "no module of that name" in done.stdout + done.stderr
