from research.cost.roofline import Ceilings, Phase


def test_a_floor_takes_the_longest_time_of_each_phase():
  ceilings = Ceilings(flops=2.0, bytes=4.0, exps=8.0)
  phases = Phase(10.0, 1.0), Phase(1.0, 40.0), Phase(1.0, 1.0, 16.0)
  assert ceilings.floor(phases) == 5.0 + 10.0 + 2.0


def test_an_unknown_rate_takes_no_time():
  assert Ceilings(flops=1.0, bytes=2.0).floor([Phase(1.0, 1.0, 9.0)]) == 1.0
