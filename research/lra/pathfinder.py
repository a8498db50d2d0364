"""Pathfinder: do dashes lead from one dot to the other?

Two winding contours of dashes, shorter ones that distract, and a dot at two
ends: of one contour, or of both (Linsley et al. 2018; the benchmark's images
are of their generator). These images are drawn by a generator of our own, many
at once on the device: contours grow dash by dash, each turning a little, and
keep away from all others.

Shapes by axis letter: A attempts, C turns that are tried, P places of dashes,
S side of the image in pixels.
"""

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

# Dashes of a contour, and how much they turn: straighter ones of 14 dashes
# hardly ever fit into an image twice. The benchmark takes 14.
LEVELS = {"easy": (6, 0.6), "medium": (9, 0.7), "hard": (14, 0.9)}
_ATTEMPTS, _FEW_ATTEMPTS, _TURNS = 6, 4, 8
# Images that are finished at a time.
_FINISHED = 1000
_FAR = 1e3
# Pixels that distances of dots of both labels may differ by.
_ALIKE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """How images look; lengths in pixels.

  Attributes:
    side: S.
    dashes: of a contour.
    distractors: shorter contours, of a third of the dashes.
    step: from the middle of a dash to that of the next.
    dash: length of one.
    radius: of a dot.
    turn: most radians between a dash and the next.
    clearance: least distance of middles of dashes that are not neighbours.
    brightness: of dashes; dots are white.
  """

  side: int = 32
  dashes: int = LEVELS["easy"][0]
  distractors: int = 4
  step: float = 3.0
  dash: float = 2.0
  radius: float = 1.5
  turn: float = LEVELS["easy"][1]
  clearance: float = 2.6
  brightness: float = 0.9

  @classmethod
  def level(cls, name: str) -> Self:
    """The shape of a key of `LEVELS`."""
    dashes, turn = LEVELS[name]
    return cls(dashes=dashes, turn=turn)


