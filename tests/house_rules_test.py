"""Holds the tree to the floors of CONTRIBUTING.md, one test a rule.

A rule is a function from a root to its violations, one line each. Every rule
is also shown a small tree with a planted violation, so that none can go blind.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("ops", "models", "research", "experiments")
PACKAGES = FLOORS[:3]
TEXT = {".py", ".sh", ".md", ".toml", ".lock", ".flags", ".json", ".ipynb", ""}
MAX_BYTES, MOST_BYTES, SCRIPT_LINES = 30_000, 20_000, 150
# Written apart, so that this file does not break its own rule.
MACHINE_PATHS = re.compile(
  r"(?<![\w.~$}])/(?:wor" + r"k|roo" + r"t)(?=[/\s\"'`)]|$)"
)
INDEXES = re.compile("index" + "-url|find" + "-links|pypi" + r"\.org/simple")
NNX_FORBIDDEN = {"jit", "grad", "value_and_grad", "Optimizer", "scan"}
TRITON = ("jax.experimental.pallas.triton", "jax.experimental.pallas.ops")


def files(root: Path, *folders: str, suffix: str = ".py") -> list[Path]:
  return sorted(
    path for folder in folders for path in (root / folder).rglob(f"*{suffix}")
    if "__pycache__" not in path.parts
  )  # fmt: skip


def tracked(root: Path) -> list[Path]:
  """The repository's files: by git where there is git, else all visible."""
  listing = ["git", "ls-files", "-z", "--cached", "--others"]
  done = subprocess.run(
    [*listing, "--exclude-standard"], cwd=root, capture_output=True, text=True
  )
  if done.returncode == 0 and (root / ".git").exists():
    found = [root / name for name in done.stdout.split("\0") if name]
  else:
    skipped = {"__pycache__", "runs", "build"}
    found = [
      path for path in root.rglob("*")
      if not any(
        part in skipped or (part.startswith(".") and part != ".ci")
        for part in path.relative_to(root).parts
      )
    ]  # fmt: skip
  return sorted(path for path in found if path.is_file())


def parse(path: Path) -> ast.Module:
  return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
  """Yields (line, dotted name) of every absolute import, also nested ones."""
  for node in ast.walk(parse(path)):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      for alias in node.names:
        yield node.lineno, f"{node.module}.{alias.name}"


def banned_imports(root, folders, banned, why) -> list[str]:
  return [
    f"{path.relative_to(root)}:{line}: imports {name}: {why}"
    for path in files(root, *folders)
    for line, name in imports(path)
    if any(name == item or name.startswith(f"{item}.") for item in banned)
  ]


def import_direction(root: Path) -> list[str]:
  scripts = [path.stem for path in (root / "experiments").glob("*.py")]
  order = " <- ".join(FLOORS)
  found = []
  for level, floor in enumerate(FLOORS):
    above = [*FLOORS[level + 1 :], "tests", "launch"]
    above += [] if floor == "experiments" else scripts
    found += banned_imports(root, [floor], above, f"imports go {order}")
  return found + banned_imports(
    root, ["launch"], [*FLOORS, "tests", *scripts], "launch stands alone"
  )


def ops_need_jax_and_numpy_only(root: Path) -> list[str]:
  allowed = {"ops", "jax", "jaxlib", "numpy"} | sys.stdlib_module_names
  return [
    f"{path.relative_to(root)}:{line}: imports {name}: ops take jax and numpy"
    for path in files(root, "ops")
    for line, name in imports(path)
    if name.split(".")[0] not in allowed
  ]


def flags_in_experiments_only(root: Path) -> list[str]:
  return banned_imports(
    root,
    [*PACKAGES, "launch"],
    ["absl.flags", "absl.app"],
    "flags live in experiments/; pass a frozen config instead",
  )


def chex_in_tests_only(root: Path) -> list[str]:
  why = "chex is for tests; use jax.tree_util.register_dataclass"
  return banned_imports(root, [*FLOORS, "launch"], ["chex"], why)


def no_triton(root: Path) -> list[str]:
  why = "Pallas Triton is deprecated; GPU kernels are Mosaic GPU"
  return banned_imports(root, FLOORS, [*TRITON, "jax_triton"], why)


