import numpy as np
import pytest

from research.regression_lm.density import task as density_task


def test_texts_are_those_of_the_release():
  text = density_task.text_of("spiral", -1.0, 0.5, 3)
  assert text == "spiral X: -1.00 Y: +0.50 E: 3"
  assert density_task.text_of("zigzag", 4.999, -2.0, 1).split()[2] == "+5.00"


@pytest.mark.parametrize("shape", density_task.SHAPES)
def test_points_lie_on_their_figure(shape):
  rng = np.random.default_rng(0)
  found = density_task.points(shape, 2.0, -1.0, 3, 4000, rng)
  dx, dy = (found - [2.0, -1.0]).T
  dx = 3 * dx  # Squeezed along x; the noise is not, so it is tripled here.
  noise = 5 * 0.05 / 1.96
  if shape == "spiral":
    assert np.hypot(dx, dy).max() < 0.3 + 3 * noise
  elif shape == "hollow_square":
    edge = np.maximum(np.abs(dx), np.abs(dy))
    assert np.abs(np.median(edge) - 0.3) < 0.05
  elif shape == "zigzag":
    assert np.abs(dy).max() < 0.15 + noise
  else:
    # Two half circles of radius .3, one shifted by half of it.
    upper = np.abs(np.hypot(dx, dy) - 0.3)
    lower = np.abs(np.hypot(dx - 0.15, dy - 0.03) - 0.3)
    assert np.minimum(upper, lower).max() < 3 * noise
  assert np.abs(found.mean(0) - [2.0, -1.0]).max() < 0.2


def test_steps_are_pure_and_differ():
  names, clouds = density_task.drawn_at(3, 4, 0)
  again = density_task.drawn_at(3, 4, 0)
  assert names == again[0] and clouds.shape == (4, 16, 2)
  np.testing.assert_array_equal(clouds, again[1])
  assert density_task.drawn_at(4, 4, 0)[0] != names
  assert density_task.drawn_at(3, 4, 1)[0] != names
  examples = density_task.examples_at(3, 4, 0)
  assert len(examples) == 64 and examples[16].x == names[1]
  assert examples[16].y == tuple(clouds[1, 0])


def test_energy_distance_is_that_of_shifted_normals():
  generator = np.random.default_rng(1)
  same = [generator.normal(size=(600, 2)) for _ in range(2)]
  assert abs(density_task.energy_distance(*same)) < 0.02
  far = density_task.energy_distance(same[0], same[1] + [100.0, 0.0])
  # Far apart: 2 * 100 less twice the mean distance of a pair, sqrt(pi).
  assert far == pytest.approx(200 - 2 * np.sqrt(np.pi), rel=0.01)
