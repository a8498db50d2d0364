"""GRPO on the compute policy: one update from fresh counterfactual rollouts.

Axis letters: W windows, E episodes of a window, K rollouts of an episode (the
group), R = E K rollouts of a window, T steps, A actions, G numbers in a goal.

Source: SOL (arXiv 2605.10875) for reward and per-step group baseline, GRPO
(arXiv 2402.03300) for the clipped objective. Two kinds of budget:
"targets" (published): mean targets per axis, a two-sided dead-zone penalty on
the episode's means. "price": every action costs `price * cost(a)` nats at its
step; the price is drawn per episode, the policy sees it, and the price that
spends an asked budget is read off training text afterwards
(`research/sol/calibrate.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import transformer
from research.core import state as state_lib
from research.core.state import TrainState
from research.sol import credit, grpo, random_schedules
from research.sol import damage as damage_lib
from research.sol import policy as policy_lib
from research.sol import prefix as prefix_lib
from research.sol import reward as reward_lib
from research.sol import rollout as rollout_lib
from research.sol.policy import InputStats, PolicyConfig
from research.sol.prefix import Prefix
from research.sol.rollout import Rollout, Setup
from research.sol.windows import Layout

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """Everything static about a training run.

  Attributes:
    setup: LLM, actions, horizon.
    policy: shape of the policy.
    layout: windows and their episodes.
    group_size: K.
    reward: of a step: "label", the true token's log-likelihood (published), or
      "divergence", minus that of the dense model's prediction from this one.
    budget: "price" or "targets".
    gamma: discount of the reward to go.
    level: "process" (a group baseline at each step) or "outcome".
    normalise: "center" or "zscore" within the group.
    drop_dead: groups without a difference count nowhere, see
      `grpo.live_groups`.
    variance_share: share of the episodes that count, those whose returns vary
      the most.
    whiten: whiten the advantages over the whole batch.
    credit: "return" (published) or "residual": from later rewards, the part
      that later actions explain within the group is taken out.
    clip_low: the ratio is clipped below 1 - clip_low,
    clip_high: and above 1 + clip_high.
    entropy_coef: weight of the entropy bonus.
    kl_coef: weight of the k3 divergence from the reference policy.
    inner_epochs: optimizer steps on each batch of rollouts.
    target_low: lower ends of the targets (kappa, rho, bits / 16); the upper
      ends are 1.
    penalty_weights: alpha of each axis.
    tolerance: half width of the dead zone.
  """

  setup: Setup
  policy: PolicyConfig
  layout: Layout
  group_size: int
  reward: str = "label"
  budget: str = "price"
  gamma: float = 0.85
  level: str = "process"
  normalise: str = "center"
  drop_dead: bool = False
  variance_share: float = 1.0
  whiten: bool = True
  credit: str = "return"
  clip_low: float = 0.2
  clip_high: float = 0.2
  entropy_coef: float = 0.0
  kl_coef: float = 0.0
  inner_epochs: int = 2
  target_low: tuple[float, float, float] = (0.1, 0.4, 5 / 16)
  penalty_weights: tuple[float, float, float] = (100.0, 100.0, 200.0)
  tolerance: float = 0.02

  @property
  def objective(self) -> grpo.Objective:
    """What the policy's loss is made of."""
    return grpo.Objective(
      clip_low=self.clip_low,
      clip_high=self.clip_high,
      entropy_coef=self.entropy_coef,
      kl_coef=self.kl_coef,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
  """Arrays that updates read and do not change.

  Attributes:
    lm: parameters of the frozen LLM.
    log_price: (2,) range of the prices that are drawn.
    stats: of the policy's inputs, and the damage of actions.
    reference: policy parameters that `kl_coef` keeps the policy near, or None.
    prefixes: of all windows that updates take, or None to compute them.
  """

  lm: transformer.Params
  log_price: jax.Array
  stats: InputStats
  reference: Tree = None
  prefixes: Prefix | None = None


def optimizer(
  learning_rate: float,
  num_steps: int,
  *,
  clip_norm: float,
  schedule: str,
  weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
  """AdamW behind a clipped global norm.

  Args:
    learning_rate: peak.
    num_steps: optimizer steps of the whole run.
    clip_norm: of the gradient.
    schedule: "constant" (published) or "cosine" (2% warm-up, decay to 10%).
    weight_decay: of AdamW.
  """
  if schedule == "cosine":
    rate = optax.warmup_cosine_decay_schedule(
      0.1 * learning_rate,
      learning_rate,
      max(num_steps // 50, 1),
      max(num_steps, 2),
      0.1 * learning_rate,
    )
  else:
    rate = learning_rate
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(rate, b2=0.98, weight_decay=weight_decay),
  )


def prefix_of(
  method: Method, frozen: Frozen, batch: dict[str, jax.Array]
) -> Prefix:
  """The batch's dense prefix: taken from the cache, or computed."""
  if frozen.prefixes is not None:
    return frozen.prefixes.take(batch["ids"])
  tokens = batch["tokens"][:, : method.layout.prefix + 1]
  return method.setup.build_prefix(frozen.lm, tokens, method.layout.context)


def starts_of(method: Method, windows: int) -> jax.Array:
  """First tokens (W, R) of all rollouts, those of an episode side by side."""
  starts = jnp.asarray(method.layout.starts())
  return jnp.broadcast_to(
    jnp.repeat(starts, method.group_size)[None],
    (windows, starts.size * method.group_size),
  )


def dense_of(
  method: Method, lm: Tree, prefix: Prefix, tokens: jax.Array
) -> jax.Array | None:
  """What divergences are taken from (W, E, T, D), or None for labels."""
  if method.reward == "label":
    return None
  starts = jnp.asarray(method.layout.starts())
  starts = jnp.broadcast_to(starts[None], (tokens.shape[0], starts.size))
  return rollout_lib.dense_hidden(method.setup, lm, prefix, tokens, starts)


def draw_goals(
  method: Method, log_price: jax.Array, windows: int, key: jax.Array
) -> jax.Array:
  """Goals (W, R, G), one per episode, shared by its K rollouts."""
  groups = (windows, method.layout.episodes)
  if method.budget == "price":
    low, high = log_price
    uniform = jax.random.uniform(key, (*groups, 1))
    goal = jnp.exp(low + (high - low) * uniform)
  else:
    low = jnp.asarray(method.target_low)[None, None]
    goal = low + (1 - low) * jax.random.uniform(key, (*groups, 3))
  return jnp.repeat(goal, method.group_size, axis=1)


def grouped(method: Method, values: jax.Array) -> jax.Array:
  """(W, R, ...) to (W E, K, ...)."""
  return values.reshape(-1, method.group_size, *values.shape[2:])


def advantages_of(
  method: Method, rollout: Rollout, goal: jax.Array, damage: jax.Array
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
  """Advantages (W E, K, N) of the N decisions, and what they are made of.

  N = T where a decision holds for one token. Else a decision gets what all the
  tokens of its time were rewarded.

  Args:
    method: the method.
    rollout: (W, R, T) actions and rewards.
    goal: (W, R, G).
    damage: (A, 3) mean damage of actions.

  Returns:
    The advantages, which of them count (or None for all), and metrics.
  """
  hold = method.policy.hold
  spent = rollout_lib.action_costs(method.setup.table)[rollout.actions]
  spent = grouped(method, spent)
  metrics = {}

  def to_go(rewards):
    rewards = rewards.reshape(*rewards.shape[:2], -1, hold).sum(-1)
    if method.credit == "residual":
      decided = spent[:, :, ::hold]
      return credit.residual_to_go(rewards, decided, method.gamma)
    return reward_lib.returns_to_go(rewards, method.gamma)

  rewards = grouped(method, rollout.rewards)
  if method.budget == "price":
    costs = jnp.asarray(method.policy.costs)[rollout.actions]
    price = grouped(method, goal)[..., 0]
    paid = to_go(-price[..., None] * grouped(method, costs))
    # Later effects, which the discount hides from the reward, are charged by
    # their mean.
    later = (1 - method.gamma) * damage_lib.LATER * jnp.sum(damage, axis=1)
    rewards = rewards - grouped(method, later[rollout.actions])
    metrics["cost"] = jnp.mean(
      jnp.asarray(method.policy.spent)[rollout.actions]
    )
  else:
    targets = grouped(method, goal)
    gap = jnp.mean(spent, axis=2) - targets
    penalty = reward_lib.dead_zone_penalty(
      gap, method.penalty_weights, method.tolerance
    )
    paid = jnp.broadcast_to(-penalty[..., None], rewards.shape)
    metrics["penalty"] = jnp.mean(penalty)
    for i, axis in enumerate(("kappa", "rho", "bits")):
      metrics[f"gap_{axis}"] = jnp.mean(jnp.abs(gap[..., i]))
  returns = jnp.stack([to_go(rewards), paid])
  if method.budget == "price":
    # Returns are divided by the scale of their price, because low prices move
    # small damages only and would not count beside high ones.
    scale = random_schedules.gain_scale(
      method.policy.costs, damage_lib.mean_gains(damage), goal[..., 0]
    )
    returns = returns / grouped(method, scale)[None, ..., None]
  mask = None
  if method.drop_dead or method.variance_share < 1:
    mask = grpo.live_groups(
      returns[0] + returns[1],
      grouped(method, rollout.actions)[:, :, ::hold],
      level=method.level,
      drop=method.drop_dead,
      share=method.variance_share,
    )
    metrics["live"] = jnp.mean(mask, dtype=jnp.float32)
  how = {"level": method.level, "whiten": method.whiten, "mask": mask}
  if method.normalise == "gdpo":
    advantages = grpo.gdpo_advantages(returns, jnp.ones(2), **how)
  else:
    advantages = grpo.advantages(
      returns[0] + returns[1], normalise=method.normalise, **how
    )
  for i, axis in enumerate(("kappa", "rho", "bits")):
    metrics[f"spent_{axis}"] = jnp.mean(spent[..., i])
  return advantages, mask, metrics


def make_step(
  method: Method, tx: optax.GradientTransformation
) -> Callable[[TrainState, Tree, Frozen], tuple[TrainState, dict]]:
  """Builds `(state, batch, frozen) -> (state, metrics)`.

  The batch holds "tokens" (W, S') and "ids" (W,), the windows' places in the
  prefix cache.
  """
  act = policy_lib.controller(method.policy, greedy=False)

  def step(state, batch, frozen):
    goal_key, roll_key = jax.random.split(state_lib.step_key(state))
    tokens = batch["tokens"]
    prefix = prefix_of(method, frozen, batch)
    starts = starts_of(method, tokens.shape[0])
    goal = draw_goals(method, frozen.log_price, tokens.shape[0], goal_key)
    rollout = rollout_lib.scan(
      method.setup,
      frozen.lm,
      prefix,
      tokens,
      starts,
      rollout_lib.Play(
        controller=act, params=(state.params, frozen.stats), goal=goal
      ),
      roll_key,
      record=True,
      dense=dense_of(method, frozen.lm, prefix, tokens),
    )
    seen = full_observations(method, frozen, tokens, starts, rollout)
    advantages, mask, metrics = advantages_of(
      method, rollout, goal, frozen.stats.damage
    )

    decided = lambda x: grouped(method, x)[:, :, :: method.policy.hold]
    actions = decided(rollout.actions)

    def loss_fn(params):
      logits = _logits(method, params, seen, goal, frozen.stats)
      reference = None
      if method.kl_coef:
        old = _logits(method, frozen.reference, seen, goal, frozen.stats)
        reference = jnp.take_along_axis(
          jax.nn.log_softmax(old), actions[..., None], axis=-1
        )[..., 0]
      loss, aux = grpo.policy_loss(
        logits,
        actions,
        decided(rollout.extras),
        advantages,
        method.objective,
        ref_logp=reference,
        mask=mask,
      )
      return loss.mean(), aux

    def epoch(carry, _):
      params, opt_state = carry
      (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      aux = aux | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
      return (optax.apply_updates(params, updates), opt_state), aux

    (params, opt_state), aux = jax.lax.scan(
      epoch,
      (state.params, state.opt_state),
      None,
      length=method.inner_epochs,
    )
    # Diagnostics are those of the last epoch, where the ratio has moved the
    # most.
    metrics |= jax.tree.map(lambda x: x[-1], aux)
    metrics["log_p"] = jnp.mean(rollout.log_p)
    state = dataclasses.replace(
      state, step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics

  return step


def _logits(method, params, seen, goal, stats):
  """Of the decisions of the policy `params`: (W E, K, N, A)."""
  model = policy_lib.bind(method.policy, params)
  logits = grouped(method, model(seen, goal, stats.damage)[0])
  return logits[:, :, :: method.policy.hold]


def full_observations(
  method: Method,
  frozen: Frozen,
  tokens: jax.Array,
  starts: jax.Array,
  rollout: Rollout,
):
  """The rollout's observations with embeddings, standardised."""
  model = transformer.bind(method.setup.config, frozen.lm)
  inputs, _ = prefix_lib.episode_tokens(tokens, starts, method.layout.horizon)
  seen = dataclasses.replace(rollout.observations, embed=model.embed(inputs))
  return frozen.stats.apply(seen)
