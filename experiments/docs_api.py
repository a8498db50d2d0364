"""Writes a page of docstrings for every module: `make api`.

    python experiments/docs_api.py --output=runs/api

Any machine, no accelerator; half a minute of a CPU core. Expect index.html in
that folder, which a browser opens: all modules of `ops`, `models` and
`research`, and on the page of each package the names that it offers.
"""

import importlib
import inspect
import pathlib
import pkgutil
import sys
import types
import warnings
from collections.abc import Iterator

from absl import flags

import cli

PACKAGES = ("ops", "models", "research")
_OUTPUT = flags.DEFINE_string("output", "runs/api", "folder of the pages")


def offered(module: types.ModuleType) -> list[str]:
  """Names that a package offers: those of `__all__`, or else all of its own.

  Its docstring says of constants what they are, since constants have none.
  """
  names = getattr(module, "__all__", None)
  if names is None:
    # A function may have the name of the module that it is from.
    names = [
      name
      for name, value in vars(module).items()
      if not name.startswith("_") and not inspect.ismodule(value)
    ]
  return sorted(names)


def modules() -> Iterator[tuple[str, bool]]:
  """Yields the name of every module, and whether it is a package."""
  for top in PACKAGES:
    yield top, True
    path = importlib.import_module(top).__path__
    for item in pkgutil.walk_packages(path, f"{top}."):
      if not item.name.endswith("__main__"):
        yield item.name, item.ispkg


def package(name: str) -> types.ModuleType:
  """Imports a package for pdoc, which takes names of `__all__` alone.

  All of them are bound: some packages find theirs at the first use.
  """
  importlib.import_module(name)
  # A function may hide the package of its name, but not from here.
  module = sys.modules[name]
  for own in offered(module):
    setattr(module, own, getattr(module, own))
  module.__all__ = offered(module)
  return module


def main(argv: list[str]) -> None:
  """Writes the pages."""
  del argv
  import pdoc
  from pdoc import render

  names = list(modules())
  for name, is_package in names:
    if is_package:
      package(name)
  render.configure(docformat="google", show_source=False)
  output = pathlib.Path(_OUTPUT.value)
  with warnings.catch_warnings(action="ignore", category=UserWarning):
    # pdoc warns of a function with the name of its module, and of types that it
    # shows as they are written.
    pdoc.pdoc(*(name for name, _ in names), output_directory=output)
  cli.say(f"pages: {output / 'index.html'}")


if __name__ == "__main__":
  cli.run(main)
