import numpy as np
import pytest

from models.convert import load, save_safetensors
from models.errors import InputError
from models.mamba_config import MambaConfig
from ops.quantized import QTensor, QWeight
from research.quantization import apply, mixed
from research.quantization.recipes import RECIPES
from tests.research.quantization.conftest import (
  difference,
  logits,
  random_model,
)


@pytest.fixture(scope="module")
def quantized(mamba2, batches):
  """Two layers, activations in 8 bits."""
  return apply.quantize(*mamba2, RECIPES["quamba2_w4a8"], batches)


def test_stacks_are_cut_where_formats_change(quantized, batches, tmp_path):
  config, params = mixed.loosened(*quantized, (1,))
  assert config.splits == (1,) and len(config.runs) == 2
  first, second = (params["layers"][i]["mixer"] for i in range(2))
  assert isinstance(first["in_proj"]["kernel"], QWeight)
  assert isinstance(second["in_proj"]["kernel"], QTensor)
  assert second["out_proj"]["kernel"].input is None
  assert first["taps"].x is not None and second["taps"].x is None
  assert second["taps"].ssm_state is not None
  save_safetensors(tmp_path, config, params)
  back = load(tmp_path)
  assert back.config.splits == config.splits
  np.testing.assert_array_equal(
    logits(back.config, back.params, batches[0]),
    logits(config, params, batches[0]),
  )


def test_layers_in_floats_come_nearer_to_the_float_model(
  mamba2, quantized, batches
):
  wanted = logits(*mamba2, batches[0])
  all_loose = mixed.loosened(*quantized, (0, 1))
  assert all_loose[0].splits == ()
  error = lambda model: difference(logits(*model, batches[0]), wanted)
  assert error(all_loose) < error(quantized)


def test_the_search_finds_the_best_of_few(quantized, batches):
  done = []
  found = mixed.search(*quantized, batches, 0.5, advance=done.append)
  losses = mixed._Judge(*quantized, batches).losses([(0,), (1,)])
  assert found == ((0,), (1,))[int(losses.argmin())]
  # Of the two candidates each is judged once.
  assert sum(done) == 2
  assert mixed.search(*quantized, batches, 0.5) == found


def test_a_transformer_has_one_format_throughout(batches):
  config, params = random_model("transformer")
  with pytest.raises(InputError, match="transformer.*not mixed"):
    apply.quantize(config, params, RECIPES["quamba2_w4ax"], batches)


def test_splits_rise_within_the_layers():
  assert [run.num_layers for run in MambaConfig.tiny(splits=(1,)).runs] == [
    1,
    1,
  ]
  for wrong in ((2,), (1, 1)):
    with pytest.raises(ValueError, match="splits"):
      MambaConfig.tiny(splits=wrong)
