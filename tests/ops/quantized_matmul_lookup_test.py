"""The arithmetic of `mosaic_gpu_lookup`, on integers in place of registers."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from ops.quantized import FORMATS
from ops.quantized_matmul import mosaic_gpu_lookup as lookup


def prmt(low, high, selectors):
  """PTX's prmt.b32 of selectors whose highest bits are zero or bytes 0 to 7."""
  whole = (high << 32) | low
  return sum(
    ((whole >> 8 * ((selectors >> 4 * i) & 7)) & 255) << 8 * i for i in range(4)
  )


@pytest.fixture
def registers(monkeypatch):
  """Integers of 32 bits as registers."""
  operations = types.SimpleNamespace(
    andi=lambda a, b: a & b,
    ori=lambda a, b: a | b,
    shrui=lambda a, b: a >> b,
    shli=lambda a, b: (a << b) & 0xFFFFFFFF,
  )
  monkeypatch.setattr(lookup, "arith", operations)
  monkeypatch.setattr(lookup, "_constant", lambda value: value)
  monkeypatch.setattr(lookup, "_picked", prmt)
  monkeypatch.setattr(lookup, "_bits", lambda register: register)


@pytest.mark.parametrize("name", ["nf4", "fp4_e3m0", "mxint4", "razer4"])
def test_words_become_pairs_of_levels(name, registers):
  form = FORMATS[name]
  table = lookup.table_of(form)
  levels = np.asarray(table, np.uint16).view(jnp.bfloat16).astype(float)
  if form.codebook is None:
    np.testing.assert_array_equal(levels, [*range(8), *range(-8, 0)])
  else:
    rounded = np.asarray(form.codebook).astype(jnp.bfloat16)
    np.testing.assert_array_equal(levels[: len(rounded)], rounded)
  special, own = {}, [levels, levels]
  if form.specials:
    # Each half of a word may lie in a block of its own.
    bits = np.asarray([5.0, -8.0], jnp.bfloat16).view(np.uint16).tolist()
    special = {half: b << 16 | b for half, b in enumerate(bits)}
    own = [np.append(levels[:15], one) for one in (5.0, -8.0)]
  rng = np.random.default_rng(0)
  for codes in [range(8), range(8, 16), *rng.integers(0, 16, (20, 8))]:
    word = sum(int(code) << 4 * i for i, code in enumerate(codes))
    pairs = lookup._levels_of_word(word, table, special)
    found = np.asarray(pairs, np.uint32).view(np.uint16).view(jnp.bfloat16)
    expected = [own[i // 4][code] for i, code in enumerate(codes)]
    np.testing.assert_array_equal(found.astype(float), expected)


def test_what_bfloat16_holds():
  exact = {n for n, form in FORMATS.items() if lookup.is_exact(form)}
  assert {"int4", "fp4", "bitmod4", "razer4"} <= exact
  assert exact.isdisjoint({"nf4", "sf4", "apot4", "af4"})
  small = {n for n, form in FORMATS.items() if lookup.scales_are_exact(form)}
  assert {"mxint4", "mxfp4", "nvfp4", "razer4", "razer4_inputs"} <= small
  assert "sf4" not in small
