"""AdamW and Muon: schedules, and what weight decay leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from research.core.options import SCHEDULES

Tree = Any
# Leaves by name: gains and shifts have no scale that decay should shrink, and
# the dynamics of a state-space layer are not weights of a product; costs of
# tokens have no gradient and stay as they are.
_UNDECAYED = ("scale", "bias", "A_log", "D", "dt_bias", "twiddle",
              "chunk_costs")  # fmt: skip


def decayed(params: Tree) -> Tree:
  """Whether weight decay applies to each array: pytree of booleans.

  It does to the matrices, the token table and the taps of convolutions, not to
  norms, biases, and `A_log`, `D`, `dt_bias` of state-space layers (as in their
  release, github.com/state-spaces/mamba), nor to the factors of butterflies,
  whose product would shrink by all of them. Names decide, not ranks: layers are
  stacked, so a gain has two axes here.
  """

  def applies(path, _) -> bool:
    names = [str(getattr(key, "key", key)) for key in path]
    return not any(
      name in _UNDECAYED or name.endswith(("_bias", "norm")) for name in names
    )

  return jax.tree_util.tree_map_with_path(applies, params)


def learning_rate(
  schedule: str,
  peak: float,
  num_steps: int,
  *,
  warmup_steps: int,
  final_share: float,
  decay_share: float,
) -> optax.Schedule:
  """Learning rate by the number of updates done.

  It rises linearly to `peak` within `warmup_steps` updates, the first of which
  is not lost at rate 0. Then "cosine" falls to `final_share * peak` at the end
  (Loshchilov and Hutter 2017, eq. 5); "wsd" holds it and falls linearly over
  the last `decay_share` of all updates (Hu et al. 2024, arXiv 2404.06395);
  "constant" holds it.

  Raises:
    ValueError: the schedule is unknown.
  """
  warmup = min(warmup_steps, num_steps)
  rising = optax.schedules.linear_schedule(
    peak / max(warmup, 1), peak, max(warmup - 1, 1)
  )
  left = max(num_steps - warmup, 1)
  if schedule == "cosine":
    parts = [optax.schedules.cosine_decay_schedule(peak, left, final_share)]
    ends = []
  elif schedule == "wsd":
    falling = min(max(round(decay_share * num_steps), 1), left)
    parts = [
      optax.schedules.constant_schedule(peak),
      optax.schedules.linear_schedule(peak, final_share * peak, falling),
    ]
    ends = [num_steps - falling]
  elif schedule == "constant":
    parts, ends = [optax.schedules.constant_schedule(peak)], []
  else:
    raise ValueError(f"schedule {schedule!r}: one of {SCHEDULES}")
  if warmup:
    parts, ends = [rising, *parts], [warmup, *ends]
  return optax.schedules.join_schedules(parts, ends)


def adamw(
  rate: optax.Schedule,
  *,
  beta1: float,
  beta2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019) behind a clipped global norm.

  Args:
    rate: of `learning_rate`.
    beta1: of the first moment.
    beta2: of the second.
    eps: added to the root of the second.
    weight_decay: times the rate, on the arrays that `decayed` names.
    clip_norm: the gradient's norm at most; 0 leaves it.
  """
  update = optax.adamw(
    rate,
    b1=beta1,
    b2=beta2,
    eps=eps,
    weight_decay=weight_decay,
    mask=decayed,
  )
  if not clip_norm:
    return update
  return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def muon(
  rate: optax.Schedule,
  *,
  adam_beta2: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024) on the layers' matrices, AdamW on the rest.

  Updates are scaled to AdamW's size (Liu et al. 2025, arXiv:2502.16982, eq. 4),
  so that one learning rate serves both. A matrix of a layer is a leaf "kernel"
  of (layers, in, out). Those of one shape are made orthogonal together: a dozen
  products for all of them, and not for each.

  Args:
    rate: of `learning_rate`.
    adam_beta2: of AdamW's second moment.
    weight_decay: times the rate, on the arrays that `decayed` names.
    clip_norm: the gradient's norm at most; 0 leaves it.
  """

  def dimensions(params):
    numbers = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: numbers if _is_matrix(path, leaf) else None, params
    )

  update = _together(
    contrib.muon(
      rate,
      weight_decay=weight_decay,
      weight_decay_mask=decayed,
      adam_b2=adam_beta2,
      muon_weight_dimension_numbers=dimensions,
      consistent_rms=0.2,
    )
  )
  if not clip_norm:
    return update
  return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def _is_matrix(path, leaf) -> bool:
  return path[-1].key == "kernel" and leaf.ndim == 3


def _together(
  update: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Shows `update` the matrices of one shape as one array."""

  def pack(tree):
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    alike = {}
    for path, leaf in leaves:
      if _is_matrix(path, leaf):
        alike.setdefault(_shape_name(leaf), []).append(leaf)
    rest = [None if _is_matrix(*item) else item[1] for item in leaves]
    matrices = {
      name: {"kernel": jnp.concatenate(found)} for name, found in alike.items()
    }
    return {"matrices": matrices, "rest": structure.unflatten(rest)}

  def unpack(packed, like):
    starts = dict.fromkeys(packed["matrices"], 0)
    rest = iter(jax.tree.leaves(packed["rest"]))

    def leaf_of(path, leaf):
      if not _is_matrix(path, leaf):
        return next(rest)
      name = _shape_name(leaf)
      start = starts[name]
      starts[name] = start + len(leaf)
      return packed["matrices"][name]["kernel"][start : start + len(leaf)]

    return jax.tree_util.tree_map_with_path(leaf_of, like)

  def step(gradients, state, params=None):
    packed = None if params is None else pack(params)
    found, state = update.update(pack(gradients), state, packed)
    return unpack(found, gradients), state

  return optax.GradientTransformation(
    lambda params: update.init(pack(params)), step
  )


def _shape_name(leaf: jax.Array) -> str:
  return "x".join(map(str, leaf.shape[1:]))
