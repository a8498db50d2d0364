import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from research.bench import timing
from research.bench.case import Call


class Clock:
  """Time that passes only by calls, so that the arithmetic is exact."""

  def __init__(self, monkeypatch):
    self.now, self.made, self.waits = 0.0, [], 0
    clock = types.SimpleNamespace(perf_counter=lambda: self.now)
    monkeypatch.setattr(timing, "time", clock)

  def call(self, cost, name="", **more):
    """A call that takes cost(how often it was made) seconds."""
    count = itertools.count(1)

    def start(*_):
      self.made.append(name)
      self.now += cost(next(count))

    return Call(start=start, wait=self.wait, **more)

  def wait(self, _):
    self.waits += 1
    self.now += 0.125


def seconds(found):
  return [timed.seconds for timed in found]


def test_short_calls_share_one_wait(monkeypatch):
  clock = Clock(monkeypatch)
  monkeypatch.setattr(timing, "_IN_FLIGHT", 2.0)
  call = clock.call(lambda _: 2.0**-14)
  found = timing.medians([call], repeats=5, seconds=100.0)
  # One to compile, one to see how long it takes, then 16 at a time.
  assert clock.waits == 2 + 5 and len(clock.made) == 2 + 5 * 16
  assert seconds(found) == [2.0**-14 + 0.125 / 16]


def test_calls_with_arguments_of_their_own_wait_for_each(monkeypatch):
  clock = Clock(monkeypatch)
  monkeypatch.setattr(timing, "_IN_FLIGHT", 2.0)

  def inputs():
    clock.now += 50.0  # Not part of the time.
    return (1,)

  call = clock.call(lambda _: 2.0**-14, inputs=inputs, count=4)
  found = timing.medians([call], repeats=5, seconds=1e9)
  assert clock.waits == len(clock.made) == 1 + 5
  assert seconds(found) == [(2.0**-14 + 0.125) / 4]


def test_long_calls_stop_when_time_is_over(monkeypatch):
  clock = Clock(monkeypatch)
  # The first compiles; one outlier does not move the median.
  call = clock.call(lambda n: {1: 64.0, 4: 8.0}.get(n, 1.0))
  found = timing.medians([call], repeats=9, seconds=3.0)
  assert len(clock.made) == 2 + 3 and seconds(found) == [1.125]
  assert found[0].first_seconds == 64.125


def test_calls_take_turns(monkeypatch):
  clock = Clock(monkeypatch)
  calls = [clock.call(lambda _, s=s: float(s), str(s)) for s in (1, 2)]
  found = timing.medians(calls, repeats=2, seconds=100.0)
  assert clock.made == ["1", "1", "2", "2", "1", "2", "1", "2"]
  assert seconds(found) == [1.125, 2.125]


@pytest.mark.parametrize("when", [1, 2, 3])
def test_one_that_fails_does_not_stop_the_others(monkeypatch, when):
  clock = Clock(monkeypatch)

  def cost(count):
    if count == when:
      raise MemoryError("out of memory")
    return 1.0

  calls = [clock.call(cost, "bad"), clock.call(lambda _: 1.0, "good")]
  bad, good = timing.medians(calls, repeats=3, seconds=100.0)
  assert isinstance(bad, MemoryError) and bad.__traceback__ is None
  assert good.seconds == 1.125 and clock.made.count("bad") == when
  with pytest.raises(MemoryError):
    timing.seconds_of(clock.call(lambda _: cost(when)), repeats=1, seconds=1.0)


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
