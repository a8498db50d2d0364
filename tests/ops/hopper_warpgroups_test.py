"""Registers that warpgroups may ask for, against those that there are."""

import pytest

from ops.hopper_warpgroups import REGISTERS


@pytest.mark.parametrize("workers", [w for w in REGISTERS if REGISTERS[w]])
def test_registers_are_there(workers):
  # A launch gives each of its threads as many, a multiple of eight, and what
  # is asked for beyond these is waited for without an end.
  launched = 65536 // (128 * (workers + 1)) // 8 * 8
  computing, loading = REGISTERS[workers]
  assert loading < launched < computing
  assert workers * computing + loading <= (workers + 1) * launched
  assert computing % 8 == loading % 8 == 0
