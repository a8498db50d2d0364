"""Checkpoints: atomic, checked, and the only place that touches Orbax.

A checkpoint is a folder `<step>` with the arrays as Orbax writes them
(`state/`) and `manifest.json`: the tree with shapes and types, and a checksum
of every file. It appears by one rename, so it is whole or absent. Checksums are
our own because array data with a flipped bit loads without an error otherwise.
"""

import contextlib
import functools
import hashlib
import logging
import multiprocessing
import pathlib
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from models import input_files
from models.errors import InputError, reason, shown
from research.core import files, processes
from research.core import mesh as mesh_lib

Tree = Any

_MANIFEST = "manifest.json"
_STATE = "state"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Checkpointer:
  """Keeps the newest `keep` checkpoints of a run in `directory`.

  The directory is on a file system with atomic rename: a local disk, a mount.
  `run` names the run, such as a digest of its flags: checkpoints of another one
  are found out.
  """

  def __init__(
    self, directory: str | pathlib.Path, keep: int = 3, run: str | None = None
  ):
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._run = run

  @property
  def directory(self) -> pathlib.Path:
    """Where the checkpoints are."""
    return self._directory

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first; damaged ones included."""
    if not self._directory.is_dir():
      return []
    names = [path.name for path in self._directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())

  def save(self, step: int, state: Tree) -> None:
    """Writes `state` as checkpoint `step` and drops those beyond `keep`.

    Args:
      step: number of updates done.
      state: pytree of arrays; typed keys are allowed.

    Raises:
      InputError: `step` exists with other content; it is left as it is.
    """
    if mesh_lib.is_spread(state):
      state = mesh_lib.to_writer(state)
    processes.from_writer(lambda: self._save(step, state))

  def _save(self, step: int, state: Tree) -> None:
    target = self._directory / str(step)
    content = _content_digest(state)
    if target.exists():
      if _manifest_or_empty(target).get("content") == content:
        return
      raise InputError(
        f"checkpoint {target} exists with other content:"
        " give another --workdir, or move it away"
      )
    files.remove_drafts(self._directory)
    with files.whole_folder(target) as draft:
      with _quiet_orbax():
        _alone(ocp.save, draft / _STATE, _to_arrays(state))
      manifest = {
        "step": step,
        "run": self._run,
        "leaves": _signature(state),
        "content": content,
        "files": _file_digests(draft),
      }
      files.write_json(draft / _MANIFEST, manifest)
    for old in self.steps()[: -self._keep]:
      shutil.rmtree(self._directory / str(old))

  def restore(self, step: int, abstract_state: Tree) -> Tree:
    """Loads checkpoint `step` and leaves the folder as it is.

    Args:
      step: of the checkpoint.
      abstract_state: as `restore_latest`.

    Raises:
      InputError: it is absent, damaged, or does not fit.
    """
    path = self._directory / str(step)

    def read(abstract_state):
      try:
        return step, _load(path, abstract_state, self._run)
      except _Unusable as error:
        raise InputError(f"{path}: {error}") from error

    return _everywhere(read, abstract_state)[1]

  def restore_latest(self, abstract_state: Tree) -> tuple[int, Tree] | None:
    """Loads the newest checkpoint that is whole and fits.

    Each newer one that is not is told in a line on stderr and renamed to
    `<step>.unusable`, so that the run can write that step again.

    Args:
      abstract_state: pytree of arrays or `jax.ShapeDtypeStruct`; the result has
        its structure, shapes, types and shardings.

    Returns:
      `(step, state)`, or None when there is no checkpoint.

    Raises:
      InputError: there are checkpoints, and none can be used.
    """
    return _everywhere(self._restore_latest, abstract_state)

  def _restore_latest(self, abstract_state: Tree) -> tuple[int, Tree] | None:
    reasons = {}
    for step in reversed(self.steps()):
      path = self._directory / str(step)
      try:
        state = _load(path, abstract_state, self._run)
      except _Unusable as error:
        reasons[path] = str(error)
        continue
      for bad, why in reasons.items():
        aside = _free_name(bad)
        bad.rename(aside)
        print(
          f"warning: checkpoint {bad}: {why}; going on from step {step},"
          f" the bad one is kept as {aside.name}",
          file=sys.stderr,
        )
      return step, state
    if reasons:
      path, why = next(iter(reasons.items()))
      raise InputError(
        f"no usable checkpoint in {self._directory} ({path.name}: {why}):"
        " give the flags it was made with, or another --workdir, or remove it"
      )
    return None


def _everywhere(read, abstract_state: Tree) -> tuple[int, Tree] | None:
  """What `read` gives of an abstract state, in all processes of a run."""
  if not mesh_lib.is_spread(abstract_state):
    return read(abstract_state)
  local = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract_state
  )

  held: dict[str, np.ndarray] = {}

  def hold():
    found = read(local)
    if found is None:
      return None
    held.update(jax.device_get(_to_arrays(found[1])))
    return found[0]

  step = processes.from_writer(hold)
  if step is None:
    return None
  leaves, treedef = jax.tree.flatten(abstract_state)
  for index, like in enumerate(leaves):
    # One array at a time is whole, in memory of the other processes and on the
    # devices.
    take = functools.partial(held.pop, _name(index), None)
    value = processes.from_writer(take)
    leaves[index] = mesh_lib.put_like(_from_array(value, like), like)
  return step, jax.tree.unflatten(treedef, leaves)


def _alone(function, path: pathlib.Path, arrays: dict[str, Any]) -> Any:
  """Calls Orbax, in a process of its own where a run has several.

  Orbax waits for all processes of a run, and only the one that writes calls it;
  a fresh process knows of no others.
  """
  if processes.count() == 1:
    return function(path, arrays)
  context = multiprocessing.get_context("spawn")
  arrays = jax.device_get(arrays)
  with futures.ProcessPoolExecutor(
    1, mp_context=context, initializer=_on_cpu
  ) as pool:
    # A new process has the mask of its parent, and so it lives until it ignores
    # signals by itself.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
      made = pool.submit(_on_host, function, path, arrays)
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return made.result()


def _on_cpu() -> None:
  """Keeps a process away from accelerators, which its parent holds.

  Ctrl-C and a cluster's SIGTERM reach all processes of a group; the parent ends
  the run behind the checkpoint, so they do not end the one that writes it.
  """
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  jax.config.update("jax_platforms", "cpu")


def _on_host(function, path, arrays):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arrays = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    if isinstance(x, jax.ShapeDtypeStruct)
    else x
    for name, x in arrays.items()
  }
  return jax.device_get(function(path, arrays))


class _Unusable(Exception):
  """Why a checkpoint cannot be used, in a few words."""


def _load(path: pathlib.Path, abstract_state: Tree, run: str | None) -> Tree:
  """Checks and reads one checkpoint; raises `_Unusable`."""
  manifest = _manifest_or_empty(path)
  if not {"leaves", "files"} <= manifest.keys():
    raise _Unusable(f"{_MANIFEST} is missing or damaged")
  if None not in (run, manifest.get("run")) and manifest["run"] != run:
    raise _Unusable("is of a run with other flags")
  for name, digest in manifest["files"].items():
    try:
      file = input_files.beside(path / _MANIFEST, name)
    except InputError as error:
      raise _Unusable(f"file {shown(name)} is missing") from error
    if files.digest_of_file(file) != digest:
      raise _Unusable(f"file {name} is damaged")
  stored, wanted = manifest["leaves"], _signature(abstract_state)
  for name in sorted(stored.keys() | wanted.keys()):
    here, there = wanted.get(name, "absent"), stored.get(name, "absent")
    if here != there:
      raise _Unusable(f"{name} is {there} in it and {here} in this run")
  try:
    # Orbax leaves coroutines behind when a read fails; the failure itself is
    # reported below.
    with warnings.catch_warnings(action="ignore"):
      wanted = _to_abstract(abstract_state)
      arrays = _alone(ocp.load, path / _STATE, wanted)
  except Exception as error:
    raise _Unusable(f"Orbax cannot read it ({reason(error)})") from error
  return _from_arrays(arrays, abstract_state)


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
  """Orbax logs the traceback of an error that it also raises.

  Its writes run side by side, and it raises the error of one. asyncio logs the
  errors of others when they are collected, which is at any time later.
  """
  logger = logging.getLogger("absl")
  before = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception:
    logging.getLogger("asyncio").addFilter(_is_of_no_task)
    raise
  finally:
    logger.setLevel(before)


def _is_of_no_task(record: logging.LogRecord) -> bool:
  return not record.getMessage().startswith(
    "Task exception was never retrieved"
  )


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _signature(tree: Tree) -> dict[str, str]:
  """Name of each leaf -> its type and shape."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): (
      f"{leaf.dtype}{list(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _to_arrays(tree: Tree) -> dict[str, jax.Array]:
  """Leaves by number: plain arrays, no keys, none empty (Orbax refuses)."""
  leaves = [
    jax.random.key_data(leaf) if _is_key(leaf) else leaf
    for leaf in jax.tree.leaves(tree)
  ]
  return {_name(i): leaf for i, leaf in enumerate(leaves) if leaf.size}


