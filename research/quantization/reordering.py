"""Sort and cluster: channels of x that need like scales become neighbours.

Quamba2 (arXiv:2503.22879, section 4.2): heads of Mamba-2 whose channels look
alike are grouped, and in each such group channels of like size; each cluster
has a scale of its own. The weights are rearranged before anything runs, and the
function of the model stays. Shapes by axis letter: E inner channels, H heads, P
channels a head, G state groups.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.cluster import hierarchy

from models import language_model
from models.mamba_config import MambaConfig
from models.module import Params
from research.quantization import structure
from research.quantization.calibration import Notes


def clusters(
  absmax: np.ndarray, num_groups: int, head_groups: int, channel_groups: int
) -> tuple[np.ndarray, np.ndarray]:
  """Which cluster each head, and each channel, belongs to.

  Heads are clustered by their sorted profiles, of unit length (Ward 1963);
  then, within a cluster of heads, the ranks of channels are cut where the sum
  of squared distances of log-magnitudes to their mean is the least.

  Args:
    absmax: (H, P) largest magnitudes.
    num_groups: G, whose heads are clustered apart.
    head_groups: clusters of heads within each.
    channel_groups: clusters of channels within each of those.

  Returns:
    Clusters of heads (H,), numbered over all groups and rising with magnitude
    within one; and of ranks of channels (H, P), from the smallest.
  """
  heads, size = absmax.shape
  profiles = np.sort(absmax, axis=1)
  lengths = np.linalg.norm(profiles, axis=1, keepdims=True)
  unit = profiles / np.maximum(lengths, 1e-12)
  per = heads // num_groups
  of_head = np.zeros(heads, int)
  of_rank = np.zeros((heads, size), int)
  for group in range(num_groups):
    rows = np.arange(group * per, (group + 1) * per)
    labels = _cluster_heads(unit[rows], profiles[rows], head_groups)
    of_head[rows] = labels + group * head_groups
    for label in np.unique(labels):
      own = rows[labels == label]
      mean = np.log(np.maximum(profiles[own], 1e-12)).mean(axis=0)
      of_rank[own] = _cut(mean, channel_groups)
  return of_head, of_rank


def _cluster_heads(unit, profiles, count: int) -> np.ndarray:
  """Labels from 0, rising with the mean magnitude."""
  if len(unit) <= count:
    labels = np.arange(len(unit))
  else:
    tree = hierarchy.ward(unit)
    labels = hierarchy.fcluster(tree, count, "maxclust") - 1
  means = [profiles[labels == one].mean() for one in np.unique(labels)]
  ranks = np.argsort(np.argsort(means))
  return ranks[np.searchsorted(np.unique(labels), labels)]


def _cut(values: np.ndarray, count: int) -> np.ndarray:
  """Cuts rising values (P,) into runs of least squared error; labels (P,)."""
  size, count = len(values), min(count, len(values))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  squares = np.concatenate([[0.0], np.cumsum(values**2)])

  def cost(first, last):
    n = last - first
    mean = (sums[last] - sums[first]) / n
    return squares[last] - squares[first] - n * mean**2

  best = np.full((count + 1, size + 1), np.inf)
  came = np.zeros((count + 1, size + 1), int)
  best[0, 0] = 0.0
  for k in range(1, count + 1):
    for last in range(k, size + 1):
      firsts = np.arange(k - 1, last)
      totals = best[k - 1, firsts] + cost(firsts, last)
      came[k, last] = firsts[totals.argmin()]
      best[k, last] = totals.min()
  labels, last = np.zeros(size, int), size
  for k in range(count, 0, -1):
    labels[came[k, last] : last] = k - 1
    last = came[k, last]
  return labels


def cluster_scales(
  absmax: np.ndarray, of_head: np.ndarray, of_rank: np.ndarray
) -> np.ndarray:
  """The largest magnitude of each channel's cluster, (H, P)."""
  ranks = np.argsort(np.argsort(absmax, axis=1, kind="stable"), axis=1)
  of_channel = np.take_along_axis(of_rank, ranks, axis=1)
  keys = of_head[:, None] * (of_rank.max() + 1) + of_channel
  largest = np.zeros(keys.max() + 1)
  np.maximum.at(largest, keys, absmax)
  return largest[keys]


def reorder(
  config: language_model.Config,
  params: Params,
  notes: list[Notes],
  place: str,
  head_groups: int,
  channel_groups: int,
) -> Params:
  """Rearranges heads and channels of Mamba-2 so that clusters are neighbours.

  Args:
    config: of the model; others than Mamba-2 come back as they are.
    params: of the model, kernels as arrays.
    notes: of each layer, from `calibrate`.
    place: name of the notes of x.
    head_groups: clusters of heads within a state group.
    channel_groups: clusters of channels within each of those.
  """

  def change(number, own):
    # Mamba-2 alone has a norm within its mixer, behind the scan.
    if not structure.has(own, ("mixer", "norm")):
      return own
    absmax = np.asarray(notes[number][place].absmax)
    absmax = absmax.reshape(config.num_heads, config.head_dim)
    of_head, _ = clusters(
      absmax, config.num_groups, head_groups, channel_groups
    )
    heads = np.argsort(of_head, kind="stable")
    ranks = np.argsort(absmax, axis=1, kind="stable")[heads]
    channels = (heads[:, None] * config.head_dim + ranks).reshape(-1)
    return rearranged(config, own, heads, channels)

  return structure.each_layer(config, params, change)


def rearranged(
  config: MambaConfig,
  layer: dict[str, Any],
  heads: np.ndarray,
  channels: np.ndarray,
) -> dict[str, Any]:
  """One layer of Mamba-2 with its heads and channels in another order.

  Args:
    config: of the model.
    layer: its parameters.
    heads: (H,) old places, each within its state group.
    channels: (E,) old places, those of a head together.
  """
  inner, states = config.d_inner, config.num_groups * config.d_state
  rest = np.arange(2 * states)
  columns = np.concatenate(
    [channels, inner + channels, 2 * inner + rest,
     2 * inner + len(rest) + heads]
  )  # fmt: skip
  convolved = np.concatenate([channels, inner + rest])
  take = lambda order, axis: functools.partial(
    jnp.take, indices=jnp.asarray(order), axis=axis
  )
  for path, change in {
    ("in_proj", "kernel"): take(columns, -1),
    ("conv", "weight"): take(convolved, 0),
    ("conv", "bias"): take(convolved, 0),
    ("dt_bias",): take(heads, 0),
    ("A_log",): take(heads, 0),
    ("D",): take(heads, 0),
    ("norm", "scale"): take(channels, 0),
    ("out_proj", "kernel"): take(channels, -2),
  }.items():
    layer = structure.update(layer, ("mixer", *path), change)
  return layer
