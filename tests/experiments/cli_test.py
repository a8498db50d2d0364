"""Scripts' flags, one-line errors and result files, in processes of their own.

A process a case, because absl's flags are global to one.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
'''Shows what a script shares.'''
import os, signal
import cli
from models import input_files
from models.errors import InputError
STEPS = cli.integer("steps", 3, "how many steps", lower=1, upper=9)
RATE = cli.number("rate", 0.5, "the rate", lower=0.0, upper=1.0)
BUDGETS = cli.numbers("budgets", [0.3, 0.6], "the grid", lower=0.0, upper=1.0)
PRESET = cli.choice("preset", "a2", "the preset", ["a2", "b3"])
DO = cli.choice("do", "", "what", ["", "input", "bug", "stop", "deny", "end",
                                      "memory", "full", "compiled", "unpack"])

class Ended(Exception):
  exit_code = 143

def main(_):
  if DO.value == "input":
    raise InputError("model.gguf: is\\ntruncated")
  if DO.value == "bug":
    raise RuntimeError("a bug")
  if DO.value == "memory":
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9.0GiB.\\n[x]")
  if DO.value == "full":
    raise ValueError("RESOURCE_EXHAUSTED: write: No space left on device")
  if DO.value == "compiled":
    print(os.environ["JAX_COMPILATION_CACHE_DIR"])
  if DO.value == "unpack":
    print(len(input_files.read_bytes(os.environ["PACKED"])))
  if DO.value == "stop":
    # A shell that starts tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
  if DO.value == "end":
    raise Ended("saved in x:\\nthe same command goes on")
  if DO.value == "deny":
    open("/proc/version/x")
  print(STEPS.value, RATE.value, BUDGETS.value, PRESET.value)

if __name__ == "__main__":
  cli.run(main)
"""


def python(*arguments, **environment):
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
  )


@pytest.fixture(scope="module")
def script(tmp_path_factory):
  """The script beside the modules it needs alone: without flax it is quick."""
  home = tmp_path_factory.mktemp("cli")
  for name in (
    "experiments/cli.py",
    "experiments/flag_kinds.py",
    "models/errors.py",
    "models/files.py",
    "models/locate.py",
    "models/text.py",
    "research/core/files.py",
    "research/results/files.py",
  ):
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, home / name)
  path = home / "experiments" / "show.py"
  path.write_text(SCRIPT)
  return path


def test_flags_and_flagfile_reach_main(script, tmp_path):
  flagfile = tmp_path / "x.flags"
  flagfile.write_text("# a comment\n--steps=4\n--budgets=0.25,1\n")
  done = python(script, f"--flagfile={flagfile}", "--preset=b3")
  assert done.returncode == 0, done.stderr
  assert done.stdout == "4 0.5 [0.25, 1.0] b3\n"


@pytest.mark.parametrize(
  "argument, says",
  [
    ("--steps=0", "steps"),
    ("--steps=many", "steps"),
    ("--rate=nan", "rate"),
    ("--rate=1.5", "rate"),
    ("--budgets=0.3,2", "2.0 is not in [0, 1]"),
    ("--budgets=", "budgets"),
    ("--preset=c4", "<a2|b3>"),
    ("--stepz=4", "Did you mean: steps"),
    ("--flagfile=missing.flags", "missing.flags"),
    ("stray", "unexpected argument 'stray'"),
    ("--do=input", "model.gguf: is truncated"),
    ("--do=memory", "too little memory left: Out of memory: 9.0GiB.; smaller"),
    ("--do=deny", "/proc/version/x: Not a directory"),
    ("--do=full", "the disk: no space is left: make room, and the same"),
  ],
)
def test_a_mistake_is_one_line_and_exit_2(script, argument, says):
  done = python(script, argument)
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("error: ") and says in done.stderr
  assert done.stderr.count("\n") == 1


def test_compiled_programs_are_kept_where_nobody_says_otherwise(
  script, tmp_path
):
  told = {"XDG_CACHE_HOME": str(tmp_path), "HOME": "/home/someone"}
  folder = lambda **more: python(
    "-c",
    "import os, runpy, sys; os.environ.pop('JAX_COMPILATION_CACHE_DIR', 0);"
    "os.environ.update(eval(sys.argv[1])); sys.argv = sys.argv[2:];"
    "sys.path.insert(0, os.path.dirname(sys.argv[0]));"
    "runpy.run_path(sys.argv[0], run_name='__main__')",
    told | more,
    script,
    "--do=compiled",
  ).stdout.splitlines()[0]
  assert folder() == str(tmp_path / "frugax" / "jax")
  assert folder(XDG_CACHE_HOME="") == "/home/someone/.cache/frugax/jax"
  assert folder(JAX_COMPILATION_CACHE_DIR="/there") == "/there"


