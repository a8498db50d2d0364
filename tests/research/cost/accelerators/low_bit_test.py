"""BitMoD's terms, HSA's integer products, and decoding near memory."""

import dataclasses

import numpy as np
import pytest

from models.errors import InputError
from ops.quantized import FORMATS, quantize
from research.cost.accelerators import bitmod, hybrid_systolic, near_memory


@pytest.mark.parametrize("bits, terms", [(8, 4), (6, 3), (4, 2)])
def test_integers_have_as_many_terms_as_pairs_of_bits(bits, terms):
  for value in range(-(1 << (bits - 1)), 1 << (bits - 1)):
    digits = bitmod.booth(value, bits)
    assert len(digits) == terms
    assert sum(digit << place for digit, place in digits) == value
    assert {abs(digit) for digit, _ in digits} <= {0, 1, 2}
  assert bitmod.TERMS.get(f"int{bits}", terms) == terms


@pytest.mark.parametrize("name", ["bitmod4", "bitmod3"])
def test_levels_are_two_powers_of_two_at_most(name):
  form = FORMATS[name]
  for level in (*form.codebook, *form.specials):
    found = bitmod.powers(level)
    assert len(found) <= bitmod.TERMS[f"fp{form.bits}"]
    assert sum(sign * 2.0**exponent for sign, exponent in found) == level
  rows = np.zeros((1, 1024), np.float32)
  kept = 8 * quantize(rows, name).nbytes / rows.size
  # A float a row beside the scales of 8 bits.
  assert kept == pytest.approx(bitmod.BITS[f"fp{form.bits}"] + 32 / 1024)


def test_cycles_follow_terms_or_bytes():
  array = bitmod.Array(rows=32, columns=32, lanes=4, bytes_a_cycle=64)
  tokens = np.array([1, 4096])
  found = {f: bitmod.cycles(array, f, tokens, 4096, 4096) for f in bitmod.TERMS}
  # With many tokens terms count: 128 tiles of 128 x 1024 steps each.
  work = 128 * 128 * 1024
  assert {f: v[1] for f, v in found.items()} == {
    f: terms * work for f, terms in bitmod.TERMS.items()
  }
  # One token waits for memory, or for a tile that is mostly empty.
  loads = 4096 * 4096 * bitmod.BITS["int8"] / 8 / 64
  assert found["int8"][0] == max(128 * 1024 * 4, np.ceil(loads))
  spent = bitmod.energy(array, "fp4", 1, 4096, 4096)
  moved = bitmod.weight_bytes("fp4", 4096, 4096)
  assert spent == pytest.approx(4096 * 4096 * 2 * 0.1 + moved * 30)
  with pytest.raises(InputError, match="give int8, int6, fp4, fp3"):
    bitmod.cycles(array, "int4", 1, 1, 1)
  with pytest.raises(InputError, match="do not hold"):
    bitmod.booth(128, 8)
  with pytest.raises(InputError, match="no short sum"):
    bitmod.powers(0.1)


def test_products_in_integers_are_those_of_mxint4():
  """Equal to the dequantized product in float64, bit for bit."""
  rng = np.random.default_rng(0)
  weights = rng.standard_t(3, (24, 256)).astype(np.float32)
  inputs = rng.integers(-127, 128, (5, 256))
  form = dataclasses.replace(FORMATS["mxint4"], packed=False)
  q = quantize(weights, form)
  codes = np.asarray(q.values, np.int64)
  scales = np.asarray(q.scales.astype("float32"), np.float64)
  exponents = np.log2(scales).astype(np.int64)
  y, power = hybrid_systolic.product(inputs, codes, exponents)
  whole = codes * np.repeat(scales, 32, axis=1)
  np.testing.assert_array_equal(y * 2.0**power, inputs @ whole.T)
  assert (
    hybrid_systolic.BITS
    == 8 * quantize(weights, FORMATS["mxint4"]).nbytes / weights.size
  )
  with pytest.raises(InputError, match="span 32"):
    hybrid_systolic.product(
      inputs, codes, exponents + 40 * np.eye(24, 8, dtype=int)
    )
  # Only how far they lie apart matters, also where the least is large.
  for shift in (40 - exponents.min(), -60 - exponents.max()):
    moved, far = hybrid_systolic.product(inputs, codes, exponents + shift)
    np.testing.assert_array_equal(moved, y)
    assert far == power + shift
  with pytest.raises(InputError, match="give one for 32"):
    hybrid_systolic.product(inputs, codes, exponents[:, :2])


def test_one_token_keeps_the_hybrid_array_busy():
  hybrid = hybrid_systolic.Array(rows=32, columns=32)
  plain = dataclasses.replace(hybrid, hybrid=False)
  tokens = np.array([1, 32, 2048])
  busy = hybrid_systolic.utilisation(hybrid, tokens, 2048, 2048)
  idle = hybrid_systolic.utilisation(plain, tokens, 2048, 2048)
  # A row of 32 works in a plain array, less what fills it.
  assert idle[0] == pytest.approx(2048 / (32 * 2110))
  assert busy[0] > 0.99 and np.all(busy >= idle) and np.all(busy <= 1)
  assert np.all(idle[1:] > 0.96)
  # 1.3 billion weights of 4.25 bits: memory is the bound of the hybrid array.
  rate = hybrid_systolic.tokens_per_second(hybrid, 1.3e9)
  assert rate == pytest.approx(100e9 / (1.3e9 * 4.25 / 8))
  slow = hybrid_systolic.tokens_per_second(plain, 1.3e9)
  assert slow == pytest.approx(500e6 * 32 / 1.3e9)
  double = dataclasses.replace(hybrid, area_mm2=2.0)
  assert hybrid_systolic.per_area(double, 1.3e9) == pytest.approx(rate / 2)


def test_decoding_near_memory():
  model = near_memory.Model(weights=7e9, cached=2 * 32 * 4096)
  npu = near_memory.Rates(gigabytes=1000, teraflops=200)
  pim = near_memory.Rates(gigabytes=8000, teraflops=8)
  batch = np.array([1, 8, 256])
  given = model, near_memory.FLOAT16, batch, 4096
  alone = near_memory.step(*given, npu)
  both = near_memory.step(*given, npu, pim)
  # Every weight once a step, at 16 bits, from the narrow memory.
  assert alone["weights"][0] == pytest.approx(14e9 / 1e12)
  # Weights of few texts go near memory; with many its multipliers are slower.
  assert both["weights"][0] == pytest.approx(14e9 / 8e12)
  assert both["weights"][2] == alone["weights"][2]
  assert np.all(both["attention"] < alone["attention"] / 3)
  few = near_memory.step(model, near_memory.P3, batch, 4096, npu)
  ratio = alone["total"] / few["total"]
  assert ratio[0] == pytest.approx(16 / 4.09, rel=0.01)
  assert near_memory.P3.cache == pytest.approx(4.156, abs=1e-3)
