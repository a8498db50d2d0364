"""Cycles of the adaptable butterfly engine of FABNet (arXiv:2209.09570).

An accelerator has `p_be` butterfly engines, each of which takes one row at a
time through log2(n) stages with `p_bu` butterfly units. The same units compute
an FFT or a product with a butterfly matrix.

**These are the cycles of the released performance model, not an FPGA's.** No
board was at hand, and an outside reproduction found that model up to 288% from
the latencies that a later paper draws for the same design. The formulas are
derived anew from what the released model counts; its quirks are switches of
`Rules`, because the released numbers need them and a design choice should not:

- its pipelines leave out one pass of every product (`complete` counts it), so
  that two passes of an FFT cost as much as one;
- its second FFT has the length of the hidden size instead of the sequence's
  (`sequence_fft` takes the latter);
- it has no attention, and charges an ABfly block as an FBfly block. The engine
  for attention here is a reconstruction, with one row of scores in flight.

Every size may be an array, so that a whole space is costed in one call.
"""

import dataclasses
from typing import Any

import numpy as np

from models.errors import InputError

# Integers or arrays of them that broadcast with each other.
Sizes = Any
# Words of 16 bits that one 18-kbit block RAM holds (UltraScale+ and 7 series).
_DEPTH_OF_BLOCK = 1024
# Real multipliers of a butterfly unit, by the released RTL; and subtractors of
# half precision, which take DSPs when the IP is set to medium usage. One DSP
# each is a reconstruction.
_MULTIPLIERS, _SUBTRACTORS = 4, 2
# Fields of `Engine` that an ABfly block needs to be at least 1.
_ATTENTION = ("p_head", "p_qk", "p_sv", "p_softmax")


@dataclasses.dataclass(frozen=True)
class Memory:
  """Off-chip memory, in bits a cycle of the accelerator's clock.

  Attributes:
    name: of it.
    input_bits: for rows that come in.
    coef_bits: for twiddles.
    output_bits: for rows that go out.
  """

  name: str
  input_bits: int
  coef_bits: int
  output_bits: int


# As the released scripts set them: both boards, and the study of co-design.
MEMORIES = {
  "hbm": Memory("hbm", 2048, 256, 2048),
  "ddr3": Memory("ddr3", 64, 64, 128),
  "even": Memory("even", 2048, 2048, 2048),
}


@dataclasses.dataclass(frozen=True)
class Engine:
  """A configuration of the accelerator.

  Attributes:
    p_be: butterfly engines: rows at a time.
    p_bu: butterfly units of an engine, a power of two.
    memory: off-chip.
    p_head: engines for attention, each for one head; 0 has none.
    p_qk: multipliers of each for scores.
    p_sv: multipliers of each for the sum of values.
    p_softmax: scores of each that pass the softmax a cycle; the released model
      of a dense accelerator has one.
    bits: of a number.
    clock_mhz: of the accelerator.
    efficiency: share of cycles that do work; the released scripts take .85.
    dsp_subtractors: subtractors take DSPs too, as the released projects set it
      for the Zynq and for 120 engines.
  """

  p_be: Sizes
  p_bu: Sizes
  memory: Memory = MEMORIES["hbm"]
  p_head: Sizes = 0
  p_qk: Sizes = 0
  p_sv: Sizes = 0
  p_softmax: Sizes = 1
  bits: int = 16
  clock_mhz: float = 200.0
  efficiency: float = 0.85
  dsp_subtractors: bool = False


@dataclasses.dataclass(frozen=True)
class Network:
  """FABNet as an accelerator sees it; sizes are padded to powers of two.

  Attributes:
    hidden: d.
    ffn: inner size of the feed-forward network.
    length: tokens L.
    layers: FBfly blocks: two FFTs and a butterfly FFN.
    attention_layers: ABfly blocks: butterfly q, k, v and output, attention, and
      a butterfly FFN.
    heads: of the attention.
  """

  hidden: Sizes
  ffn: Sizes
  length: Sizes
  layers: Sizes = 1
  attention_layers: Sizes = 0
  heads: Sizes = 1