def _name(index: int) -> str:
  return f"{index:05d}"


def _to_abstract(tree: Tree) -> dict[str, jax.ShapeDtypeStruct]:
  """What `_to_arrays` would give for a tree of the same shapes and types."""
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = [
    getattr(leaf, "sharding", None) or default for leaf in jax.tree.leaves(tree)
  ]
  if processes.count() > 1:
    # Another process reads them, on a device of its own.
    shardings = [None] * len(shardings)
  arrays = jax.eval_shape(_to_arrays, tree)
  return {
    name: jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=shardings[int(name)]
    )
    for name, array in arrays.items()
  }


def _from_arrays(arrays: dict[str, Any], abstract_state: Tree) -> Tree:
  """Inverse of `_to_arrays`."""
  leaves, treedef = jax.tree.flatten(abstract_state)
  restored = [
    _from_array(arrays.get(_name(index)), leaf)
    for index, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, restored)


def _from_array(array: Any, leaf: Any) -> Any:
  """A leaf like an abstract one, from `_to_arrays`; None for an empty one."""
  if array is None:
    return jnp.zeros(leaf.shape, leaf.dtype)
  if _is_key(leaf):
    # No public name leads from an abstract key to its generator.
    return jax.random.wrap_key_data(array, impl=leaf.dtype._impl.name)
  return array


def _content_digest(tree: Tree) -> str:
  digest = hashlib.sha256(repr(_signature(tree)).encode())
  for leaf in _to_arrays(tree).values():
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def _file_digests(folder: pathlib.Path) -> dict[str, str]:
  found = sorted(path for path in folder.rglob("*") if path.is_file())
  return {
    str(file.relative_to(folder)): files.digest_of_file(file) for file in found
  }


def _manifest_or_empty(path: pathlib.Path) -> dict[str, Any]:
  try:
    manifest = input_files.read_kept(path / _MANIFEST)
  except InputError:
    return {}
  for name in {"leaves", "files"} & manifest.keys():
    found = manifest[name]
    if not isinstance(found, dict) or not all(
      isinstance(text, str) for text in found.values()
    ):
      return {}
  return manifest


def _free_name(path: pathlib.Path) -> pathlib.Path:
  """`<path>.unusable`, with a number where that exists."""
  candidate, number = path.with_name(f"{path.name}.unusable"), 1
  while candidate.exists():
    number += 1
    candidate = path.with_name(f"{path.name}.unusable-{number}")
  return candidate
