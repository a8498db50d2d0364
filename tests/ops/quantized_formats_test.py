"""Codebooks, special levels and scales of a byte: the rows of few bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from models.convert import quantized as files
from ops import dequantize, quantize, quantized_matmul
from ops.quantized import FORMATS, codebooks, formats, quantize_reference

CHOOSING = [name for name, form in FORMATS.items() if form.specials]
FITTED = [name for name, form in FORMATS.items() if form.fitted]
OWN_SCALES = ["nvfp4_token", "mxint4", "mxfp4", "nvfp4", *CHOOSING]
PLAIN = [
  name
  for name in formats.SIGNED
  if FORMATS[name].bits < 6 and name not in ("int4", *OWN_SCALES, *FITTED)
]


@functools.cache
def draws():
  """(3, 64, 512): normal, Student's t with 5 degrees of freedom, Laplace."""
  rng = np.random.default_rng(0)
  shape = 64, 512
  cases = (
    rng.normal(size=shape),
    rng.standard_t(5, shape),
    rng.laplace(size=shape),
  )
  return jnp.asarray(np.stack(cases), jnp.float32)


@functools.cache
def rounded(name):
  """The draws in a format, and what comes back of them."""

  @jax.jit
  def run(x):
    q = jax.vmap(lambda x: quantize(x, name))(x)
    return q, dequantize(q)

  q, back = run(draws())
  q.check()
  return q, np.asarray(back, np.float64)


def decibels(name):
  """Signal over the noise of rounding, (3,)."""
  x = np.asarray(draws(), np.float64)
  noise = np.square(x - rounded(name)[1]).sum((1, 2))
  return 10 * np.log10(np.square(x).sum((1, 2)) / noise)


@pytest.mark.parametrize("name", PLAIN)
def test_values_become_their_nearest_levels(name):
  x, (q, back) = np.asarray(draws()), rounded(name)
  for values, found in zip(x[:, :2], back[:, :2]):
    expected, _ = quantize_reference(values, name)
    slack = 2**-20 * np.abs(values).max()
    error, least = np.abs(found - values), np.abs(expected - values)
    assert np.all(error <= least + slack)
  assert q.values.shape[-1] == 512 * FORMATS[name].bits // 8


