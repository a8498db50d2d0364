"""The scripts that make the large tables again say how they are called."""

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
