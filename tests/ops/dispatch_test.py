"""The resolver of `implementation=`."""

import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from ops import dispatch

ROOT = Path(__file__).resolve().parents[2]


def even(*arrays, **options):
  del options
  odd = [x.shape for x in arrays if x.shape[0] % 2]
  return f"needs an even length, got {odd[0]}" if odd else None


def never(*arrays, **options):
  del arrays, options
  return "never"


TABLE = {"mosaic_gpu": never, "mosaic_tpu": even, "xla": dispatch.always}


def test_none_takes_the_first_that_runs():
  assert dispatch.resolve("f", TABLE, None, np.zeros(4)) == "mosaic_tpu"
  assert dispatch.resolve("f", TABLE, None, np.zeros(3)) == "xla"
  assert dispatch.resolve("f", TABLE) == "mosaic_tpu"


def test_a_name_gives_exactly_that_one():
  assert dispatch.resolve("f", TABLE, "xla", np.zeros(4)) == "xla"


def test_options_reach_supports():
  seen = {}

  def supports(*arrays, **options):
    seen.update(options, count=len(arrays))

  dispatch.resolve("f", {"xla": supports}, None, np.zeros(1), block=8)
  assert seen == {"block": 8, "count": 1}


@pytest.mark.parametrize("kind", [NotImplementedError, ValueError])
def test_an_unusable_name_says_why_and_what_would_run(kind):
  with pytest.raises(kind) as caught:
    dispatch.resolve("scan", TABLE, "mosaic_tpu", np.zeros(3))
  assert str(caught.value) == (
    "scan: 'mosaic_tpu' does not run here: needs an even length, got (3,);"
    " usable: xla"
  )


def test_an_unknown_name_lists_the_usable_ones():
  with pytest.raises(dispatch.UnsupportedError) as caught:
    dispatch.resolve("scan", TABLE, "triton", np.zeros(4))
  assert str(caught.value) == (
    "scan: there is no implementation 'triton'; usable: mosaic_tpu, xla"
  )


def test_nothing_runs():
  with pytest.raises(dispatch.UnsupportedError, match="usable: none"):
    dispatch.resolve("scan", {"mosaic_gpu": never})


@pytest.mark.parametrize(
  "platform, capability, hopper, tpu",
  [
    ("cpu", None, "needs an NVIDIA GPU, this is a cpu", "this is a cpu"),
    ("gpu", "8.0", "needs compute capability 9.0, this GPU has 8.0", "a gpu"),
    ("gpu", "9.0", None, "needs a TPU, this is a gpu"),
    ("gpu", "10.3", None, "needs a TPU, this is a gpu"),
    ("gpu", "gfx942", "needs an NVIDIA GPU", "needs a TPU"),
    ("tpu", None, "needs an NVIDIA GPU, this is a tpu", None),
  ],
)
def test_machine_predicates(monkeypatch, platform, capability, hopper, tpu):
  fake = types.SimpleNamespace(platform=platform)
  if capability:
    fake.compute_capability = capability
  monkeypatch.setattr(dispatch, "device", lambda: fake)
  wgmma = hopper
  if capability == "10.3":
    wgmma = "needs Hopper's wgmma, this GPU has 10.3"
  for check, expected in (
    (dispatch.needs_hopper, hopper),
    (dispatch.needs_wgmma, wgmma),
    (dispatch.needs_tpu, tpu),
  ):
    said = check(np.zeros(2), block=3)
    assert said is None if expected is None else expected in said


def test_device_follows_the_default_device():
  last = jax.devices()[-1]
  assert dispatch.device() == jax.devices()[0]
  with jax.default_device(last):
    assert dispatch.device() == last
  with jax.default_device("cpu"):
    assert dispatch.platform() == "cpu"


def test_table_lists_every_public_op_and_the_machine_can_print_it():
  import ops

  rows = list(dispatch.table())
  named = {op for op, _, _ in rows}
  functions = {
    name
    for name, value in vars(ops).items()
    if isinstance(value, types.FunctionType) and not name.startswith("_")
  }
  assert named == functions
  assert all(why is None for _, name, why in rows if name == "xla")
  done = subprocess.run(
    [sys.executable, "-m", "ops"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) == len(rows) + 1