def test_ctrl_c_is_one_line_and_exit_130(script):
  done = python(script, "--do=stop")
  assert (done.returncode, done.stderr) == (130, "interrupted\n")
  assert signal.SIGINT + 128 == 130


def test_a_run_that_ended_early_is_one_line_and_its_own_exit_code(script):
  done = python(script, "--do=end")
  assert done.returncode == 143
  assert done.stderr == "saved in x: the same command goes on\n"


def test_a_bug_shows_its_trace(script):
  done = python(script, "--do=bug")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "a bug" in done.stderr


def test_help_lists_the_scripts_flags_and_succeeds(script):
  done = python(script, "--help")
  assert done.returncode == 0
  for name in ("steps", "rate", "budgets", "preset"):
    assert f"--{name}" in done.stdout or f"--[no]{name}" in done.stdout


def test_write_result(tmp_path):
  path = tmp_path / "deep" / "result.json"
  code = f"""
    import cli, numpy as np
    rows = [dict(metric="ppl", value=np.float32(1.5), low=float("nan"),
                 seeds=np.arange(2))]
    cli.write_result({str(path)!r}, [], "python x.py", 1.0)
    cli.write_result({str(path)!r}, rows, "python x.py", 2.0, note="n")
  """
  paths = f"{ROOT / 'experiments'}{os.pathsep}{ROOT}"
  done = python("-c", textwrap.dedent(code), PYTHONPATH=paths)
  assert done.returncode == 0, done.stderr
  found = json.loads(path.read_text())
  assert found["command"] == "python x.py"
  assert found["device"] == "cpu x1"
  assert found["seconds"] == 2.0 and found["note"] == "n"
  assert set(found["versions"]) >= {"python", "jax", "flax", "optax"}
  assert found["rows"] == [
    {"metric": "ppl", "value": 1.5, "low": None, "seeds": [0, 1]}
  ]
  assert '"seeds": [0, 1]' in path.read_text()
  assert [item.name for item in path.parent.iterdir()] == ["result.json"]


def test_commit_marks_changed_code_but_not_changed_results(tmp_path):
  git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
  home = tmp_path / "experiments"
  (home / "results").mkdir(parents=True)
  module = tmp_path / "research" / "results" / "files.py"
  module.parent.mkdir(parents=True)
  source = (ROOT / "research" / "results" / "files.py").read_text()
  module.write_text(source)
  (home / "results" / "a.json").write_text("1")

  def commit(**environment):
    code = "import files; print(files.commit())"
    environment["PYTHONPATH"] = str(module.parent)
    return python("-c", code, **environment).stdout.strip()

  outside = {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
  assert commit(**outside) == "None"
  assert commit(FRUGAX_COMMIT="abc", **outside) == "abc"
  for step in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
    subprocess.run([*git, *step], cwd=tmp_path, check=True)
  head = commit()
  assert len(head) == 40
  (home / "results" / "a.json").write_text("2")
  assert commit() == head
  module.write_text(source + "# changed\n")
  assert commit() == f"{head}+dirty"


def test_a_packed_file_unpacks_to_a_bound(script, tmp_path):
  path = tmp_path / "a.gz"
  path.write_bytes(gzip.compress(bytes(40_000_000), 1))
  done = python(script, "--do=unpack", PACKED=str(path))
  assert done.returncode == 2 and "--most_unpacked_mb" in done.stderr
  done = python(
    script, "--do=unpack", "--most_unpacked_mb=50", PACKED=str(path)
  )
  assert done.returncode == 0 and "40000000" in done.stdout


@pytest.mark.parametrize(
  "content",
  [b"--steps\n", b"\xff\xfe--steps=3", b"--preset=a\0b", b"--nosteps=3\n",
   b"--steps=" + b"9" * 5000, b"--flagfile={}\n", b"--st" + b"a, " * 40_000],
)  # fmt: skip
def test_flagfiles_that_are_none_are_one_line(script, tmp_path, content):
  path = tmp_path / "f.flags"
  path.write_bytes(content.replace(b"{}", str(path).encode()))
  done = python(script, f"--flagfile={path}")
  if content.startswith(b"--flagfile"):
    assert done.returncode in (0, 2)
  else:
    assert done.returncode == 2
  assert "Traceback" not in done.stderr
  assert len(done.stderr) < 1200 and done.stderr.count("\n") <= 1
