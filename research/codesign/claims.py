"""Published claims on FABNet's accelerator, beside what can be computed.

Three numbers a claim: what the release says; what its cycle model gives, here
derived anew; and the same with every pass, the FFT along the sequence, and a
dense peer whose multipliers never wait. All are of models of hardware. Facts
are from the scripts of the release (SamsungLabs/Butterfly_Acc, commit 1bb951f),
whose measurements of peers cannot be repeated here.
"""

from typing import Any

import numpy as np

from research.codesign.problem import NETWORK, Problem
from research.cost.accelerators import butterfly
from research.cost.accelerators.butterfly import CORRECTED, RELEASED

# Hidden, FFN, layers.
_SIZES = {"Base": (768, 3072, 12), "Large": (1024, 4096, 24)}
_LENGTHS = (128, 256, 512, 768, 1024)
# Times faster than an RTX 2080 Ti and a Xeon Gold 6154, one sequence at a time,
# and of less energy: by the scripts of their two figures.
_SPEEDUP = {
  "GPU": {
    "Base": (10.9, 9.0, 4.1, 2.6, 1.9),
    "Large": (9.7, 8.0, 3.6, 2.4, 1.9),
  },
  "CPU": {
    "Base": (497.6, 763.2, 677.9, 657.5, 667.5),
    "Large": (525.2, 847.2, 779.2, 761.5, 756.0),
  },
}
_ENERGY = {
  "GPU": {"Base": (128, 138, 62, 40, 30), "Large": (149, 122, 55, 36, 30)},
  "CPU": {
    "Base": (4478, 6868, 6101, 5913, 6007),
    "Large": (4727, 7634, 7013, 6853, 6083),
  },
}
# Cycles a layer of BERT on the release's dense accelerator, of 2,048
# multipliers: what its model prints.
_DENSE = {
  "Base": {128: 637277, 256: 1280861, 512: 2798541, 1024: 7143373},
  "Large": {128: 1117181, 256: 2221053, 512: 4528237, 1024: 11107437},
}
_MULTIPLIERS = 2048


def rows() -> list[dict[str, Any]]:
  """All claims, one row a size and length where they have one."""
  return [*_latencies(), *_speedups(), *_energies(), *_dense(), *_choices()]


def _ms(engine, size, length, rules) -> float:
  hidden, ffn, layers = _SIZES[size]
  network = butterfly.Network(hidden, ffn, length, layers)
  count = butterfly.cycles(engine, network, rules)
  return float(butterfly.milliseconds(engine, count))


def _both(engine, size, length) -> tuple[float, float]:
  return tuple(_ms(engine, size, length, r) for r in (RELEASED, CORRECTED))


def _row(claim, size, length, published, released, corrected, note="", of=None):
  return {
    "claim": claim,
    "size": size,
    "length": length,
    "published": published,
    "released": released,
    "corrected": corrected,
    "note": note,
    "note_value": of,
  }


def _cloud() -> butterfly.Engine:
  return butterfly.Engine(120, 4)


def _latencies():
  """Milliseconds; the published ones are outputs of the released model."""
  edge = butterfly.Engine(20, 4, butterfly.MEMORIES["ddr3"])
  for name, engine in (("VCU128, 120 x 4", _cloud()), ("Zynq 7045", edge)):
    for size in _SIZES:
      for length in _LENGTHS:
        released, corrected = _both(engine, size, length)
        claim = f"latency (ms), {name}"
        yield _row(claim, size, length, None, released, corrected)


def _speedups():
  for peer, by_size in _SPEEDUP.items():
    for size, published in by_size.items():
      for length, times in zip(_LENGTHS, published):
        released, corrected = _both(_cloud(), size, length)
        yield _row(
          f"times faster than the {peer}", size, length, times, None,
          times * released / corrected,
          f"ms that the {peer} took, if so", times * released,
        )  # fmt: skip


def _energies():
  """What power ratio each pair of figures means, against the median one."""
  for peer, by_size in _ENERGY.items():
    ratios = {
      size: np.asarray(energy) / np.asarray(_SPEEDUP[peer][size])
      for size, energy in by_size.items()
    }
    usual = float(np.median(np.concatenate(list(ratios.values()))))
    for size, energy in by_size.items():
      for length, times, ratio in zip(_LENGTHS, energy, ratios[size]):
        released, corrected = _both(_cloud(), size, length)
        speedup = _SPEEDUP[peer][size][_LENGTHS.index(length)]
        yield _row(
          f"times less energy than the {peer}", size, length, times,
          speedup * usual, speedup * usual * released / corrected,
          f"ratio of powers, {usual:.1f} in the median", float(ratio),
        )  # fmt: skip


def _dense():
  """Beside a dense accelerator of as many multipliers."""
  engine = butterfly.Engine(128, 4, butterfly.MEMORIES["even"])
  for size, by_length in _DENSE.items():
    hidden, ffn, _ = _SIZES[size]
    for length, dense in by_length.items():
      network = butterfly.Network(hidden, ffn, length)
      released = int(butterfly.cycles(engine, network))
      corrected = int(butterfly.cycles(engine, network, CORRECTED))
      floor = int(butterfly.dense_cycles(network, _MULTIPLIERS))
      yield _row(
        "times faster than dense BERT", size, length, dense / released,
        dense / released, floor / corrected,
        "its dense peer, over the floor", dense / floor,
      )  # fmt: skip


def _choices():
  """How many of the 45 networks an engine of the study is fastest for."""
  fastest: dict[str, dict[str, int]] = {}
  for rules in butterfly.RULES:
    problem = Problem(rules=rules)
    space = problem.space()
    columns = space.columns(list(space))
    latency = problem.costs(columns)["latency_ms"]
    networks = list(zip(*(columns[name].tolist() for name in NETWORK)))
    for network in dict.fromkeys(networks):
      own = [at for at, one in enumerate(networks) if one == network]
      best = min(own, key=lambda at: latency[at])
      name = f"{columns['p_be'][best]} x {columns['p_bu'][best]}"
      by = fastest.setdefault(name, dict.fromkeys(butterfly.RULES, 0))
      by[rules] += 1
  for name, by in fastest.items():
    yield _row(
      f"{name} is the fastest of four engines, of 45 networks", "", 4000, None,
      by["released"], by["corrected"],
    )  # fmt: skip
  network = butterfly.Network(64, 64, 4000, 0, 1, 2)
  engine = butterfly.Engine(
    128, 4, butterfly.MEMORIES["even"], p_head=2, p_qk=64, p_sv=64, p_softmax=2
  )
  cost = {
    name: float(
      butterfly.milliseconds(engine, butterfly.cycles(engine, network, rules))
    )
    for name, rules in butterfly.RULES.items()
  }
  # Scores and sums of values, 2 L^2 d products, if no multiplier ever waits.
  least = butterfly.milliseconds(engine, 2 * 4000**2 * 64 / _MULTIPLIERS)
  yield _row(
    "latency (ms) of one ABfly block, d = 64", "", 4000, None,
    cost["released"], cost["corrected"],
    "attention by 256 multipliers, a reconstruction; by all 2,048 at least",
    float(least),
  )  # fmt: skip
