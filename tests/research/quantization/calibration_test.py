import numpy as np
import pytest

from models.errors import InputError
from research.quantization import calibration
from research.quantization.statistics import Wanted
from research.text.tokenizing import of_bytes

TEXT = "".join(chr(ord("a") + i % 26) * 10 for i in range(2000))


def test_windows_are_spread_over_the_text():
  found = calibration.batches_of(TEXT, of_bytes(), windows=32, length=64)
  assert found.shape == (4, 8, 64) and found.dtype == np.int32
  rows = found.reshape(32, 64)
  assert (rows[:, 0] == [ord(TEXT[i * 625]) for i in range(32)]).all()


def test_windows_fill_whole_batches():
  found = calibration.batches_of(TEXT, of_bytes(), windows=9, length=128)
  assert found.shape == (2, 8, 128)


@pytest.mark.parametrize("windows, length", [(4, 64), (400, 64), (8, 20000)])
def test_too_little_text_is_one_line(windows, length):
  with pytest.raises(InputError, match="give a longer text"):
    calibration.batches_of(TEXT, of_bytes(), windows=windows, length=length)


def test_statistics_of_a_model_name_every_place(model, batches):
  config, params = model
  done = []
  found, head = calibration.calibrate(
    config, params, batches, wanted=Wanted(gram=True), advance=done.append
  )
  assert len(found) == len(done) == config.num_layers
  assert head.count == batches.size
  assert head.absmax.shape == (config.d_model,)
  names = set().union(*found)
  places = {f"mixer.{p}" for p in ("x", "B", "C", "dt", "z", "conv_x")}
  kernels = {"mixer.in_proj", "mixer.out_proj"}
  if config.family == "transformer":
    places, kernels = set(), {"attn.q_proj", "mlp.down_proj"}
  assert places | kernels <= names
  # No kernel multiplies these.
  unread = places | {"mixer.conv_BC", calibration.KEYS}
  for notes in found:
    for name, one in notes.items():
      assert one.count == batches.size
      assert (one.gram is not None) == (name not in unread)
      assert (np.asarray(one.absmax) > 0).all()