def no_lifted_nnx(root: Path) -> list[str]:
  found = []
  for path in files(root, *FLOORS):
    for node in ast.walk(parse(path)):
      if (
        isinstance(node, ast.Attribute)
        and node.attr in NNX_FORBIDDEN
        and ast.unparse(node.value).split(".")[-1] == "nnx"
      ):
        found.append((path, node.lineno, node.attr))
    for line, name in imports(path):
      module, _, attribute = name.rpartition(".")
      if module == "flax.nnx" and attribute in NNX_FORBIDDEN:
        found.append((path, line, attribute))
  return [
    f"{path.relative_to(root)}:{line}: nnx.{name}: split the module and use jax"
    for path, line, name in found
  ]


def new_style_keys(root: Path) -> list[str]:
  return [
    f"{path.relative_to(root)}:{node.lineno}: PRNGKey: use jax.random.key"
    for path in files(root, *FLOORS, "tests")
    for node in ast.walk(parse(path))
    if "PRNGKey" in (getattr(node, "attr", ""), getattr(node, "id", ""))
  ]


def file_sizes(root: Path) -> list[str]:
  sizes = {
    path.relative_to(root): path.stat().st_size
    for path in files(root, *FLOORS, "launch", "tests")
  }
  found = [
    f"{path}: {size} bytes: split it (at most {MAX_BYTES})"
    for path, size in sizes.items()
    if size > MAX_BYTES
  ]
  large = sorted(str(path) for path in sizes if sizes[path] > MOST_BYTES)
  if len(large) * 10 > len(sizes):
    found.append(f"over 10% exceed {MOST_BYTES} bytes: {', '.join(large)}")
  return found


def short_scripts(root: Path) -> list[str]:
  counts = {
    path.name: len(path.read_text(encoding="utf-8").splitlines())
    for path in (root / "experiments").glob("*.py")
  }
  return [
    f"experiments/{name}: {count} lines: move work to research/"
    f" (less than {SCRIPT_LINES})"
    for name, count in sorted(counts.items())
    if count >= SCRIPT_LINES
  ]


def public_docstrings(root: Path) -> list[str]:
  found = []
  for path in files(root, *PACKAGES):
    tree = parse(path)
    if not ast.get_docstring(tree):
      found.append(f"{path.relative_to(root)}:1: the module has no docstring")
    for node in tree.body:
      if (
        isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
      ):
        where = f"{path.relative_to(root)}:{node.lineno}"
        found.append(f"{where}: {node.name} has no docstring")
  return found


def no_addresses(root: Path) -> list[str]:
  found = []
  for path in tracked(root):
    below = path.relative_to(root)
    if path.suffix not in TEXT or below.parts[0] == "data":
      continue
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
      for pattern in (MACHINE_PATHS, INDEXES):
        if match := pattern.search(line):
          found.append(f"{below}:{number}: {match[0]!r} is of one machine")
  return found


def lock_is_complete(root: Path) -> list[str]:
  """`name==version` lines only, and every declared dependency among them."""
  found, pinned = [], {}
  text = (root / "requirements.lock").read_text(encoding="utf-8")
  for number, line in enumerate(text.splitlines(), 1):
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([\w.+!]+)", line)
    if match:
      pinned[canonicalize_name(match[1])] = match[2]
    else:
      found.append(f"requirements.lock:{number}: not name==version: {line!r}")
  project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
  extras = project.get("optional-dependencies", {}).get("dev", [])
  for requirement in map(Requirement, project["dependencies"] + extras):
    version = pinned.get(canonicalize_name(requirement.name))
    if version is None or version not in requirement.specifier:
      found.append(f"requirements.lock: {requirement} is not met by {version}")
  return found


def collected_test_names(root: Path) -> list[str]:
  return [
    f"{path.relative_to(root)}: has tests, but its name does not end in _test"
    for path in files(root, "tests")
    if not path.stem.endswith("_test")
    and any(
      isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
      for node in parse(path).body
    )
  ]


# Any array made while importing starts a backend, and this one does not exist.
IMPORT_ALL = """
import importlib, json, pkgutil, sys, traceback
import numpy as np
found = []
for package in sys.argv[1:]:
  names = [package]
  for name in names:
    if name.endswith("__main__"):
      continue
    try:
      module = importlib.import_module(name)
    except Exception as error:
      frames = traceback.extract_tb(error.__traceback__)
      line = next((f.lineno for f in reversed(frames)
                   if f.filename.startswith(sys.path[0])), 0)
      found.append(f"{name}:{line}: import failed: {error}")
      continue
    for key, value in vars(module).items():
      if isinstance(value, np.ndarray):
        found.append(f"{name}: {key} is an array made at import")
    for item in pkgutil.iter_modules(getattr(module, "__path__", [])):
      names.append(f"{name}.{item.name}")
print(json.dumps(found))
"""


