"""A roofline of decoding with products near memory (P3-LLM, arXiv:2511.06838).

A neural processor (NPU) has many multipliers behind a narrow memory; units in
the memory (PIM) have few, and all of its width. Decoding reads every weight
once a step for all texts, and each text its own keys and values: so attention,
and products of few texts, belong near memory. Formats of few bits widen both.

**No published speed is reproduced here**: the papers' 4.9 times HBM-PIM, 2.0
times Ecco and 3.4 times Pimba come from simulators that are not at hand. What
stands are bytes and operations, and rates as parameters.
"""

import dataclasses
from typing import Any

import numpy as np

# Integers or arrays of them that broadcast with each other.
Sizes = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
  """What a unit does in a second.

  Attributes:
    gigabytes: read, 10^9.
    teraflops: multiplied and added, 10^12.
  """

  gigabytes: Sizes
  teraflops: Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bits:
  """Bits of numbers, with what scales and zero points take.

  Attributes:
    weights: of a weight.
    cache: of a number of a key or value.
  """

  weights: float
  cache: float


FLOAT16 = Bits(weights=16.0, cache=16.0)
# BitMoD in groups of 128 with scales of 8 bits, and integers with a scale of 16
# bits and a zero point of 4 for each token and head of 128.
P3 = Bits(weights=4 + 10 / 128, cache=4 + 20 / 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A Transformer, as decoding sees it.

  Attributes:
    weights: numbers that a step multiplies by.
    cached: numbers that a token leaves in the cache, of all layers.
    shared: query heads to a key/value head.
  """

  weights: Sizes
  cached: Sizes
  shared: Sizes = 1


def seconds(
  rates: Rates, amount: Sizes, bits: float, uses: Sizes
) -> np.ndarray:
  """Time to read numbers of so many bits and use each so many times."""
  amount = np.asarray(amount, np.float64)
  loaded = amount * bits / 8 / (np.asarray(rates.gigabytes) * 1e9)
  computed = 2 * amount * uses / (np.asarray(rates.teraflops) * 1e12)
  return np.maximum(loaded, computed)


def step(
  model: Model,
  bits: Bits,
  batch: Sizes,
  context: Sizes,
  npu: Rates,
  pim: Rates | None = None,
) -> dict[str, np.ndarray]:
  """Seconds of a decoding step of a batch, by what is read.

  Args:
    model: its sizes.
    bits: of its numbers.
    batch: texts.
    context: tokens of each.
    npu: the processor.
    pim: units in memory; each product goes where it is faster. None for none.

  Returns:
    "weights", "attention" and "total".
  """
  units = [npu] if pim is None else [npu, pim]
  cached = np.asarray(model.cached, np.float64) * batch * context
  parts = {
    "weights": (model.weights, bits.weights, batch),
    "attention": (cached, bits.cache, model.shared),
  }
  found = {
    name: np.minimum.reduce([seconds(unit, *part) for unit in units])
    for name, part in parts.items()
  }
  return found | {"total": found["weights"] + found["attention"]}
