import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from research.core import intervals
from research.sol import rollout, scoring
from research.sol import windows as windows_lib
from research.sol.controllers import TwoLevels, random_schedule
from research.sol.rollout import Controller
from research.sol.scoring import BlockSeries, ScanSeries, Score
from tests.research.sol import toy

LENGTH = 150
COSTS = np.stack(
  [toy.TABLE.kappa, toy.TABLE.rho, np.asarray(toy.TABLE.bits) / 16], -1
)
FURTHER = np.arange(16.0).reshape(8, 2)
CHEAP, FULL = 0, 7
calls = []


def _act(params, goal, carry, seen, key):
  calls.append(seen)
  return goal[..., 0], carry, ()


CONSTANT = Controller(start=lambda params, goal: (), act=_act)


@pytest.fixture(scope="module")
def cover():
  cover = windows_lib.cover(toy.text(LENGTH), toy.LAYOUT)
  # A batch of three windows has to be filled up.
  assert cover.num_windows == 7
  return cover


@pytest.fixture(scope="module")
def schedules(cover):
  shape = cover.weights.shape
  levels = TwoLevels.around(toy.TABLE, np.array([0.5, 0.6, 0.5]))
  schedule = random_schedule(levels, shape, seed=0)
  return np.stack([np.full(shape, FULL), schedule, np.full(shape, CHEAP)])


def run(cover, schedules, **options):
  series = [
    BlockSeries(name="block", actions=schedules.astype(np.int16)),
    ScanSeries(
      name="scan",
      controller=CONSTANT,
      params=None,
      goals=np.array([[FULL], [CHEAP]], np.int32),
    ),
  ]
  settings = {"window_batch": 3, "further_costs": FURTHER}
  return scoring.evaluate(
    toy.setup(), toy.lm(), cover, series, **(settings | options)
  )


@pytest.fixture(scope="module")
def scores(cover, schedules):
  done = []
  found = run(cover, schedules, keep_tokens=True, progress=done.append)
  # Every scored token counts once a point.
  assert sum(done) == 5 * int(cover.weights.sum())
  return found


def test_the_full_action_is_the_dense_perplexity(cover, scores):
  tokens = jnp.asarray(cover.tokens)
  logits = language_model.forward(toy.CONFIG, toy.lm(), tokens)
  log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
  nll = np.zeros(cover.starts.shape)
  for w, e, t in np.argwhere(cover.weights > 0):
    at = cover.starts[w, e] + t
    nll[w, e] -= log_probs[w, at, cover.tokens[w, at + 1]]
  for score in (scores["block"][0], scores["scan"][0]):
    np.testing.assert_allclose(score.nll, nll, rtol=0, atol=1e-3)
    np.testing.assert_allclose(score.means, 1)
    assert score.net_keep == pytest.approx(1)
  # Every token but the head's is scored once.
  count = LENGTH - toy.HORIZON - 1
  assert scores["block"][0].tokens.sum() == count
  expected = np.exp(nll.sum() / count)
  assert scores["block"][0].perplexity == pytest.approx(expected, rel=1e-4)


def test_blocks_and_scans_agree(scores):
  block, scan = scores["block"][2], scores["scan"][1]
  np.testing.assert_allclose(block.nll, scan.nll, rtol=0, atol=2e-3)
  np.testing.assert_allclose(block.spent, scan.spent)
  assert scores["block"][0].mean_nll != scores["block"][2].mean_nll


def test_a_schedule_is_scored_as_it_stands(cover, schedules, scores):
  setup = toy.setup()

  @jax.jit
  def direct(lm, tokens, starts, actions):
    length = int(cover.starts.max()) + 1
    prefix = setup.build_prefix(lm, tokens[:, :length], toy.HORIZON)
    return rollout.score_block(setup, lm, prefix, tokens, starts, actions).log_p

  log_p = np.asarray(
    direct(
      toy.lm(),
      jnp.asarray(cover.tokens),
      jnp.asarray(cover.starts),
      jnp.asarray(schedules[1]),
    )
  )
  score = scores["block"][1]
  nll = -(log_p * cover.weights).sum(-1)
  np.testing.assert_allclose(score.nll, nll, rtol=0, atol=1e-3)
  np.testing.assert_allclose(score.own, log_p, rtol=0, atol=1e-4)
  each = np.concatenate([COSTS, FURTHER], axis=1)[schedules[1]]
  spent = (each * cover.weights[..., None]).sum(2)
  np.testing.assert_allclose(score.spent, spent, rtol=1e-6)
  count = cover.weights.sum()
  np.testing.assert_allclose(score.means, spent.sum((0, 1))[:3] / count)
  np.testing.assert_allclose(score.further, spent.sum((0, 1))[3:] / count)
  assert score.net_keep == pytest.approx(score.means.mean())


