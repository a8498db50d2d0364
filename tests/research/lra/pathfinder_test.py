"""Pathfinder's images: dots, contours that are apart, labels."""

import jax
import numpy as np
import pytest
from scipy import ndimage, stats

from research.lra import pathfinder

SHAPE = pathfinder.Shape(distractors=2, dashes=5)


@pytest.fixture(scope="module")
def drawn():
  return pathfinder.generate(200, 3, SHAPE, batch=100)


def test_two_white_dots_and_as_many_of_each_label(drawn):
  pixels, labels = drawn
  assert pixels.shape == (200, 1024) and pixels.dtype == np.uint8
  assert 70 < labels.sum() < 130
  for image in pixels.reshape(-1, 32, 32):
    # Dashes are not as bright; dots may touch each other.
    spots, count = ndimage.label(image > 240, np.ones((3, 3)))
    sizes = np.bincount(spots.ravel())[1:]
    assert count in (1, 2) and sizes.min() >= 2, sizes
    assert (image > 0).mean() < 0.4


def test_the_distance_of_the_dots_does_not_tell_the_label(drawn):
  pixels, labels = drawn
  distances = {0: [], 1: []}
  for image, label in zip(pixels.reshape(-1, 32, 32), labels):
    spots, count = ndimage.label(image > 240, np.ones((3, 3)))
    if count == 2:
      one, other = ndimage.center_of_mass(image > 240, spots, [1, 2])
      distances[int(label)].append(np.hypot(*np.subtract(one, other)))
  found = stats.ks_2samp(distances[0], distances[1])
  assert found.pvalue > 0.01, found


def test_dots_are_joined_where_the_label_says_so(drawn):
  pixels, labels = drawn
  told = []
  for image, label in zip(pixels.reshape(-1, 32, 32), labels):
    spots, count = ndimage.label(image > 240, np.ones((3, 3)))
    if count == 1:
      continue
    # Gaps between dashes close, and most of those between contours do not.
    grown = ndimage.grey_dilation(image, footprint=np.ones((2, 2))) > 100
    parts, _ = ndimage.label(grown, np.ones((3, 3)))
    first, second = (parts[spots == dot].max() for dot in (1, 2))
    told.append((first == second) == bool(label))
  assert len(told) > 150 and np.mean(told) > 0.75


def test_dashes_lie_along_their_contour(drawn):
  """Each turns by half of what its contour turns there; the last by nothing."""
  del drawn  # Draws that others take compile the same program.
  begun, ok = pathfinder._begun(SHAPE, 100, jax.random.key(0))
  count = SHAPE.dashes
  places = np.asarray(begun.places)[ok].reshape(-1, 2, count, 2)
  angles = np.asarray(begun.angles)[ok].reshape(-1, 2, count)
  steps = np.diff(places, axis=2) @ np.array([1, 1j])
  ways = steps / np.abs(steps)
  wanted = np.concatenate([ways[..., :-1] + ways[..., 1:], ways[..., -1:]], -1)
  off = np.angle(np.exp(1j * angles[..., 1:]) / wanted)
  assert len(off) > 5
  np.testing.assert_allclose(off, 0, atol=1e-4)


def test_the_same_seed_draws_the_same(drawn):
  again = pathfinder.generate(200, 3, SHAPE, batch=100)
  assert all((one == other).all() for one, other in zip(drawn, again))
  other, _ = pathfinder.generate(100, 4, SHAPE, batch=100)
  assert (other != drawn[0][:100]).any()


def test_levels_have_the_benchmarks_dashes():
  dashes = [pathfinder.Shape.level(n).dashes for n in pathfinder.LEVELS]
  assert dashes == [6, 9, 14]
