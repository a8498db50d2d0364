import numpy as np
import pytest

from models.errors import InputError
from research.sol import windows
from research.sol.windows import Layout


def times_scored(cover, layout, tokens):
  """How often each token of the text is scored; tokens are their places."""
  count = np.zeros(len(tokens), int)
  for w, e, t in np.argwhere(cover.weights > 0):
    place = cover.tokens[w, cover.starts[w, e] + t + 1]
    count[place] += 1
  return count


@pytest.mark.parametrize(
  "context, horizon, episodes, length",
  [
    (16, 4, 3, 29),  # exactly one window
    (16, 4, 3, 30),
    (16, 4, 3, 101),
    (16, 8, 1, 64),
    (20, 8, 2, 77),  # the context is no multiple of the horizon
    (8, 8, 4, 200),  # no early starts
    (64, 8, 2, 131),  # more early starts than a window holds
  ],
)
def test_cover_scores_every_token_once(context, horizon, episodes, length):
  layout = Layout(context=context, horizon=horizon, episodes=episodes)
  tokens = np.arange(length, dtype=np.int32)
  cover = windows.cover(tokens, layout)
  count = times_scored(cover, layout, tokens)
  np.testing.assert_array_equal(count[: horizon + 1], 0)
  np.testing.assert_array_equal(count[horizon + 1 :], 1)
  assert set(np.unique(cover.weights)) <= {0.0, 1.0}
  assert cover.tokens.shape == (cover.num_windows, layout.length)
  assert cover.starts.shape == (cover.num_windows, episodes)
  assert cover.weights.shape == (cover.num_windows, episodes, horizon)
  assert cover.tokens.dtype == cover.starts.dtype == np.int32


def test_cover_gives_the_whole_context_beyond_the_head():
  layout = Layout(context=16, horizon=4, episodes=3)
  tokens = np.arange(101, dtype=np.int32)
  cover = windows.cover(tokens, layout)
  for w, e, t in np.argwhere(cover.weights > 0):
    start = cover.starts[w, e]
    place = cover.tokens[w, start + t + 1]
    assert start >= min(16, place - t - 1)
    assert start % 4 == 0


def test_a_part_of_a_cover():
  layout = Layout(context=16, horizon=4, episodes=3)
  cover = windows.cover(np.arange(101, dtype=np.int32), layout)
  rows = np.array([2, 0])
  part = cover.take(rows)
  assert part.num_windows == 2
  for name in ("tokens", "starts", "weights"):
    np.testing.assert_array_equal(
      getattr(part, name), getattr(cover, name)[rows]
    )


def test_layout():
  layout = Layout(context=16, horizon=4, episodes=3)
  np.testing.assert_array_equal(layout.starts(), [16, 20, 24])
  assert layout.prefix == 24
  # The last target lies in the window.
  assert layout.length == 24 + 4 + 1
  layout.check(4)
  layout.check(2)


@pytest.mark.parametrize(
  "context, horizon, name", [(18, 4, "context=18"), (16, 6, "horizon=6")]
)
def test_episodes_must_fill_pages(context, horizon, name):
  with pytest.raises(InputError, match=name) as error:
    Layout(context=context, horizon=horizon).check(4)
  assert "page size 4" in str(error.value)


def test_random_windows_are_a_function_of_seed_and_step():
  layout = Layout(context=8, horizon=4, episodes=2)
  tokens = np.arange(500, dtype=np.int32)
  draw = lambda **where: windows.random_windows(tokens, layout, 6, **where)
  one = draw(seed=1, step=2)
  assert one.shape == (6, layout.length)
  np.testing.assert_array_equal(one, draw(seed=1, step=2))
  assert np.any(one != draw(seed=1, step=3))
  assert np.any(one != draw(seed=2, step=2))
  np.testing.assert_array_equal(np.diff(one, axis=1), 1)


def test_windows_reach_both_ends_of_the_text():
  layout = Layout(context=8, horizon=4)
  tokens = np.arange(layout.length + 2, dtype=np.int32)
  drawn = windows.random_windows(tokens, layout, 200, seed=0, step=0)
  assert set(drawn[:, 0]) == {0, 1, 2}
  spread = windows.spread_windows(tokens, layout, 3)
  np.testing.assert_array_equal(spread[:, 0], [0, 1, 2])
  assert spread[-1, -1] == tokens[-1]


@pytest.mark.parametrize(
  "cut",
  [
    lambda text, layout: windows.cover(text, layout),
    lambda text, layout: windows.spread_windows(text, layout, 2),
    lambda text, layout: windows.random_windows(
      text, layout, 2, seed=0, step=0
    ),
  ],
)
def test_a_short_text_is_named(cut):
  layout = Layout(context=8, horizon=4)
  with pytest.raises(InputError, match="12 tokens, a window needs 13"):
    cut(np.arange(12, dtype=np.int32), layout)


def test_episodes_that_follow_each_other_are_one():
  layout = Layout(context=8, horizon=4, episodes=3)
  text = windows.cover(np.arange(60, dtype=np.int32), layout)
  found, rows = windows.unbroken(text, layout)
  # The head of the text has windows of its own, with early starts.
  assert 0 < len(rows) < text.num_windows
  assert found.starts.tolist() == [[8]] * len(rows)
  assert found.weights.shape == (len(rows), 1, 12)
  np.testing.assert_array_equal(
    found.weights.reshape(-1, 3, 4), text.weights[rows]
  )
  np.testing.assert_array_equal(found.tokens, text.tokens[rows])


def test_the_mean_context_is_that_of_scored_tokens():
  starts = np.array([[8, 12]])
  weights = np.array([[[1, 1, 0, 0], [0, 0, 0, 1]]], np.float32)
  text = windows.Cover(np.zeros((1, 17), np.int32), starts, weights)
  # The first step of an episode sees one token more than its start.
  assert text.mean_context == pytest.approx((9 + 10 + 16) / 3)