def no_arrays_at_import(root: Path) -> list[str]:
  packages = [name for name in PACKAGES if (root / name).is_dir()]
  code = f"import sys; sys.path.insert(0, {str(root)!r})\n{IMPORT_ALL}"
  done = subprocess.run(
    [sys.executable, "-c", code, *packages],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, "JAX_PLATFORMS": "none_while_importing"},
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


RULES = {
  rule.__name__: rule
  for rule in (
    import_direction,
    ops_need_jax_and_numpy_only,
    flags_in_experiments_only,
    chex_in_tests_only,
    no_triton,
    no_lifted_nnx,
    new_style_keys,
    file_sizes,
    short_scripts,
    public_docstrings,
    no_addresses,
    lock_is_complete,
    collected_test_names,
    no_arrays_at_import,
  )
}

DOC = '"""One."""\n'
PROJECT = '[project]\nname="x"\ndependencies=["jax<0.13"]\n'
PLANTED = {
  "import_direction": [
    ("ops/a.py", DOC + "def f():\n  from models import b\n"),
    ("models/a.py", DOC + "import research.core\n"),
    ("research/a.py", DOC + "import cli\n"),
    ("research/b.py", DOC + "from experiments import cli\n"),
    ("experiments/a.py", DOC + "from tests import b\n"),
    ("launch/a.py", DOC + "import ops\n"),
  ],
  "ops_need_jax_and_numpy_only": [("ops/a.py", DOC + "import scipy.fft\n")],
  "flags_in_experiments_only": [
    ("research/a.py", DOC + "from absl import flags\n"),
    ("models/a.py", DOC + "import absl.flags as f\n"),
  ],
  "chex_in_tests_only": [("models/a.py", DOC + "import chex\n")],
  "no_triton": [
    ("ops/a.py", DOC + "from jax.experimental.pallas import triton\n"),
    ("ops/b.py", DOC + "import jax.experimental.pallas.ops.gpu.softmax\n"),
  ],
  "no_lifted_nnx": [
    ("models/a.py", DOC + "from flax import nnx\nf = nnx.jit(len)\n"),
    ("models/b.py", DOC + "import flax\nf = flax.nnx.scan(len)\n"),
    ("models/c.py", DOC + "from flax.nnx import Optimizer\n"),
  ],
  "new_style_keys": [("ops/a.py", DOC + "k = lambda: jax.random.PRNGKey(0)\n")],
  "file_sizes": [
    ("ops/a.py", DOC + "#" * 30_001),
    ("models/a.py", DOC + "#" * 20_001),
  ],
  "short_scripts": [("experiments/a.py", DOC + "x = 1\n" * 149)],
  "public_docstrings": [
    ("ops/a.py", "x = 1\n"),
    ("ops/b.py", DOC + "def f():\n  pass\n\ndef _g():\n  pass\n"),
    ("ops/c.py", DOC + "class C:\n  x = 1\n"),
  ],
  "no_addresses": [
    ("launch/a.sh", "cd /wor" + "k/main\n"),
    ("README.md", "run `cd /roo" + "t`\n"),
    ("requirements.lock", "--index" + "-url https://x\n"),
  ],
  "lock_is_complete": [
    ("requirements.lock", "jax==0.13.0\n-e .\nnumpy>=2\n"),
    ("pyproject.toml", PROJECT),
  ],
  "collected_test_names": [
    ("tests/test_a.py", DOC + "def test_x():\n  pass\n")
  ],
  "no_arrays_at_import": [
    ("ops/__init__.py", DOC),
    ("ops/a.py", DOC + "import jax.numpy as jnp\nX = jnp.ones(2)\n"),
    ("ops/deep/__init__.py", DOC),
    ("ops/deep/b.py", DOC + "import numpy as np\nX = np.ones(2)\n"),
  ],
}
EXPECTED = {
  "file_sizes": 2,
  "lock_is_complete": 3,
  "no_arrays_at_import": 2,
}


def test_a_rule_a_plant():
  assert RULES.keys() == PLANTED.keys()


@pytest.mark.parametrize("name", RULES)
def test_the_tree_keeps_the_rule(name):
  violations = RULES[name](ROOT)
  assert not violations, f"{name}:\n" + "\n".join(violations)


@pytest.mark.parametrize("name", RULES)
def test_the_rule_sees_a_planted_violation(name, tmp_path):
  for path, text in PLANTED[name] + [("experiments/cli.py", DOC)]:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
  violations = RULES[name](tmp_path)
  assert len(violations) == EXPECTED.get(name, len(PLANTED[name])), violations
