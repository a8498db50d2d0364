"""What all tests run under: eight CPU devices, and full float32 products."""

import gc
import os
import shutil
import tempfile
import threading

import jax
import pytest

from tests import tpu_compile

# Not through XLA_FLAGS: the scripts that tests start must see one device.
jax.config.update("jax_num_cpu_devices", 8)
# On an accelerator float32 would else be multiplied in fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")
# Axes are added by hand: a silent broadcast hides a wrong shape.
jax.config.update("jax_numpy_rank_promotion", "raise")
# At these sizes the compiler is what tests wait for.
jax.config.update("jax_disable_most_optimizations", True)

# `make test` fetches the compiler; where it was not run, the rest still runs.
collect_ignore_glob = [] if tpu_compile.library() else ["*_tpu_test.py"]

_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_PREFIX = "frugax_tests_"
# The files with the most programs take less than the rest of what there is.
_MOST_MAPPINGS = 25_000


def pytest_configure(config):
  """Keeps compiled programs in a fresh folder, which scripts of tests share.

  Tests ask for many programs again. Every worker has a part of its own, so that
  none reads what another has half written.
  """
  if _COMPILED not in os.environ:
    os.environ[_COMPILED] = tempfile.mkdtemp(prefix=_PREFIX)
  if _PREFIX in os.environ[_COMPILED]:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    place = os.path.join(os.environ[_COMPILED], worker)
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_sessionstart(session):
  """Lets threads that compile kernels go before the one that hands them out.

  XLA makes the context in which it compiles a kernel anew, some 3 ms, where
  none is free, and one or two are enough when no kernel waits: a third of the
  time of a compile. Threads keep the niceness of the moment when the first
  program made them. The process that starts workers runs no program.
  """
  starts_workers = getattr(session.config.option, "numprocesses", None)
  if hasattr(os, "setpriority") and not starts_workers:
    jax.jit(lambda x: x + 1)(0.0)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def pytest_collection_finish():
  """Lets the collector look less often at what imports and traces keep."""
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


def pytest_runtest_teardown(item, nextitem):
  """Drops compiled programs between two files, where there are many.

  Each of them takes some mappings of memory, of which Linux gives a process
  65,530: the next one would end it.
  """
  if nextitem is not None and nextitem.path != item.path:
    if _mappings() > _MOST_MAPPINGS:
      jax.clear_caches()
      gc.collect()


def _mappings() -> int:
  """Of this process's memory; 0 where the system does not say."""
  try:
    with open("/proc/self/maps", "rb") as file:
      return sum(1 for _ in file)
  except OSError:
    return 0


def pytest_unconfigure(config):
  """Removes the folder, where this process is no worker."""
  if not hasattr(config, "workerinput") and _PREFIX in os.environ[_COMPILED]:
    shutil.rmtree(os.environ[_COMPILED], ignore_errors=True)


@pytest.fixture
def optimized():
  """Compiles as for users: for tests of what the compiler makes."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def drawn_leaf_by_leaf():
  """Draws weights of regression language models without compiling all at once.

  They are the same. One program for a whole model takes 1.7 s to compile, those
  of single leaves are shared by models. What leaves out a part is compiled.
  """
  from research.regression_lm import batched_training, weights

  compiled = weights.random

  def random(config, key, param_dtype=None, without=None):
    draw = compiled if without else compiled.__wrapped__
    return draw(config, key, param_dtype, without)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(weights, "random", random)
    patch.setattr(batched_training, "init", batched_training.init.__wrapped__)
    yield