@dataclasses.dataclass(frozen=True)
class Rules:
  """What is counted; by default as the released model does.

  Attributes:
    complete: all passes and the last store, which the released model omits.
    sequence_fft: the second FFT runs along the sequence.
    attention: ABfly blocks cost their attention; else as FBfly blocks.
  """

  complete: bool = False
  sequence_fft: bool = False
  attention: bool = False


RELEASED = Rules()
CORRECTED = Rules(complete=True, sequence_fft=True, attention=True)
RULES = {"released": RELEASED, "corrected": CORRECTED}


@dataclasses.dataclass(frozen=True)
class Device:
  """What an FPGA has, by its data sheet (DS890, DS190).

  Attributes:
    part: of its maker.
    dsp: slices.
    bram36: block RAMs of 36 kbit.
    lut: look-up tables; no estimate of ours is compared with them.
  """

  part: str
  dsp: int
  bram36: int
  lut: int


DEVICES = {
  "vcu128": Device("XCVU37P", 9024, 2016, 1_303_680),
  "zynq7045": Device("XC7Z045", 900, 545, 218_600),
}


@dataclasses.dataclass(frozen=True)
class Resources:
  """Estimates of what an engine takes.

  LUTs and power are not estimated: the reports of the implementations are not
  part of the release.

  Attributes:
    dsp: slices, by the multipliers of the RTL; those of a softmax are not known
      and not counted.
    bram36: block RAMs of 36 kbit, by the RAMs of the RTL.
  """

  dsp: Sizes
  bram36: Sizes


def layer_cycles(
  engine: Engine, network: Network, rules: Rules = RELEASED
) -> dict[str, np.ndarray]:
  """Cycles of one FBfly block, by its products.

  Args:
    engine: configuration.
    network: sizes.
    rules: what is counted.

  Returns:
    "fft_hidden", "fft_sequence", "up", "down"; integers or arrays of them.

  Raises:
    InputError: a size cannot be used.
  """
  check(engine, network)
  d, h = _power(network.hidden), _power(network.ffn)
  rows = np.asarray(network.length)
  second = (d, rows)
  if rules.sequence_fft:
    # It takes the padded columns too, because the first FFT has filled them.
    second = (_power(network.length), d)
  return {
    "fft_hidden": _fft(engine, d, rows, 1, 2, rules),
    "fft_sequence": _fft(engine, *second, 2, 1, rules),
    "up": _butterfly(engine, rows, d, h, rules),
    "down": _butterfly(engine, rows, h, d, rules),
  }


def attention_layer_cycles(
  engine: Engine, network: Network, rules: Rules = CORRECTED
) -> dict[str, np.ndarray]:
  """Cycles of one ABfly block, by its products: a reconstruction.

  Rows of scores follow each other through three stages: q k', softmax, and the
  sum of values.

  Args:
    engine: configuration, with engines for attention.
    network: sizes.
    rules: what is counted.

  Returns:
    "qkv", "attention", "out", "up", "down"; integers or arrays of them.

  Raises:
    InputError: a size cannot be used, or there is no engine for attention.
  """
  check(engine, network)
  for name in _ATTENTION:
    if np.any(np.asarray(getattr(engine, name)) < 1):
      raise InputError(f"{name}: an ABfly block needs at least 1")
  d, h = _power(network.hidden), _power(network.ffn)
  rows, width = np.asarray(network.length), np.asarray(network.hidden)
  head = width // network.heads
  step = np.maximum(
    np.maximum(_ceil(rows * head, engine.p_qk), _ceil(rows, engine.p_softmax)),
    _ceil(rows * head, engine.p_sv),
  )
  groups = _ceil(network.heads, engine.p_head)
  moved = rows * width
  core = np.maximum(groups * (rows + 2) * step, _output(engine, moved, 1))
  square = _butterfly(engine, rows, d, d, rules)
  return {
    "qkv": 3 * square,
    "attention": _input(engine, 3 * moved, 1) + core,
    "out": square,
    "up": _butterfly(engine, rows, d, h, rules),
    "down": _butterfly(engine, rows, h, d, rules),
  }