@pytest.mark.parametrize("name", CHOOSING)
def test_a_block_takes_the_level_that_fits_it_best(name):
  """No worse than with any one of its levels in all blocks, scales exact."""
  form = dataclasses.replace(FORMATS[name], scale_format=None)
  form = dataclasses.replace(form, scale_dtype="float32")
  x = np.asarray(draws())[:, :3]
  run = jax.jit(lambda x: dequantize(quantize(x, form)))
  blocks = lambda v: v.reshape(-1, form.group)
  error = np.square(blocks(np.asarray(run(x)) - x)).sum(-1)
  for level in form.specials:
    book = tuple(sorted((*form.codebook, level)))
    one = dataclasses.replace(form, codebook=book, specials=())
    each = np.stack([quantize_reference(v, one)[0] for v in x])
    least = np.square(blocks(each - x)).sum(-1)
    assert np.all(error <= least * (1 + 1e-5))
  q, _ = rounded(name)
  chosen = np.asarray(q.choices)
  per_byte, _ = form.choices.pack
  assert chosen.shape[-1] == -(-(512 // form.group) // per_byte)
  assert len(np.unique(chosen)) > 1


def test_signal_over_noise_is_in_the_known_order():
  """Of 2 million draws (notes of the methods): to a tenth of a decibel."""
  known = {
    "int4_asym": (19.95, 17.51, 17.69),
    "nf4": (20.39, 18.58, 18.89),
    "sf4": (19.54, 18.90, 18.95),
    "fp4": (19.26, 18.18, 18.35),
    "bitmod4": (20.19, 19.38, 19.46),
    "int3_asym": (13.33, 10.93, 11.28),
    "fp3": (12.45, 10.14, 10.67),
    "bitmod3": (14.20, 12.65, 12.97),
    "mxfp4": (18.79, 17.98, 17.95),
    "mxint4": (17.56, 15.94, 16.01),
    "nvfp4": (20.44, 20.69, 20.65),
    "razer4": (22.47, 22.58, 22.60),
    "razer4_inputs": (22.06, 21.84, 21.86),
  }
  for name, expected in known.items():
    np.testing.assert_allclose(decibels(name), expected, atol=0.25)
  # Quantiles of t are better where tails are heavy, and there alone.
  assert (decibels("sf4") > decibels("nf4")).tolist() == [False, True, True]
  for better, worse in (
    ("bitmod4", "fp4"),
    ("bitmod3", "fp3_ea"),
    ("fp3_ea", "fp3_er"),
    ("fp3_er", "fp3"),
    ("razer4", "nvfp4"),
  ):
    assert np.all(decibels(better) >= decibels(worse) - 0.01)


def test_bits_of_a_value_hold_all_that_is_kept():
  count = 64 * 512
  expected = {
    "sf4": 4 + 16 / 128,
    "int3_asym": 3 + 24 / 128,
    "bitmod4": 4 + 10 / 128 + 32 / 512,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16 + 32 / count,
    # The choice lies where the scale leaves room.
    "razer4": 4 + 8 / 16 + 32 / count,
    "razer4_inputs": 4 + 8 / 16 + 32 / count,
  }
  for name, bits in expected.items():
    q = jax.eval_shape(lambda x, name=name: quantize(x, name), draws()[0])
    assert 8 * q.nbytes == pytest.approx(bits * q.size), name


def test_codebooks_are_quantiles():
  delta = (1 / 32 + 1 / 30) / 2
  for bits, of in ((4, ("NF4", "SF4")), (3, ("NF3", "SF3"))):
    half = 2 ** (bits - 1)
    low = np.linspace(delta, 0.5, half)
    shares = np.concatenate([low, np.linspace(0.5, 1 - delta, half + 1)[1:]])
    for name, points in zip(
      of, (special.ndtri(shares), special.stdtrit(5, shares))
    ):
      expected = points / np.abs(points).max()
      np.testing.assert_allclose(getattr(codebooks, name), expected, atol=1e-7)
  assert max(codebooks.E3M3) == 28 and sorted(codebooks.E3M3)[1] == 2**-5
  e4m3 = np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn)
  np.testing.assert_array_equal(codebooks.E4M3, e4m3.astype(np.float32))


@pytest.mark.parametrize("name", ["mxint4", "mxfp4"])
def test_scales_of_mx_are_powers_of_two(name):
  q, back = rounded(name)
  x = np.asarray(draws())
  largest = np.abs(x).reshape(*q.scales.shape, 32).max(-1)
  expected = 2.0 ** (np.floor(np.log2(largest)) - 2)
  np.testing.assert_array_equal(q.scales.astype(jnp.float32), expected)
  # Of the largest magnitude, up to 8 steps, levels end at 6 or 7.
  top = np.abs(FORMATS[name].levels).max()
  assert np.abs(back).max() <= top * expected.max()
  odd = jnp.zeros((1, 64)).at[0, :2].set(jnp.asarray([jnp.inf, 1.0]))
  back = jax.jit(lambda x: dequantize(quantize(x, name)))
  found = back(odd)
  assert not np.isfinite(found[0, 0]) and np.all(found[0, 32:] == 0)
  tiny = back(jnp.full((1, 64), 1e-38))
  assert np.all(np.abs(tiny) < 2e-38)


@pytest.mark.parametrize("name", ["bitmod3", "razer4", "mxfp4", "sf4"])
def test_weights_are_multiplied_indexed_and_kept_in_files(name):
  x = jnp.swapaxes(draws()[:, :64, :256], 1, 2)
  q = jax.jit(jax.vmap(lambda x: quantize(x, name, axis=-2)))(x)
  # Not compiled whole, each of its dozens of small steps is a program.
  read = jax.jit(dequantize)
  back = np.asarray(read(q))
  np.testing.assert_array_equal(read(q[1, :, 3:9]), back[1, :, 3:9])
  np.testing.assert_array_equal(read(q.T), back.swapaxes(1, 2))
  tokens = draws()[0, :4, :256]
  found = quantized_matmul(tokens, q[2])
  np.testing.assert_allclose(found, tokens @ back[2], rtol=1e-5, atol=1e-4)
  one = jax.tree.map(np.asarray, q[0])
  arrays, text = files.to_arrays({"w": one})
  kept = files.Quantized(text, list(arrays), "file").read("w", arrays.get)
  jax.tree.map(np.testing.assert_array_equal, kept, one)
  with pytest.raises(ValueError, match="choices"):
    wrong = None if one.choices is not None else one.values[:, :1]
    dataclasses.replace(one, choices=wrong).check()


def test_what_does_not_go_is_one_line():
  x = draws()[0]
  with pytest.raises(ValueError, match="cannot be rounded stochastically"):
    quantize(x, "razer4", noise=jnp.zeros(x.shape))
  with pytest.raises(ValueError, match="groups of 16 do not divide"):
    quantize(x[:, :40], "nvfp4")
