import dataclasses

import numpy as np
import pytest

from models.errors import InputError
from research.cost.accelerators import butterfly
from research.cost.accelerators.butterfly import (
  CORRECTED,
  DEVICES,
  MEMORIES,
  Engine,
  Network,
  Rules,
)

VCU128 = Engine(120, 4)
ZYNQ = Engine(20, 4, MEMORIES["ddr3"])


def base(length, **more):
  return Network(768, 3072, length, **more)


def layer(engine, network, rules=butterfly.RELEASED):
  return int(sum(butterfly.layer_cycles(engine, network, rules).values()))


# What the released model prints for a layer of FABNet-Base, by running it.
@pytest.mark.parametrize(
  "engine, length, cycles",
  [
    (VCU128, 128, 28288),
    (VCU128, 256, 45312),
    (VCU128, 512, 79360),
    (VCU128, 1024, 147456),
    (ZYNQ, 128, 383744),
    (ZYNQ, 1024, 3217664),
  ],
)
def test_golden_cycles_of_the_released_model(engine, length, cycles):
  assert layer(engine, base(length)) == cycles


def test_released_latencies():
  found = butterfly.cycles(VCU128, base(np.array([128, 1024]), layers=12))
  milliseconds = butterfly.milliseconds(VCU128, found)
  np.testing.assert_allclose(milliseconds, [1.99680, 10.40866], atol=1e-5)


def test_parts_of_a_layer_by_hand():
  # Rows of 1024, 120 at a time: two passes, of which the FFT counts one.
  found = butterfly.layer_cycles(VCU128, base(128))
  compute = 1024 // 8 * 10
  assert found["fft_hidden"] == compute + 10 * 1024 * 32 // 256
  assert found["fft_sequence"] == compute + 1024 * 120 * 32 // 2048
  assert found["up"] == 8 * 1280
  assert found["down"] == 12 * 2 * 4096 * 16 // 256 + 4096 // 8 * 12


def simulated(loads, works, stores):
  """A three-stage pipeline in lock step, pass by pass."""
  stages, runs, total = [loads, works, stores], len(loads), 0
  for tick in range(runs + 2):
    total += max(
      stage[tick - late]
      for late, stage in enumerate(stages)
      if 0 <= tick - late < runs
    )
  return total


@pytest.mark.parametrize("length", [60, 120, 128, 1000])
def test_complete_pipelines_are_those_of_a_simulation(length):
  """Of the product up, whose three stages differ on the slow memory."""
  engine, network = dataclasses.replace(ZYNQ, p_be=60), Network(64, 64, length)
  runs, words = -(-length // 60), 64 * 60
  stages = [max(words * 16 // 64, 768 * 16 // 64)], [64 // 8 * 6]
  stages = *stages, [words * 16 // 128]
  found = butterfly.layer_cycles(engine, network, Rules(complete=True))
  assert found["up"] == simulated(*[stage * runs for stage in stages])


def test_a_pass_that_the_released_model_leaves_out_is_counted():
  one, two = Network(64, 64, 120), Network(64, 64, 121)
  released = [layer(VCU128, network) for network in (one, two)]
  assert released[0] == released[1]
  complete = Rules(complete=True)
  assert layer(VCU128, two, complete) > layer(VCU128, one, complete)


def test_the_fft_of_a_sequence_grows_with_its_logarithm():
  long = Network(64, 64, 4096)
  found = butterfly.layer_cycles(VCU128, long, CORRECTED)["fft_sequence"]
  # One pass: the 64 columns are fewer than the engines.
  compute, twiddles = 4096 // 8 * 12, 4096 * 12 * 32 // 256
  load, store = 4096 * 120 * 32 // 2048, 4096 * 120 * 16 // 2048
  assert found == compute + max(load, twiddles) + max(store, 4096)


def test_an_array_of_sizes_costs_what_each_costs():
  hidden = np.array([64, 128, 256])
  engines = Engine(np.array([[128], [16]]), np.array([[4], [32]]))
  network = Network(hidden, 2 * hidden, 4000, 1, 1, hidden // 32)
  engines = dataclasses.replace(engines, p_head=2, p_qk=16, p_sv=16)
  found = butterfly.cycles(engines, network, CORRECTED)
  assert found.shape == (2, 3)
  one = Engine(16, 32, p_head=2, p_qk=16, p_sv=16)
  single = butterfly.cycles(one, Network(256, 512, 4000, 1, 1, 8), CORRECTED)
  assert found[1, 2] == single


def test_attention_by_hand():
  engine = dataclasses.replace(VCU128, p_head=2, p_qk=8, p_sv=16)
  network = Network(64, 64, 100, 0, 1, heads=4)
  found = butterfly.attention_layer_cycles(engine, network)
  square = butterfly.layer_cycles(engine, network, CORRECTED)["up"]
  assert found["qkv"] == 3 * square and found["out"] == square
  # Two groups of heads of 16: scores take 200 cycles a row, values 100.
  assert found["attention"] == 3 * 100 * 64 * 16 // 2048 + 2 * 102 * 200
  released = butterfly.cycles(VCU128, network)
  assert released == layer(VCU128, network)


def test_the_published_designs_fit_their_boards_by_our_estimates():
  large = Network(1024, 4096, 1024)
  found = butterfly.resources(VCU128, large)
  assert (found.dsp, found.bram36) == (1920, 976)
  butterfly.check_fits(VCU128, large, DEVICES["vcu128"])
  zynq = dataclasses.replace(ZYNQ, dsp_subtractors=True)
  assert butterfly.resources(zynq, large).dsp == 480
  butterfly.check_fits(zynq, large, DEVICES["zynq7045"])
  with pytest.raises(InputError, match="1920 DSPs, and XC7Z045 has 900"):
    butterfly.check_fits(VCU128, large, DEVICES["zynq7045"])
  assert not butterfly.fits(VCU128, large, DEVICES["zynq7045"])
  wide = Engine(np.array([32, 128]), 4)
  fits = butterfly.fits(wide, large, DEVICES["zynq7045"])
  np.testing.assert_array_equal(fits, [True, False])


@pytest.mark.parametrize(
  "engine, network, words",
  [
    (Engine(0, 4), base(128), "p_be=0"),
    (Engine(4, 3), base(128), "p_bu=3: give powers of two"),
    (VCU128, Network(1, 64, 128), "hidden=1"),
    (VCU128, Network(64.0, 64, 128), "hidden=64.0: give integers"),
    (VCU128, Network(64, 64, 0), "length=0"),
    (VCU128, Network(64, 64, 8, heads=5), "5 heads do not divide"),
    (Engine(4, 4, bits=24), base(128), "no multiple of a complex"),
  ],
)
def test_sizes_that_cannot_be_used_are_named(engine, network, words):
  with pytest.raises(InputError, match=words):
    butterfly.layer_cycles(engine, network)


def test_attention_needs_its_engine():
  network = Network(64, 64, 8, 0, 1)
  with pytest.raises(InputError, match="p_head: an ABfly block"):
    butterfly.cycles(VCU128, network, CORRECTED)


def test_the_floor_of_a_dense_engine():
  network = Network(64, 128, 10, 2)
  per_layer = 10 * (4 * 64**2 + 2 * 64 * 128) + 2 * 10**2 * 64
  assert butterfly.dense_cycles(network, 32) == 2 * -(-per_layer // 32)
