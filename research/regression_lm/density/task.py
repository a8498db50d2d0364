"""Densities of two numbers given a text: the release's synthetic task.

"spiral X: -1.00 Y: +0.50 E: 1" stands for points on a noisy figure around
(X, Y), squeezed along x by E. A model that has learned it draws such points.
Constants are those of the demonstration in google-deepmind/regress-lm.
"""

from collections.abc import Callable

import numpy as np

from research.predictors.examples import Example

_NOISE = 0.05 / 1.96
# Points that are drawn for one text of a batch.
POINTS = 16
_ECCENTRICITIES = (1, 2, 3)


def _spiral(rng, n):
  angle = rng.uniform(0, 4 * np.pi, n)
  radius = 0.3 * angle / (4 * np.pi)
  return radius * np.cos(angle), radius * np.sin(angle)


def _hollow_square(rng, n):
  along, side = rng.uniform(-0.3, 0.3, n), rng.integers(0, 4, n)
  across = np.where(side % 2, -0.3, 0.3)
  horizontal = side < 2
  return np.where(horizontal, along, across), np.where(
    horizontal, across, along
  )


def _zigzag(rng, n):
  x = rng.uniform(-0.3, 0.3, n)
  phase = x / 0.15 - np.floor(x / 0.15 + 0.5)
  return x, 0.15 * (2 * np.abs(2 * phase) - 1)


def _half_moons(rng, n):
  upper, angle = rng.integers(0, 2, n).astype(bool), rng.uniform(0, np.pi, n)
  x, y = 0.3 * np.cos(angle), 0.3 * np.sin(angle)
  return np.where(upper, x, x + 0.15), np.where(upper, y, 0.03 - y)


SHAPES: dict[str, Callable] = {
  "spiral": _spiral,
  "hollow_square": _hollow_square,
  "zigzag": _zigzag,
  "half_moons": _half_moons,
}

# Shape, X, Y, E of the texts that a model is judged by.
JUDGED = (
  ("spiral", -1.0, 0.5, 1),
  ("hollow_square", 1.0, 0.5, 1),
  ("zigzag", -1.0, -0.5, 1),
  ("half_moons", 1.0, -0.5, 1),
  ("spiral", -2.0, 0.5, 3),
  ("hollow_square", 2.0, 0.5, 3),
  ("zigzag", -2.0, -0.5, 3),
  ("half_moons", 2.0, -0.5, 3),
)


def text_of(shape: str, x: float, y: float, eccentricity: int) -> str:
  """The text of a density."""
  return f"{shape} X: {x:+05.2f} Y: {y:+05.2f} E: {eccentricity}"


def points(
  shape: str,
  x: float,
  y: float,
  eccentricity: int,
  count: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Draws of the true density, (count, 2)."""
  dx, dy = SHAPES[shape](rng, count)
  offset = np.stack([dx / eccentricity, dy], axis=-1)
  noise = rng.normal(0, _NOISE, offset.shape)
  return np.array([x, y]) + offset + noise


def drawn_at(step: int, texts: int, seed: int) -> tuple[list[str], np.ndarray]:
  """Texts of a step, and `POINTS` points of each: (texts, POINTS, 2)."""
  rng = np.random.default_rng((seed, 23, step))
  names, clouds = [], []
  for _ in range(texts):
    place = (
      str(rng.choice(list(SHAPES))),
      round(float(rng.uniform(-5, 5)), 2),
      round(float(rng.uniform(-3, 3)), 2),
      int(rng.choice(_ECCENTRICITIES)),
    )
    names.append(text_of(*place))
    clouds.append(points(*place, POINTS, rng))
  return names, np.stack(clouds)


def examples_at(step: int, texts: int, seed: int) -> list[Example]:
  """What `drawn_at` draws, an example a point."""
  names, clouds = drawn_at(step, texts, seed)
  return [
    Example(x=name, y=tuple(point))
    for name, cloud in zip(names, clouds.tolist())
    for point in cloud
  ]


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
  """2 E|A - B| - E|A - A'| - E|B - B'| of points (n, 2) and (m, 2).

  It is 0 for equal distributions alone (Székely and Rizzo 2013); means over
  pairs of different points, so that it may fall below 0 by chance.
  """

  def mean_distance(u, v, same):
    total = sum(np.linalg.norm(u[i] - v, axis=-1).sum() for i in range(len(u)))
    return total / (len(u) * (len(v) - same))

  return float(
    2 * mean_distance(a, b, 0) - mean_distance(a, a, 1) - mean_distance(b, b, 1)
  )
