"""A mistaken flag is answered at once: scripts read flags without JAX."""

import pathlib
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).parents[2] / "experiments"
# The packages that take seconds to import.
HEAVY = ("jax", "flax", "optax", "orbax", "scipy", "tokenizers", "safetensors",
         "matplotlib", "huggingface_hub", "sklearn", "xgboost")  # fmt: skip

# Each script in a fork, since absl's flags are global and cli is shared.
_PROGRAM = """
import os, pathlib, runpy, sys
sys.path.insert(0, sys.argv[1])
import cli
heavy = sys.argv[2].split()
for script in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
  if not (child := os.fork()):
    runpy.run_path(str(script))
    print(script.name, *[name for name in heavy if name in sys.modules])
    sys.stdout.flush()
    os._exit(0)
  os.waitpid(child, 0)
"""


def test_scripts_import_what_is_heavy_after_their_flags_were_checked():
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM, str(SCRIPTS), " ".join(HEAVY)],
    capture_output=True,
    text=True,
    check=True,
  )
  lines = [line.split() for line in done.stdout.splitlines()]
  assert not done.stderr
  assert len(lines) == len(list(SCRIPTS.glob("*.py"))) > 15
  assert [line for line in lines if len(line) > 1] == []
