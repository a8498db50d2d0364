"""Windows of text: random ones to train on, all of a text to evaluate on.

Axis letters: W windows, S' tokens of a window, E episodes of a window, T
steps. A window's episodes start at different tokens of it and share its
prefix.
"""

import dataclasses

import numpy as np

from models.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Where episodes lie in a window.

  Attributes:
    context: tokens before the first episode.
    horizon: T, tokens of an episode.
    episodes: E episodes of a window, one after the other.
  """

  context: int
  horizon: int
  episodes: int = 1

  @property
  def prefix(self) -> int:
    """Tokens whose dense state is needed: up to the last episode's start."""
    return self.context + (self.episodes - 1) * self.horizon

  @property
  def length(self) -> int:
    """Tokens of a window, the last target included."""
    return self.context + self.episodes * self.horizon + 1

  def starts(self) -> np.ndarray:
    """First token of each episode (E,) int32."""
    steps = np.arange(self.episodes, dtype=np.int32) * self.horizon
    return self.context + steps

  def check(self, page_size: int) -> None:
    """Raises InputError where the episodes do not start on page boundaries."""
    for name in ("context", "horizon"):
      if getattr(self, name) % page_size:
        raise InputError(
          f"{name}={getattr(self, name)} is no multiple of the page size "
          f"{page_size}: choose one that is"
        )


def random_windows(
  tokens: np.ndarray, layout: Layout, num: int, *, seed: int, step: int
) -> np.ndarray:
  """Windows (num, S') at random places, a pure function of seed and step.

  Raises:
    InputError: the text is shorter than a window.
  """
  room = _room(tokens, layout)
  generator = np.random.default_rng((seed, step))
  offsets = generator.integers(0, room + 1, size=num)
  return cut(tokens, offsets, layout.length)


def spread_windows(tokens: np.ndarray, layout: Layout, num: int) -> np.ndarray:
  """Windows (num, S') at even distances over the whole text.

  Raises:
    InputError: the text is shorter than a window.
  """
  room = _room(tokens, layout)
  offsets = np.linspace(0, room, num).astype(np.int64)
  return cut(tokens, offsets, layout.length)


def _room(tokens: np.ndarray, layout: Layout) -> int:
  """The last token at which a window can begin; raises InputError."""
  room = len(tokens) - layout.length
  if room < 0:
    raise InputError(
      f"the text has {len(tokens)} tokens, a window needs {layout.length}: "
      "take a longer text or a shorter context"
    )
  return room


def cut(tokens: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
  """`tokens[o:o + length]` for every offset: (n, length) int32."""
  index = np.asarray(offsets)[:, None] + np.arange(length)[None]
  return tokens[index].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Cover:
  """Windows that score every token of a text once.

  Attributes:
    tokens: (W, S') int32.
    starts: (W, E) int32.
    weights: (W, E, T) float32, 1 where the token predicted at that step is
      scored here and 0 where another window scores it.
  """

  tokens: np.ndarray
  starts: np.ndarray
  weights: np.ndarray

  def take(self, rows: np.ndarray) -> "Cover":
    """The cover of some windows only."""
    return Cover(self.tokens[rows], self.starts[rows], self.weights[rows])

  @property
  def num_windows(self) -> int:
    """W."""
    return len(self.tokens)

  @property
  def mean_context(self) -> float:
    """Tokens that a scored token's decode step sees, itself included."""
    steps = np.arange(1, self.weights.shape[2] + 1)
    seen = self.starts[..., None] + steps
    return float((seen * self.weights).sum() / self.weights.sum())


def whole(windows: np.ndarray, layout: Layout) -> Cover:
  """All episodes of given windows (W, S'), every token scored."""
  starts = np.tile(layout.starts(), (len(windows), 1))
  weights = np.ones((*starts.shape, layout.horizon), np.float32)
  return Cover(windows, starts, weights)


def unbroken(text: Cover, layout: Layout) -> tuple[Cover, np.ndarray]:
  """Windows whose E episodes follow each other, as one of E T steps each.

  Returns:
    The cover, and the rows of `text` that it holds: not those at the head of
    the text, whose episodes start early.
  """
  (rows,) = np.nonzero((text.starts == layout.starts()).all(axis=1))
  kept = text.take(rows)
  weights = kept.weights.reshape(len(rows), 1, -1)
  return Cover(kept.tokens, kept.starts[:, :1], weights), rows


def cover(tokens: np.ndarray, layout: Layout) -> Cover:
  """Cuts a whole text into windows whose episodes score each token once.

  Every episode sees at least `context` tokens, but for those at the beginning
  of the text, which see what there is; the first T + 1 tokens are context
  alone. The last window is moved back so that it ends with the text.

  Raises:
    InputError: the text is shorter than a window.
  """
  room = len(tokens) - layout.length
  if room < 0:
    raise InputError(
      f"the text has {len(tokens)} tokens, a window needs {layout.length}: "
      "take a longer text or a shorter context"
    )
  span = layout.episodes * layout.horizon
  offsets = list(range(0, room + 1, span))
  if offsets[-1] < room:
    offsets.append(room)
  starts = [layout.starts()] * len(offsets)
  # The head of the text: the first window once more, with early starts.
  # An episode looks two tokens back.
  first = max(layout.horizon, 2)
  early = np.arange(first, layout.context, layout.horizon)
  while early.size:
    part, early = early[: layout.episodes], early[layout.episodes :]
    fill = layout.episodes - part.size
    starts.insert(0, np.concatenate([part, np.repeat(part[-1:], fill)]))
    offsets.insert(0, 0)

  starts = np.stack(starts).astype(np.int32)
  scored = np.zeros(len(tokens), bool)
  steps = np.arange(1, layout.horizon + 1)
  weights = np.zeros((*starts.shape, layout.horizon), np.float32)
  for row, offset in enumerate(offsets):
    for episode, start in enumerate(starts[row]):
      at = offset + start + steps
      weights[row, episode] = ~scored[at]
      scored[at] = True
  return Cover(cut(tokens, np.array(offsets), layout.length), starts, weights)
