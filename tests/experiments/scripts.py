"""Scripts as modules: their flags in one process, without running them."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags

FOLDER = Path(__file__).resolve().parents[2] / "experiments"
# absl keeps the ids of modules that disclaim their flags. Modules stay alive
# here, so that no later one has such an id.
_FORGOTTEN = []


def names() -> list[str]:
  """The scripts that a user runs; modules that they share are none."""
  return sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
  )


@contextlib.contextmanager
def loaded(name: str) -> Iterator[tuple[set[str], set[str]]]:
  """Imports a script with its flags, and forgets both afterwards.

  Args:
    name: of the file in experiments/, without its ending.

  Yields:
    Names of all flags that the script and the modules of experiments/ beside
    it define, and of those that `--help` lists.
  """
  module = f"script_{name}"
  flags_before, modules_before = set(flags.FLAGS), set(sys.modules)
  sys.path.insert(0, str(FOLDER))
  spec = importlib.util.spec_from_file_location(module, FOLDER / f"{name}.py")
  made = importlib.util.module_from_spec(spec)
  sys.modules[module] = made
  try:
    spec.loader.exec_module(made)
    defined = set(flags.FLAGS) - flags_before
    # Its own, and what every script takes, which is the running program's.
    keys = flags.FLAGS.get_key_flags_for_module
    listed = {flag.name for one in (made, sys.argv[0]) for flag in keys(one)}
    yield {flag for flag in defined if not _of_a_library(flag)}, listed
  finally:
    sys.path.remove(str(FOLDER))
    here = {path.stem for path in FOLDER.glob("*.py")}
    for flag in set(flags.FLAGS) - flags_before:
      if not _of_a_library(flag):
        delattr(flags.FLAGS, flag)
    flags.FLAGS.unparse_flags()
    for key in set(sys.modules) - modules_before:
      if key in here | {module}:
        _FORGOTTEN.append(sys.modules.pop(key))


def run(name: str, *arguments: object) -> tuple[int, str, str]:
  """Runs a script in this process: exit code and what it printed.

  For what ends before anything is computed, such as a user's mistake: a process
  of its own takes seconds to start.
  """
  out, err, before = io.StringIO(), io.StringIO(), sys.argv
  code = 0
  with loaded(name), contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.chdir(FOLDER.parent))
    stack.enter_context(contextlib.redirect_stdout(out))
    stack.enter_context(contextlib.redirect_stderr(err))
    sys.argv = [str(FOLDER / f"{name}.py"), *map(str, arguments)]
    try:
      sys.modules["cli"].run(sys.modules[f"script_{name}"].main)
    except SystemExit as end:
      code = end.code or 0
    finally:
      sys.argv = before
  return code, out.getvalue(), err.getvalue()


def _of_a_library(flag: str) -> bool:
  module = sys.modules.get(flags.FLAGS.find_module_defining_flag(flag))
  return "site-packages" in (getattr(module, "__file__", None) or "")
