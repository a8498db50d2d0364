import types

import jax.numpy as jnp
import numpy as np
import pytest

from research.bench import timing


class Clock:
  """Time that passes only by calls, so that the arithmetic is exact."""

  def __init__(self, monkeypatch, cost):
    self.now, self.cost, self.calls, self.waits = 0.0, cost, 0, 0
    clock = types.SimpleNamespace(perf_counter=lambda: self.now)
    monkeypatch.setattr(timing, "time", clock)

  def call(self):
    self.calls += 1
    self.now += self.cost(self.calls)

  def wait(self, _):
    self.waits += 1
    self.now += 0.125


def test_short_calls_share_one_wait(monkeypatch):
  clock = Clock(monkeypatch, lambda _: 2.0**-14)
  monkeypatch.setattr(timing, "_IN_FLIGHT", 2.0)
  found = timing.seconds_a_call(
    clock.call, clock.wait, repeats=5, seconds=100.0
  )
  # One to compile, one to see how long it takes, then 16 at a time.
  assert clock.waits == 2 + 5 and clock.calls == 2 + 5 * 16
  assert found == 2.0**-14 + 0.125 / 16


def test_long_calls_stop_when_time_is_over(monkeypatch):
  # The first compiles; one outlier does not move the median.
  clock = Clock(monkeypatch, lambda n: {1: 64.0, 4: 8.0}.get(n, 1.0))
  found = timing.seconds_a_call(clock.call, clock.wait, repeats=9, seconds=3.0)
  assert clock.calls == 2 + 3 and found == 1.125


@pytest.mark.parametrize(
  "platform, megabytes, count",
  [
    ("gpu", 100, 3),
    ("gpu", 240, 1),
    ("gpu", 500, 1),
    ("gpu", 1, 8),
    ("tpu", 60, 4),
    ("cpu", 1, 1),
  ],
)
def test_sets_of_arrays_exceed_a_cache(monkeypatch, platform, megabytes, count):
  monkeypatch.setattr(timing, "_COLD_BYTES", 240)
  arrays = {"x": jnp.arange(megabytes, dtype=jnp.uint8)}
  sets = timing.cold_sets(arrays, platform)
  assert len(sets) == count and sets[0] is arrays
  for copy in sets[1:]:
    np.testing.assert_array_equal(copy["x"], arrays["x"])
  places = {entry["x"].unsafe_buffer_pointer() for entry in sets}
  assert len(places) == count


def test_calls_are_made_in_turn():
  call = timing.in_turn([lambda: "a", lambda: "b"])
  assert [call() for _ in range(5)] == ["a", "b", "a", "b", "a"]