def test_a_divergence_is_that_of_the_point_and_the_episode(cover, schedules):
  def divergences(schedules):
    series = [BlockSeries(name="block", actions=schedules.astype(np.int16))]
    found = scoring.evaluate(
      toy.setup(), toy.lm(), cover, series, window_batch=3, divergence=True
    )
    return [score.nll for score in found["block"]]

  full, middle, cheap = divergences(schedules)
  np.testing.assert_allclose(full, 0, atol=1e-3)
  (alone,) = divergences(schedules[1:2])
  np.testing.assert_allclose(middle, alone, rtol=1e-4, atol=1e-3)
  assert 0.1 < middle.sum() < cheap.sum()


def test_pieces_change_nothing_and_a_controller_is_compiled_once(
  cover, schedules, scores
):
  """Points apart by `max_rows`; the same shapes are not traced again."""
  traced = len(calls)
  again = run(cover, schedules)
  assert len(calls) == traced
  apart = run(cover, schedules, max_rows=9)
  for found in (again, apart):
    for name in scores:
      for one, other in zip(found[name], scores[name], strict=True):
        np.testing.assert_allclose(one.nll, other.nll, rtol=0, atol=2e-3)
        np.testing.assert_array_equal(one.spent, other.spent)
        assert one.own is None


def simple(nll, keep):
  nll = np.asarray(nll, np.float64)[:, None]
  tokens = np.full(nll.shape, 4.0)
  return Score(
    nll=nll, spent=np.full((*nll.shape, 3), 4.0 * keep), tokens=tokens
  )


def test_mixing():
  low, high = simple([8, 4], 0.25), simple([4, 0], 0.75)
  half = scoring.mix(low, high, 0.5)
  np.testing.assert_allclose(half.nll[:, 0], [6, 2])
  assert half.net_keep == pytest.approx(0.5)
  np.testing.assert_allclose(scoring.mix(low, high, 0).nll, low.nll)
  np.testing.assert_allclose(scoring.mix(low, high, 1).spent, high.spent)


@pytest.mark.parametrize("asked", [0.3, 0.6, 0.8])
def test_points_are_matched_in_net_keep(asked):
  low, high = simple([8, 4], 0.25), simple([4, 0], 0.75)
  found = scoring.at_cost(low, high, asked, lambda one: one.net_keep)
  assert found.net_keep == pytest.approx(asked)
  expected = 1.5 - (asked - 0.25) / 0.5
  assert found.mean_nll == pytest.approx(expected)
  # Where both spend the same, there is nothing to mix.
  assert scoring.at_cost(low, low, asked, lambda one: one.net_keep) is low


def test_differences_are_paired():
  """What windows have in common does not widen the interval."""
  generator = np.random.default_rng(0)
  base = generator.normal(size=60) * 20 + 100
  noise = generator.normal(size=60) * 0.4
  ours, other = simple(base + 4 + noise, 1), simple(base, 1)
  mean, low, high = scoring.paired_difference(ours, other)
  assert mean == pytest.approx(1 + noise.mean() / 4)
  assert low < mean < high and high - low < 0.1
  assert scoring.paired_difference(other, ours)[0] == pytest.approx(-mean)


def test_differences_are_those_of_the_paired_bootstrap():
  generator = np.random.default_rng(1)
  tokens = generator.integers(0, 9, (40, 2)).astype(float)
  tokens[3] = 0
  one, other = (
    Score(
      nll=generator.normal(size=(40, 2)) * (tokens > 0),
      spent=np.ones((40, 2, 3)),
      tokens=tokens,
    )
    for _ in range(2)
  )
  weights = tokens.sum(1)
  delta = (one.nll - other.nll).sum(1) / np.maximum(weights, 1)
  expected = intervals.paired_mean(delta, weights, seed=5)
  found = scoring.paired_difference(one, other, seed=5)
  np.testing.assert_allclose(found, tuple(expected), rtol=1e-9)


def test_windows_weigh_by_their_scored_tokens():
  tokens = np.array([[2.0], [0.0], [6.0]])
  make = lambda nll: Score(
    nll=np.array(nll)[:, None], spent=np.ones((3, 1, 3)), tokens=tokens
  )
  mean, _, _ = scoring.paired_difference(
    make([4.0, 0.0, 6.0]), make([2.0, 0.0, 6.0])
  )
  assert mean == pytest.approx(2 / 8)
