"""Group-relative policy optimisation: advantages and the clipped loss.

Axis letters: B sequences, K rollouts of a sequence (the group), T steps, A
actions. Sources: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783: centring
without scaling), RLOO (arXiv 2402.14740), DAPO (arXiv 2503.14476: a wider upper
clip), GDPO (arXiv 2601.05242: rewards normalised one by one), dual clip (arXiv
1912.09729), and SOL (arXiv 2605.10875: the group baseline at each step).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Beyond exp(20) a ratio says nothing more, and its square overflows soon.
_MAX_LOG_RATIO = 20.0
_EPSILON = 1e-6

LEVELS = ("process", "outcome")
NORMALISERS = ("none", "center", "zscore", "leave_one_out")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss as sum and count, so that accumulating over batches is exact.

  Add sums, denominators and the gradients of `sum`, then divide once.

  Attributes:
    sum: scalar, summed over effective steps.
    denominator: scalar, how many effective steps there are.
  """

  sum: jax.Array
  denominator: jax.Array

  def mean(self) -> jax.Array:
    """Returns the loss of an effective step; 0 when there is none."""
    return self.sum / jnp.maximum(self.denominator, 1)


def advantages(
  returns: jax.Array,
  *,
  level: str = "process",
  normalise: str = "center",
  whiten: bool = True,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Compares returns within the group of one sequence.

    center:        A = R - mean_K(R)
    zscore:        A = (R - mean_K(R)) / (std_K(R) + 1e-6), K - 1 in the std
    leave_one_out: A = R - mean of the other rollouts
    whiten:        A <- (A - mean(A)) / (std(A) + 1e-6) over B, K and T

  Args:
    returns: Returns to go, (B, K, T), float.
    level: "process" compares at each step; "outcome" compares the returns of
      step 0 and gives each step of a rollout the same advantage.
    normalise: "none", "center", "zscore" or "leave_one_out".
    whiten: Whiten over the whole batch afterwards (published).
    mask: (B, K, T), 1 for effective steps; None for all.

  Returns:
    (B, K, T); 0 at masked steps. It carries no gradient.

  Raises:
    ValueError: `level` or `normalise` is unknown.
  """
  mask = _as_mask(mask, returns)
  relative = _within_group(returns, level, normalise, mask)
  return _whiten(relative, mask) if whiten else relative


def live_groups(
  returns: jax.Array,
  actions: jax.Array,
  *,
  level: str = "process",
  drop: bool = True,
  share: float = 1.0,
) -> jax.Array:
  """Which groups say something of what is better, as a mask.

  A group is dead where its rollouts took the same action, or were all rewarded
  alike: it has no gradient, and counts in the loss' denominator and in the
  whitening nevertheless (TRL's issue 6367). Of the sequences, those whose
  returns vary the most within the group may be taken alone (TRL 7242, verl
  7894).

    dead(b, t) = max_K R = min_K R, or all a(b, k, t) are equal
    V(b) = mean_T(var_K(R)); sequence b counts if V(b) is in the highest share

  Args:
    returns: (B, K, T), returns to go.
    actions: (B, K, T) int.
    level: "process" has a group at every step; "outcome" has one of step 0's
      returns, dead where no step's actions differ.
    drop: Leave dead groups out.
    share: Of the sequences that count, in (0, 1]; one at least.

  Returns:
    (B, K, T) bool, the same for the K rollouts.
  """
  returns = jax.lax.stop_gradient(returns)
  differ = jnp.any(actions != actions[:, :1], axis=1)
  if level == "outcome":
    returns = jnp.broadcast_to(returns[..., :1], returns.shape)
    differ = jnp.broadcast_to(
      jnp.any(differ, axis=-1, keepdims=True), differ.shape
    )
  spread = jnp.max(returns, axis=1) - jnp.min(returns, axis=1)
  live = differ & (spread > 0) if drop else jnp.ones(differ.shape, bool)
  if share < 1:
    varies = jnp.mean(jnp.var(returns, axis=1), axis=-1)
    kept = max(math.ceil(share * len(varies)), 1)
    live &= (varies >= jnp.sort(varies)[-kept])[:, None]
  return jnp.broadcast_to(live[:, None], returns.shape)


def gdpo_advantages(
  returns: jax.Array,
  weights: jax.Array,
  *,
  level: str = "process",
  normalise: str = "zscore",
  whiten: bool = True,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Normalises every reward within the group on its own, then adds them.

  So that a reward of a large scale does not drown the others (GDPO):

    A = whiten(sum_c weight_c * normalise(R_c))

  Args:
    returns: (C, B, K, T), one slice a reward.
    weights: (C,).
    level: As in `advantages`.
    normalise: As in `advantages`.
    whiten: Whiten the sum over the whole batch.
    mask: (B, K, T), 1 for effective steps; None for all.

  Returns:
    (B, K, T); 0 at masked steps. It carries no gradient.
  """
  mask = _as_mask(mask, returns[0])
  each = jax.vmap(lambda r: _within_group(r, level, normalise, mask))(returns)
  total = jnp.sum(each * weights[:, None, None, None], axis=0)
  return _whiten(total, mask) if whiten else total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """What the policy's loss is made of.

  Attributes:
    clip_low: How far the ratio may fall.
    clip_high: How far the ratio may rise.
    entropy_coef: Weight of the entropy bonus.
    kl_coef: Weight of the divergence from a reference.
    dual_clip: Bound of the loss of negative advantages, above 1, or None.
  """

  clip_low: float = 0.2
  clip_high: float = 0.2
  entropy_coef: float = 0.05
  kl_coef: float = 0.0
  dual_clip: float | None = None

  def __post_init__(self):
    """Checks the bound; raises ValueError."""
    if self.dual_clip is not None and self.dual_clip <= 1:
      raise ValueError(f"dual_clip={self.dual_clip} must be above 1")

  def clipped(
    self, ratio: jax.Array, gain: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The gain times the clipped ratio, and the lesser one of both gains.

    Args:
      ratio: (B, K, T).
      gain: (B, K, T) advantages.
    """
    clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * gain
    lesser = jnp.minimum(ratio * gain, clipped)
    if self.dual_clip is not None:
      bounded = jnp.maximum(lesser, self.dual_clip * gain)
      lesser = jnp.where(gain < 0, bounded, lesser)
    return clipped, lesser


def policy_loss(
  logits: jax.Array,
  actions: jax.Array,
  old_logp: jax.Array,
  advantages: jax.Array,
  objective: Objective,
  *,
  ref_logp: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> tuple[Loss, dict[str, jax.Array]]:
  """The clipped objective with entropy bonus and divergence to a reference.

    ratio = exp(log p(a) - old_logp)
    loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
           - entropy_coef * H(p) + kl_coef * k3,
    k3 = exp(d) - d - 1, d = ref_logp - log p(a)

  With `dual_clip` = c > 1 a negative advantage loses at most c * |A|.
  Log-ratios are clipped to +-20.

  Args:
    logits: (B, K, T, A), of the policy being trained; computed in float32.
    actions: (B, K, T) int, sampled by the old policy.
    old_logp: (B, K, T) log-probabilities of `actions` when they were sampled.
    advantages: (B, K, T).
    objective: Clips and weights.
    ref_logp: (B, K, T) log-probabilities of `actions` under a reference.
    mask: (B, K, T), 1 for effective steps; None for all.

  Returns:
    The loss, and scalar diagnostics over effective steps: the share of non-zero
    advantages, the ratio's extremes and mean, the share of steps where the clip
    stops the gradient, the entropy, `kl` from the old policy (k3) and
    `kl_reference` from the reference when there is one, and the extremes of
    log p(a).

  Raises:
    ValueError: `kl_coef` without `ref_logp`.
  """
  if objective.kl_coef and ref_logp is None:
    raise ValueError(f"kl_coef={objective.kl_coef} needs ref_logp")
  mask = _as_mask(mask, advantages)
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  log_probs = jax.nn.log_softmax(logits.astype(dtype))
  logp = jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]
  entropy = _entropy(log_probs)

  log_ratio = _log_ratio(logp, old_logp, mask)
  ratio = jnp.exp(log_ratio)
  gain = jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))
  clipped_gain, lesser_gain = objective.clipped(ratio, gain)
  per_step = -lesser_gain - objective.entropy_coef * entropy

  count = jnp.sum(mask, dtype=dtype)

  def mean(x):
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(count, 1)

  diagnostics = {
    "advantage_nonzero": mean((jnp.abs(gain) > _EPSILON).astype(dtype)),
    "ratio_min": jnp.min(ratio, initial=jnp.inf, where=mask),
    "ratio_max": jnp.max(ratio, initial=0.0, where=mask),
    "ratio_mean": mean(ratio),
    "clip_share": mean((clipped_gain < ratio * gain).astype(dtype)),
    "entropy": mean(entropy),
    "kl": mean(_k3(log_ratio)),
    "logp_min": jnp.min(logp, initial=jnp.inf, where=mask),
    "logp_max": jnp.max(logp, initial=-jnp.inf, where=mask),
  }
  if ref_logp is not None:
    divergence = _k3(_log_ratio(ref_logp, logp, mask))
    per_step = per_step + objective.kl_coef * divergence
    diagnostics["kl_reference"] = mean(divergence)
  loss = Loss(jnp.sum(jnp.where(mask, per_step, 0.0)), count)
  return loss, jax.lax.stop_gradient(diagnostics)


def _entropy(log_probs):
  # A forbidden action has p = 0 and log p = -inf; 0 * -inf must be 0.
  allowed = jnp.isfinite(log_probs)
  finite = jnp.where(allowed, log_probs, 0.0)
  plogp = jnp.where(allowed, jnp.exp(finite) * finite, 0.0)
  return -jnp.sum(plogp, axis=-1)


def _log_ratio(logp, other_logp, mask):
  # The mask is applied first, because a step that does not count may hold -inf
  # or NaN.
  difference = jnp.where(mask, logp, 0.0) - jnp.where(mask, other_logp, 0.0)
  return jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _k3(log_ratio):
  """Estimates E_p[log p / q] from samples of p, log_ratio = log q / p."""
  return jnp.exp(log_ratio) - log_ratio - 1


def _as_mask(mask, like):
  if mask is None:
    return jnp.ones(like.shape, bool)
  return jnp.broadcast_to(mask, like.shape).astype(bool)


def _within_group(returns, level, normalise, mask):
  if level not in LEVELS:
    raise ValueError(f"level={level!r} is none of {', '.join(LEVELS)}")
  if normalise not in NORMALISERS:
    raise ValueError(
      f"normalise={normalise!r} is none of {', '.join(NORMALISERS)}"
    )
  returns = jax.lax.stop_gradient(returns)
  compared = mask
  if level == "outcome":
    returns = jnp.broadcast_to(returns[..., :1], returns.shape)
    compared = jnp.broadcast_to(
      jnp.any(mask, axis=-1, keepdims=True), mask.shape
    )
  if normalise == "none":
    return jnp.where(mask, returns, 0.0)
  size = jnp.sum(compared, axis=1, keepdims=True, dtype=returns.dtype)
  # Taken from the best first, equal returns give exactly zero: rounding noise
  # of a group without variance must not be scaled up.
  best = jnp.max(
    returns, axis=1, keepdims=True, initial=-jnp.inf, where=compared
  )
  behind = jnp.where(compared, returns - best, 0.0)
  total = jnp.sum(behind, axis=1, keepdims=True)
  centred = jnp.where(compared, behind - total / jnp.maximum(size, 1), 0.0)
  if normalise == "leave_one_out":
    # R - (total - R) / (K - 1) = (R - mean) * K / (K - 1).
    centred = centred * size / jnp.maximum(size - 1, 1)
  if normalise == "zscore":
    squares = jnp.sum(jnp.square(centred), axis=1, keepdims=True)
    deviation = jnp.sqrt(squares / jnp.maximum(size - 1, 1))
    centred = centred / (deviation + _EPSILON)
  return jnp.where(mask, centred, 0.0)


def _whiten(values, mask):
  count = jnp.maximum(jnp.sum(mask, dtype=values.dtype), 1)
  centred = jnp.where(mask, values - jnp.sum(values) / count, 0.0)
  deviation = jnp.sqrt(jnp.sum(jnp.square(centred)) / count)
  return centred / (deviation + _EPSILON)