def generate(
  count: int, seed: int, shape: Shape = Shape(), batch: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
  """Draws images, half of whose dots are joined, but for chance.

  Args:
    count: N.
    seed: of the draw.
    shape: of the images.
    batch: drawn at a time.

  Returns:
    Pixels (N, S * S) uint8, and labels (N,) uint8: 1 where dots are joined.
  """
  found, left, number, ready = [], count, 0, None
  while left > 0:
    key = jax.random.fold_in(jax.random.key(seed), number)
    number += 1
    drawn, kept = jax.device_get(_begun(shape, batch, key))
    drawn = jax.tree.map(lambda x, kept=kept: x[kept], drawn)
    if ready is not None:
      drawn = jax.tree.map(lambda *x: np.concatenate(x), ready, drawn)
    ready = drawn
    # Few are kept, so that distractors and pixels wait for a batch of them.
    enough = min(left, _FINISHED)
    while left > 0 and len(ready.joined) >= enough:
      first = np.minimum(np.arange(_FINISHED), len(ready.joined) - 1)
      part = jax.tree.map(lambda x, first=first: x[first], ready)
      pixels = jax.device_get(_finished(shape, part))[:enough]
      found.append((pixels, part.joined[:enough].astype(np.uint8)))
      ready = jax.tree.map(lambda x, n=enough: x[n:], ready)
      left -= enough
      enough = min(left, _FINISHED)
  return tuple(np.concatenate(parts) for parts in zip(*found))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Begun:
  """Two contours of an image.

  Attributes:
    places: (P, 2) middles of dashes.
    angles: (P,) of dashes.
    dots: (2, 2).
    joined: whether the dots are of one contour.
    seed: of what distracts.
  """

  places: jax.Array
  angles: jax.Array
  dots: jax.Array
  joined: jax.Array
  seed: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begun(shape: Shape, batch: int, key: jax.Array):
  """Contours of some images, and which of them do."""
  return jax.vmap(functools.partial(_two, shape))(jax.random.split(key, batch))


def _two(shape: Shape, key: jax.Array) -> tuple[_Begun, jax.Array]:
  keys = jax.random.split(key, 4)
  grow = functools.partial(_contour, shape, shape.dashes, attempts=_ATTEMPTS)
  first, first_angles, done = grow(jnp.zeros((0, 2)), keys[0])
  second, second_angles, ok = grow(first, keys[1])
  joined = jax.random.bernoulli(keys[2])
  dots, alike = _dots(first, second, joined)
  begun = _Begun(
    places=jnp.concatenate([first, second]),
    angles=jnp.concatenate([first_angles, second_angles]),
    dots=dots,
    joined=joined,
    seed=jax.random.bits(keys[3]),
  )
  return begun, done & ok & alike


def _dots(first, second, joined):
  """Two dots, and whether those of both labels are as far apart.

  Ends of a contour are nearer to each other than most ends of two: the distance
  alone would tell the label of nine in ten images of six dashes.
  """
  ends = jnp.stack([first[0], first[-1], second[0], second[-1]])
  length = lambda d: jnp.sqrt(jnp.square(d).sum(-1))
  own = jnp.stack([ends[:2], ends[2:]])
  pairs = jnp.stack([ends[jnp.array([a, b])] for a in (0, 1) for b in (2, 3)])
  span = lambda dots: length(dots[:, 0] - dots[:, 1])
  off = jnp.abs(span(own)[:, None] - span(pairs)[None])
  best = jnp.argmin(off)
  dots = jnp.where(joined, own[best // 4], pairs[best % 4])
  return dots, off.min() < _ALIKE


@functools.partial(jax.jit, static_argnums=0)
def _finished(shape: Shape, begun: _Begun) -> jax.Array:
  """Pixels (B, S * S) uint8 of B images."""
  return jax.vmap(functools.partial(_image, shape))(begun)


def _image(shape: Shape, begun: _Begun) -> jax.Array:
  small = max(shape.dashes // 3, 2)
  more = small * shape.distractors
  # A dash that is not drawn lies far away.
  places = jnp.concatenate([begun.places, jnp.full((more, 2), _FAR)])
  angles = jnp.concatenate([begun.angles, jnp.zeros(more)])

  def distract(state, own):
    places, angles, at = state
    middles, turned, ok = _contour(shape, small, places, own, _FEW_ATTEMPTS)
    middles = jnp.where(ok, middles, _FAR)
    places = jax.lax.dynamic_update_slice(places, middles, (at, 0))
    angles = jax.lax.dynamic_update_slice(angles, turned, (at,))
    return (places, angles, at + small), None

  (places, angles, _), _ = jax.lax.scan(
    distract,
    (places, angles, jnp.int32(2 * shape.dashes)),
    jax.random.split(jax.random.key(begun.seed), shape.distractors),
  )
  return _drawn(shape, places, angles, begun.dots)


def _contour(
  shape: Shape,
  dashes: int,
  places: jax.Array,
  key: jax.Array,
  attempts: int,
):
  """The first of some attempts to grow a contour that comes to its end."""
  grow = functools.partial(_grow, shape, dashes, places)
  middles, angles, ok = jax.vmap(grow)(jax.random.split(key, attempts))
  first = jnp.argmax(ok)
  return middles[first], angles[first], ok[first]


def _grow(shape: Shape, dashes: int, places: jax.Array, key: jax.Array):
  place_key, angle_key, turn_key = jax.random.split(key, 3)
  edge = shape.radius + 0.5
  inside = lambda p: ((p >= edge) & (p <= shape.side - 1 - edge)).all(-1)
  clear = lambda p, others: (
    jnp.square(p[..., None, :] - others[None]).sum(-1) >= shape.clearance**2
  ).all(-1)
  start = jax.random.uniform(
    place_key, (1, 2), minval=edge, maxval=shape.side - 1 - edge
  )
  ok = clear(start, places)[0]
  angle = jax.random.uniform(angle_key, maxval=2 * math.pi)
  turns = jax.random.uniform(
    turn_key, (dashes, _TURNS), minval=-shape.turn, maxval=shape.turn
  )
  own = jnp.full((dashes, 2), _FAR).at[0].set(start[0])

  def step(state, inputs):
    own, place, angle, ok = state
    number, turn = inputs
    tried = angle + turn
    direction = jnp.stack([jnp.cos(tried), jnp.sin(tried)], -1)
    # A dash's neighbour may be as near as a step.
    there = place[None] + shape.step * direction
    before = jnp.where(jnp.arange(dashes)[:, None] < number - 1, own, _FAR)
    good = inside(there) & clear(there, places) & clear(there, before)
    best = jnp.argmax(good)
    own = own.at[number].set(there[best])
    state = (own, there[best], tried[best], ok & good[best])
    return state, angle

  (own, _, angle, ok), before = jax.lax.scan(
    step,
    (own, start[0], angle, ok),
    (jnp.arange(1, dashes), turns[1:]),
  )
  # A dash points to the middle between the ways to it and from it; the last one
  # has no way from it.
  leaving = jnp.concatenate([before[1:], angle[None]])
  ways = jnp.stack([jnp.cos(before), jnp.sin(before)])
  more = jnp.stack([jnp.cos(leaving), jnp.sin(leaving)])
  turned = jnp.arctan2(*(ways + more)[::-1])
  return own, jnp.concatenate([turned, angle[None]]), ok


def _drawn(shape: Shape, places, angles, dots) -> jax.Array:
  """Anti-aliased dashes of one pixel's width, and dots: (S * S,) uint8."""
  axis = jnp.arange(shape.side, dtype=jnp.float32)
  row, column = (a.reshape(-1, 1) for a in jnp.meshgrid(axis, axis))
  y, x = row - places[None, :, 0], column - places[None, :, 1]
  cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
  along, across = y * cos + x * sin, x * cos - y * sin
  beyond = jnp.maximum(jnp.abs(along) - (shape.dash - 1) / 2, 0)
  light = jnp.clip(1.0 - jnp.hypot(beyond, across), 0, 1).max(1)
  away = jnp.hypot(row - dots[None, :, 0], column - dots[None, :, 1])
  dot = jnp.clip(shape.radius + 0.5 - away, 0, 1).max(1)
  image = jnp.maximum(light * shape.brightness, dot)
  return jnp.round(255 * image).astype(jnp.uint8)
