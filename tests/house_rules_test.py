"""Holds the tree to the floors of CONTRIBUTING.md, one test a rule.

A rule is a function from a root to its violations, one line each. Every rule
is also shown a small tree with a planted violation, so that none can go blind.
"""

import ast
import dataclasses
import functools
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
METHODS = {
  "sol",
  "language_model",
  "regression_lm",
  "program_metrics",
  "quantization",
  "lra",
  "codesign",
}
ABOVE_METHODS = {"bench", "results"}
TEXT = {".py", ".sh", ".md", ".toml", ".lock", ".flags", ".json", ".ipynb", ""}
MAX_BYTES, MOST_BYTES = 30_000, 20_000
SCRIPT_LINES, README_LINES = 150, 150
# Written apart, so that this file does not break its own rule.
MACHINE_PATHS = re.compile(
  r"(?<![\w.~$}])/(?:wor" + r"k|roo" + r"t)(?=[/\s\"'`)]|$)"
)
# Axis letters or sizes in brackets, such as (B, L, D), (..., K) or (V,).
SHAPE = re.compile(
  r"\((?:\.\.\.|[A-Z][\w+/*-]*|\w+ \* \w+|\d+)(?:, ?[-\w.+/* ]+)*,?\)"
)
ARRAY = re.compile(r"(?:jax\.Array|np\.ndarray|jnp\.ndarray)(?: \| None)?")
FLAG_MAKERS = {"integer", "number", "numbers", "choice"}
# What writes a file: all at once, or to what a draft's name opens.
WRITES = re.compile(r"\.save_file\(|(?<!files)\.write_(text|bytes)\(")
WRITES_DRAFTS = re.compile(
  r"""\bopen\([^)]*["'][wx]|np\.savez?\w*\(|\.savefig\(\S"""
  r"|\b(json|pickle)\.dump\(|\.tofile\("
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


def holding(word: str, root: Path, *folders: str) -> list[Path]:
  """The files with a word, so that no other is parsed for it."""
  found = files(root, *folders)
  return [path for path in found if word in path.read_text(encoding="utf-8")]


def imports(path: Path) -> list[tuple[int, str]]:
  """(line, dotted name) of every absolute import, also nested ones."""
  return imports_of(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(text: str) -> list[tuple[int, str]]:
  """`imports` of a file's text; half of the rules ask for them."""
  found = []
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      for alias in node.names:
        found.append((node.lineno, f"{node.module}.{alias.name}"))
  return found


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


def methods_stand_alone(root: Path) -> list[str]:
  """No room but those that measure or show methods knows one of another room.

  What two methods need lives in a shared room of research/.
  """
  return [
    f"{path.relative_to(root)}:{line}: imports {name}: methods stand alone,"
    " what two rooms need goes to a shared one"
    for path in files(root, "research")
    for line, name in imports(path)
    for room in [path.relative_to(root).parts[1]]
    if room not in ABOVE_METHODS
    and name.split(".")[0] == "research"
    and name.split(".")[1] in METHODS - {room}
  ]


def configs_are_told_apart_at_one_door(root: Path) -> list[str]:
  return [
    f"{path.relative_to(root)}:{number}: asks which model a config is: let "
    "models/language_model.py or the config answer"
    for path in files(root, "research", "experiments")
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"isinstance\([^()]*, (Mamba|Transformer)Config\)", line)
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
  for path in holding("nnx", root, *FLOORS):
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
    for path in holding("PRNGKey", root, *FLOORS, "tests")
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


def files_are_written_whole(root: Path) -> list[str]:
  """No file that a killed process leaves half, or its owner alone may read.

  What opens or saves by a library takes a name or a stream of a draft.
  """
  return [
    f"{path.relative_to(root)}:{number}: writes by hand: models/files.py does"
    for path in files(root, *FLOORS)
    if path.relative_to(root) != Path("models/files.py")
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if WRITES.search(line)
    or (WRITES_DRAFTS.search(line) and not re.search("draft|stream", line))
  ]


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


def short_readme(root: Path) -> list[str]:
  path = root / "README.md"
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  if len(lines) <= README_LINES:
    return []
  why = f"move it to docs/ (at most {README_LINES})"
  return [f"README.md: {len(lines)} lines: {why}"]


def _says_shape(docstring: str, name: str) -> bool:
  """Whether a docstring gives the shape of the array argument `name`."""
  if "as in `" in docstring or "as for `" in docstring:
    return True
  if "Args:" not in docstring:
    return bool(SHAPE.search(docstring))
  entry = re.search(
    rf"^  (?:\w+, )*{name}(?:, \w+)*: (.*(?:\n(?:    .*)?)*)", docstring, re.M
  )
  text = entry[1] if entry else ""
  return bool(SHAPE.search(text)) or any(
    word in text for word in ("calar", "broadcasts")
  )


def shapes_in_docstrings(root: Path) -> list[str]:
  """Of array arguments of public functions; parts of kernels are left out."""
  found = []
  for path in files(root, "ops", "models"):
    if path.stem.startswith("mosaic_"):
      continue
    for node in parse(path).body:
      if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
        continue
      arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
      found += [
        f"{path.relative_to(root)}:{node.lineno}: {node.name}: the docstring"
        f" gives no shape of {argument.arg}, such as (B, L, D)"
        for argument in arguments
        if argument.annotation is not None
        and argument.arg != "key"
        and ARRAY.fullmatch(ast.unparse(argument.annotation))
        and not _says_shape(ast.get_docstring(node) or "", argument.arg)
      ]
  return found


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag of experiments/.

  Attributes:
    script: that defines it.
    name: without dashes.
    holder: the variable that holds it, "" for none.
    source: the file of the dataclass whose field it is, or None.
    owner: that class, "" for none.
  """

  script: Path
  name: str
  holder: str = ""
  source: Path | None = None
  owner: str = ""


def _flags(root: Path) -> Iterator[Flag]:
  """Yields every flag of experiments/."""
  for path in sorted((root / "experiments").glob("*.py")):
    tree = parse(path)
    origin = {
      name.rpartition(".")[2]: name.rpartition(".")[0]
      for _, name in imports(path)
    }
    assigned = {
      id(node.value): target.id
      for node in ast.walk(tree)
      if isinstance(node, ast.Assign)
      for target in node.targets
      if isinstance(target, ast.Name)
    }
    # What `_of(...)` of bench_flags gives takes a kind of flag first.
    makers = {
      assigned.get(id(node), "")
      for node in ast.walk(tree)
      if isinstance(node, ast.Call) and ast.unparse(node.func) == "_of"
    }
    for node in ast.walk(tree):
      if not (isinstance(node, ast.Call) and node.args):
        continue
      called = ast.unparse(node.func)
      first = node.args[called in makers]
      maker = called.rpartition(".")[2]
      if isinstance(first, ast.Constant) and (
        maker.startswith("DEFINE_")
        or called in makers
        or (called.startswith("cli.") and maker in FLAG_MAKERS)
      ):
        yield Flag(path, first.value, assigned.get(id(node), ""))
      if called == "option_flags.define":
        source = root / f"{origin[first.id].replace('.', '/')}.py"
        for item in parse(source).body:
          if isinstance(item, ast.ClassDef) and item.name == first.id:
            yield from (
              Flag(path, field.target.id, "", source, first.id)
              for field in item.body
              if isinstance(field, ast.AnnAssign)
            )


def flags_in_use(root: Path) -> tuple[set[str], set[tuple[str, str]]]:
  """Names that a flagfile, a page, a result or a test uses as flags.

  And (class, field) of the keywords that tests make dataclasses with.
  """
  pages = [root / "README.md", root / "Makefile", *root.glob("docs/**/*.md")]
  pages += [*root.glob("experiments/flagfiles/*.flags")]
  pages += [*root.glob("experiments/results/**/*.json")]
  tests = files(root, "tests")
  text = "\n".join(
    path.read_text(encoding="utf-8") for path in [*pages, *tests]
    if path.exists()
  )  # fmt: skip
  used = set(re.findall(r"--(?:no(?=\w))?(\w+)", text))
  used |= set(re.findall(r"--(\w+)", text))
  made = {
    (ast.unparse(node.func).rpartition(".")[2], keyword.arg)
    for path in tests
    for node in ast.walk(parse(path))
    if isinstance(node, ast.Call)
    for keyword in node.keywords
  }
  return used, made


def used_flags(root: Path) -> list[str]:
  """No flag that neither a flagfile, a page, a result nor a test uses."""
  used, made = flags_in_use(root)
  return [
    f"{flag.script.relative_to(root)}: nothing uses --{flag.name}: say in docs/"
    " what it is for, or make it a constant"
    for flag in _flags(root)
    if flag.name not in used and (flag.owner, flag.name) not in made
  ]


def read_flags(root: Path) -> list[str]:
  """No flag whose value nothing reads.

  That of a holder is read by its script, or by one that imports the script;
  that of a dataclass by a file of the same room of research/ or by a model, as
  an attribute or by its name.
  """
  scripts = {
    path: path.read_text(encoding="utf-8")
    for path in files(root, "experiments")
  }
  words = {
    path: _names_read(path) for path in files(root, "research", "models")
  }

  def is_read(flag: Flag) -> bool:
    if flag.source is None:
      text = scripts[flag.script]
      if not flag.holder:
        return "flags.FLAGS[" in text
      own = re.compile(rf"(?<![\w.]){flag.holder}\b")
      other = re.compile(rf"\b{flag.script.stem}\.{flag.holder}\b")
      return len(own.findall(text)) > 1 or any(
        map(other.search, scripts.values())
      )
    room = flag.source.relative_to(root).parts[:2]
    return any(
      flag.name in found
      for path, found in words.items()
      if path.relative_to(root).parts[:2] == room
      or path.is_relative_to(root / "models")
    )

  return [
    f"{flag.script.relative_to(root)}: nothing reads the value of --{flag.name}"
    for flag in _flags(root)
    if not is_read(flag)
  ]


def _names_read(path: Path) -> set[str]:
  """Attributes that a file reads, and the strings in it."""
  found = set()
  for node in ast.walk(parse(path)):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      found.add(node.attr)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      found.add(node.value)
  return found


def first_comments_in_docs(root: Path) -> list[str]:
  """What scripts and flagfiles say of themselves stands in a page."""
  page = root / "docs" / "experiments.md"
  said = page.read_text(encoding="utf-8") if page.exists() else ""
  found = []
  scripts = [
    path for path in files(root, "experiments")
    if path.parent.name == "experiments" and "__main__" in path.read_text()
  ]  # fmt: skip
  for path in scripts + sorted(root.glob("experiments/flagfiles/*.flags")):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
      comment = ast.get_docstring(ast.parse(text)) or ""
    else:
      lines = re.match(r"(?:#.*\n)*", text)[0].splitlines()
      comment = "\n".join(line.lstrip("# ") for line in lines)
    section = said.partition(f"### `{path.name}`\n")[2].partition("\n### ")[0]
    missing = set(re.findall(r"[\w.]+", comment)) - set(
      re.findall(r"[\w.]+", section)
    )
    if missing or not section:
      found.append(
        f"docs/experiments.md: lacks the first comment of {path.name}:"
        " run experiments/docs_tables.py"
      )
  return found


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
    methods_stand_alone,
    configs_are_told_apart_at_one_door,
    flags_in_experiments_only,
    chex_in_tests_only,
    no_triton,
    no_lifted_nnx,
    new_style_keys,
    file_sizes,
    files_are_written_whole,
    short_scripts,
    public_docstrings,
    no_addresses,
    lock_is_complete,
    collected_test_names,
    short_readme,
    shapes_in_docstrings,
    used_flags,
    read_flags,
    first_comments_in_docs,
    no_arrays_at_import,
  )
}

DOC = '"""One."""\n'
F = "def f(x: jax.Array, y: jax.Array | None):\n"
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
  "methods_stand_alone": [
    ("research/sol/a.py", DOC + "from research import language_model\n"),
    ("research/lra/b.py", DOC + "from research.sol.a import x\n"),
    ("research/text/a.py", DOC + "def f():\n  import research.sol.a\n"),
  ],
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
  "configs_are_told_apart_at_one_door": [
    ("research/a.py", DOC + "x = isinstance(c, MambaConfig)\n")
  ],
  "new_style_keys": [("ops/a.py", DOC + "k = lambda: jax.random.PRNGKey(0)\n")],
  "file_sizes": [
    ("ops/a.py", DOC + "#" * 30_001),
    ("models/a.py", DOC + "#" * 20_001),
  ],
  "files_are_written_whole": [
    ("models/a.py", DOC + "safetensors.numpy.save_file({}, 'a')\n"),
    ("research/a.py", DOC + "path.write_text('a')\n"),
    ("research/b.py", DOC + "with open(path, 'w') as f:\n  np.save(f, x)\n"),
    ("research/c.py", DOC + "with draft.open('wb') as stream:\n  pass\n"),
    ("models/files.py", DOC + "path.write_bytes(b'a')\n"),
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
  "short_readme": [("README.md", "x\n" * 151)],
  "shapes_in_docstrings": [
    ("ops/a.py", DOC + F + '  """Adds 1 (that is all) to x."""\n'),
    (
      "models/b.py",
      DOC + F + '  """Adds.\n\n  Args:\n    x: some.\n    y: (B, L).\n  """\n',
    ),
  ],
  "used_flags": [
    ("experiments/a.py", DOC + 'A = flags.DEFINE_bool("lost", 0, "")\n'),
    (
      "experiments/b.py",
      DOC + "from research.o import O\nB = option_flags.define(O)\n",
    ),
    ("research/o.py", DOC + "class O:\n  found: int = 1\n  missed: int = 2\n"),
    ("docs/a.md", "`--found=3`, and `--nothing`\n"),
    ("tests/a_test.py", "x = f(lost=1, missed=2)\n"),
  ],
  "read_flags": [
    (
      "experiments/a.py",
      DOC + '_A = flags.DEFINE_bool("lost", 0, "")\n'
      '_B = flags.DEFINE_bool("found", 0, "")\nprint(_B.value)\n',
    ),
    (
      "experiments/b.py",
      DOC + "from research.sol.o import O\nB = option_flags.define(O)\n",
    ),
    (
      "research/sol/o.py",
      DOC + "class O:\n  seen: int = 1\n  missed: int = 2\n",
    ),
    ("research/sol/p.py", DOC + "def f(o):\n  return o.seen\n"),
    ("research/lra/p.py", DOC + "def f(o):\n  return o.missed\n"),
  ],
  "first_comments_in_docs": [
    ("experiments/a.py", DOC + 'if __name__ == "__main__":\n  pass\n'),
    ("experiments/flagfiles/b.flags", "# Some minutes.\n--x=1\n"),
    ("experiments/flagfiles/c.flags", "# Seconds.\n--x=1\n"),
    (
      "docs/experiments.md",
      "### `b.flags`\n\nMany\n\n### `c.flags`\n\nSeconds.",
    ),
  ],
  "no_arrays_at_import": [
    ("ops/__init__.py", DOC),
    ("ops/a.py", DOC + "import jax.numpy as jnp\nX = jnp.ones(2)\n"),
    ("ops/deep/__init__.py", DOC),
    ("ops/deep/b.py", DOC + "import numpy as np\nX = np.ones(2)\n"),
  ],
}
EXPECTED = {
  "first_comments_in_docs": 2,
  "shapes_in_docstrings": 3,
  "used_flags": 2,
  "read_flags": 2,
  "file_sizes": 2,
  "files_are_written_whole": 4,
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
