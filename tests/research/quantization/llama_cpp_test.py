import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from research.cost import sizes
from research.quantization import llama_cpp
from tests.research.quantization.conftest import difference

ROWS = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)


def back(rows):
  packed = llama_cpp.quantize_q4_k(rows)
  assert packed.shape == (len(rows), rows.shape[1] * 144 // 256)
  return gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_K)


def test_the_package_reads_what_is_written():
  found = back(ROWS)
  # Nearest levels with a zero point and exact scales would lose .083.
  assert 0.05 < np.linalg.norm(found - ROWS) / np.linalg.norm(ROWS) < 0.09


def test_rows_of_one_value_and_of_positive_values():
  assert (back(np.zeros((1, 256), np.float32)) == 0).all()
  positive = np.abs(ROWS[:1])
  assert np.abs(back(positive) - positive).max() < 0.15


def test_a_grid_comes_back():
  rows = np.tile(np.arange(16, dtype=np.float32) - 3, 32)[None]
  np.testing.assert_allclose(back(rows), rows, atol=0.1)


@pytest.mark.parametrize(
  "name, bits", [("llama_cpp_q8_0", 8.5), ("llama_cpp_q4_k", 4.5)]
)
def test_bytes_are_those_of_the_format(name, bits, mamba2):
  config, params = mamba2
  wide = jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)))
  params = {
    "embed": {"table": params["embed"]["table"]},
    "layers": {"mixer": {"kernel": wide, "A_log": jnp.ones(3)}},
  }
  found, size = llama_cpp.round_trip(config, params, name)
  kernel = found["layers"]["mixer"]["kernel"]
  assert 1e-3 < difference(kernel, wide) < (0.01 if bits > 8 else 0.09)
  table = config.vocab_size * config.d_model
  assert size == 256 * 64 * bits / 8 + table * 8.5 / 8 + 3 * 2
  assert size < sizes.weight_bytes(config, params)
  assert (found["layers"]["mixer"]["A_log"] == 1).all()