def cycles(
  engine: Engine, network: Network, rules: Rules = RELEASED
) -> np.ndarray:
  """Cycles of a whole network, without embeddings and head.

  Raises:
    InputError: as `layer_cycles` and `attention_layer_cycles`.
  """
  blocks = np.asarray(network.layers)
  fourier = sum(layer_cycles(engine, network, rules).values())
  if not rules.attention or not np.any(network.attention_layers):
    return (blocks + network.attention_layers) * fourier
  # Points of a space that do not attend need no engine for attention.
  idle = np.asarray(network.attention_layers) == 0
  attending = dataclasses.replace(
    engine,
    **{
      name: np.where(idle, np.maximum(getattr(engine, name), 1),
                     getattr(engine, name))
      for name in _ATTENTION
    },
  )  # fmt: skip
  attention = sum(attention_layer_cycles(attending, network, rules).values())
  return blocks * fourier + network.attention_layers * attention


def milliseconds(engine: Engine, count: Sizes) -> np.ndarray:
  """Time of so many cycles, at the clock and efficiency of an engine."""
  return np.asarray(count) / (engine.clock_mhz * 1e3 * engine.efficiency)


def dense_cycles(network: Network, multipliers: int) -> np.ndarray:
  """Cycles of a dense Transformer of these sizes whose multipliers never wait.

  A floor: products with weights and attention (4 d^2 + 2 d h a token, and 2 L^2
  d), nothing else. All its layers have attention.
  """
  d, h, length = network.hidden, network.ffn, network.length
  layers = np.asarray(network.layers) + network.attention_layers
  products = length * (4 * d * d + 2 * d * h) + 2 * length * length * d
  return layers * _ceil(products, multipliers)


def resources(engine: Engine, network: Network) -> Resources:
  """Estimates the DSPs and block RAMs of an engine that can run a network.

  An engine keeps two banks of 2 p_bu RAMs, which hold one row each; all share
  two banks of 4 p_bu RAMs for the twiddles of one stage.

  Raises:
    InputError: a size cannot be used.
  """
  check(engine, network)
  longest = np.maximum(_power(network.hidden), _power(network.ffn))
  longest = np.maximum(longest, _power(network.length))
  units = np.asarray(engine.p_be) * engine.p_bu
  dsp = units * (_MULTIPLIERS + _SUBTRACTORS * engine.dsp_subtractors)
  dsp = dsp + np.asarray(engine.p_head) * (
    np.asarray(engine.p_qk) + engine.p_sv
  )
  blocks = _ceil(_ceil(longest, 2 * np.asarray(engine.p_bu)), _DEPTH_OF_BLOCK)
  halves = (4 * units + 8 * np.asarray(engine.p_bu)) * blocks
  return Resources(dsp=dsp, bram36=_ceil(halves, 2))


def fits(engine: Engine, network: Network, device: Device) -> np.ndarray:
  """Whether DSPs and block RAMs of a device suffice, by our estimates."""
  found = resources(engine, network)
  return (found.dsp <= device.dsp) & (found.bram36 <= device.bram36)


def check_fits(engine: Engine, network: Network, device: Device) -> None:
  """Raises InputError with one line where one engine does not fit."""
  found = resources(engine, network)
  for name, words in (("dsp", "DSPs"), ("bram36", "block RAMs of 36 kbit")):
    needed, there = int(getattr(found, name)), getattr(device, name)
    if needed > there:
      raise InputError(
        f"p_be={engine.p_be} p_bu={engine.p_bu} needs {needed} {words}, and "
        f"{device.part} has {there}: take a smaller product p_be * p_bu"
      )


