"""The wheel holds the packages, and works where there is no checkout."""

import os
import subprocess
import sys
import zipfile

import pytest

from tests.house_rules_test import PACKAGES, ROOT, tracked

USE = """
import sys
import models, ops, research
import jax.numpy as jnp
from models.convert import load
from models.errors import InputError
from research.core import loop
from research.language_model import options
for module in (ops, models, research, loop):
  assert module.__file__.startswith(sys.argv[1]), module.__file__
print(ops.fake_quantize(jnp.array([[1.0, 0.4]]), jnp.array([8])).shape)
try:
  load("tiny", jnp.float32)
except InputError as error:
  print(error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """Builds a wheel without a network, installs it: wheel and folder."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  for path in tracked(ROOT):
    below = path.relative_to(ROOT)
    if below.parts[0] in PACKAGES or str(below) in (
      "pyproject.toml",
      "LICENSE",
    ):
      (source / below).parent.mkdir(parents=True, exist_ok=True)
      (source / below).write_bytes(path.read_bytes())
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
  offline = ["--no-deps", "--no-index", "-q"]
  build = ["wheel", *offline, "--no-build-isolation", "-w", folder, source]
  subprocess.run([*pip, *build], check=True, cwd=folder)
  (wheel,) = folder.glob("*.whl")
  target = folder / "site"
  subprocess.run(
    [*pip, "install", *offline, "--no-compile", "--target", target, wheel],
    check=True,
    cwd=folder,
  )
  return wheel, target


def test_the_wheel_holds_every_module_and_nothing_else(installed):
  wheel, _ = installed
  with zipfile.ZipFile(wheel) as archive:
    held = {name for name in archive.namelist() if ".dist-info/" not in name}
  files = {str(path.relative_to(ROOT)) for path in tracked(ROOT)}
  assert held == {name for name in files if name.split("/")[0] in PACKAGES}


def test_it_works_without_the_checkout(installed, tmp_path):
  _, target = installed
  env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  done = subprocess.run(
    # -P: the folder of the command is not looked into.
    [sys.executable, "-P", "-c", USE, str(target)],
    env=env | {"PYTHONPATH": str(target), "JAX_PLATFORMS": "cpu"},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  shape, line = done.stdout.splitlines()
  assert shape == "(1, 2)"
  assert line.startswith(str(target)) and "run from a whole checkout" in line