def check(engine: Engine, network: Network) -> None:
  """Raises InputError where a size cannot be used."""
  for name, lower in (("hidden", 2), ("ffn", 2), ("length", 1)):
    _bounds(name, getattr(network, name), lower, 1 << 20)
  _bounds("layers", network.layers, 0, 1 << 16)
  _bounds("attention_layers", network.attention_layers, 0, 1 << 16)
  _bounds("heads", network.heads, 1, 1 << 16)
  if np.any(np.asarray(network.hidden) % network.heads):
    raise InputError(
      f"hidden={network.hidden}: {network.heads} heads do not divide it"
    )
  _bounds("p_be", engine.p_be, 1, 1 << 16)
  _bounds("p_bu", engine.p_bu, 1, 1 << 16)
  units = np.asarray(engine.p_bu)
  if np.any(units & (units - 1)):
    raise InputError(f"p_bu={engine.p_bu}: give powers of two")
  memory = engine.memory
  for name in ("input_bits", "coef_bits", "output_bits"):
    width = getattr(memory, name)
    if width % (2 * engine.bits):
      raise InputError(
        f"memory {memory.name}: {name}={width} is no multiple of a complex "
        f"number's {2 * engine.bits} bits"
      )


def _bounds(name: str, given: Sizes, lower: int, upper: int) -> None:
  found = np.asarray(given)
  if not np.issubdtype(found.dtype, np.integer):
    raise InputError(f"{name}={given!r}: give integers")
  if np.any(found < lower) or np.any(found > upper):
    raise InputError(f"{name}={given}: give integers from {lower} to {upper}")


def _fft(engine, n, rows, parts_in, parts_out, rules) -> np.ndarray:
  """FFTs of length n of so many rows; 2 parts are a complex number's.

  Loading and computing are one stage, and storing is the other.
  """
  runs = _ceil(rows, engine.p_be)
  words = n * engine.p_be
  load = np.maximum(_input(engine, words, parts_in), n)
  work = _compute(engine, n) + np.maximum(load, _twiddles(engine, n, 1, 2))
  store = np.maximum(_output(engine, words, parts_out), n)
  step = np.maximum(work, store)
  if rules.complete:
    return work + (runs - 1) * step + store
  return work + np.maximum(runs - 2, 0) * step


def _butterfly(engine, rows, width, outputs, rules) -> np.ndarray:
  """Products with a butterfly matrix: load, compute and store are stages.

  Where outputs are more than inputs, so many matrices take the same rows.
  """
  runs = _ceil(rows, engine.p_be) * np.maximum(outputs // width, 1)
  words = width * engine.p_be
  load = np.maximum(_input(engine, words, 1), width)
  load = np.maximum(load, _twiddles(engine, width, 2, 1))
  work = _compute(engine, width)
  store = np.maximum(_output(engine, words, 1), width)
  step = np.maximum(np.maximum(load, work), store)
  last = np.maximum(work, store)
  if rules.complete:
    # With a single run nothing overlaps.
    several = load + np.maximum(load, work) + (runs - 2) * step + last + store
    return np.where(runs > 1, several, load + work + store)
  more = np.where(runs > 2, np.maximum(runs - 3, 0) * step + last, 0)
  return load + work + more


def _compute(engine, n) -> np.ndarray:
  return _ceil(n, 2 * np.asarray(engine.p_bu)) * _log2(n)


def _twiddles(engine, n, numbers, parts) -> np.ndarray:
  """Cycles until numbers * n * log2(n) twiddles of so many parts are there."""
  count = numbers * n * _log2(n)
  read = _ceil(count, engine.memory.coef_bits // (parts * engine.bits))
  # They are written into 4 p_bu RAMs, each as wide as a complex number.
  written = _ceil(count * parts, 8 * np.asarray(engine.p_bu))
  return np.maximum(read, written)


def _input(engine, words, parts) -> np.ndarray:
  return _ceil(words, engine.memory.input_bits // (parts * engine.bits))


def _output(engine, words, parts) -> np.ndarray:
  return _ceil(words, engine.memory.output_bits // (parts * engine.bits))


def _ceil(a: Sizes, b: Sizes) -> np.ndarray:
  return -(-np.asarray(a, np.int64) // np.asarray(b, np.int64))


def _log2(n: np.ndarray) -> np.ndarray:
  """Exact, of powers of two."""
  return np.round(np.log2(n)).astype(np.int64)


def _power(n: Sizes) -> np.ndarray:
  """The least power of two that is not less than n; at least 2."""
  exact = np.ceil(np.log2(np.asarray(n, np.float64)) - 1e-12).astype(np.int64)
  return np.int64(1) << np.maximum(exact, 1)
