"""The compute policy: a small causal network over the tokens of an episode.

Axis letters: W windows, R rollouts, T steps, D width of the LLM, A actions,
M width of the policy, G numbers in the goal.

Two heads. "published" (SOL, arXiv 2605.10875): action logits plus a head
conditioned on the budget targets. "gain": the network predicts how sensitive
a token is on each axis, u(s), on a logarithmic scale; an action costs
damage(a) . exp(u(s)) nats on the token itself and damage(a) . LATER on later
ones, where damage(a) is what its levels cost on average
(`research/sol/damage.py`). The logits are
(-damage(a) . (exp(u(s)) + LATER) / price - cost(a)) / temperature. One network
serves every price and every table, at u = 0 it is the best static action, and
a regression (`research/sol/warm_start.py`) makes it a policy without
reinforcement learning. `research/sol/light_policy.py` has policies with that
head and without the network.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import layers, module
from research.cost.controller import ControllerCost, controller_cost
from research.sol import cost, light_policy, observation
from research.sol.actions import ActionTable
from research.sol.observation import Observation
from research.sol.rollout import Controller

Params = module.Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
  """Shape of the policy.

  Attributes:
    table: the A actions.
    lm_width: D.
    horizon: T.
    head: "published" or "gain".
    width: M.
    num_heads: attention heads; divides M.
    surprise: the nine scalars of `observation.SCALARS` are inputs (unseen by
      the published policy).
    temperature: of the softmax; 1.3 as published, in units of cost for
      "gain".
    kind: "large", the network of this file, or of `light_policy.KINDS`.
    rank: of the projection of "head".
    source: what "head" projects: "hidden" or "embed", see `Observation`.
    hold: tokens that a decision holds for.
    weight_bits: of the policy's weights.
    action_costs: A shares of the dense step, or empty for the net keep rate.
  """

  table: ActionTable
  lm_width: int
  horizon: int
  head: str = "gain"
  width: int = 512
  num_heads: int = 4
  surprise: bool = True
  temperature: float = 0.02
  kind: str = "large"
  rank: int = 4
  source: str = "hidden"
  hold: int = 1
  weight_bits: int = 16
  action_costs: tuple[float, ...] = ()

  @property
  def goal_size(self) -> int:
    """G: 3 targets ("published") or 1 price ("gain")."""
    return 1 if self.head == "gain" else 3

  @property
  def num_actions(self) -> int:
    """A."""
    return self.table.size

  @property
  def spent(self) -> np.ndarray:
    """(A,) float32, what a budget is of, in its own unit."""
    if self.action_costs:
      return np.asarray(self.action_costs, np.float32)
    return cost.net_keep(self.table).astype(np.float32)

  @property
  def costs(self) -> np.ndarray:
    """(A,) float32, what a price is charged for: `spent`, as wide as net keep.

    Temperatures and ranges of prices are in units of net keep. Other costs span
    less of the dense step, so they are stretched to the same width.
    """
    spent = self.spent
    if not self.action_costs:
      return spent
    width = np.ptp(cost.net_keep(self.table)) / max(np.ptp(spent), 1e-9)
    return (spent * np.float32(width)).astype(np.float32)

  def own_cost(self, params: int) -> ControllerCost:
    """What the policy itself costs a token.

    Args:
      params: its weights.
    """
    table = self.num_actions if self.head == "gain" else 0
    if self.kind != "large":
      return controller_cost(
        params,
        products=light_policy.PRODUCTS[self.kind],
        bits=self.weight_bits,
        table=table,
        every=self.hold,
      )
    # Scalars, mix, QKV, output, two of the MLP, the head and what is beside it.
    return controller_cost(
      params,
      products=8,
      bits=self.weight_bits,
      cached=self.width * (self.horizon + 1),
      table=table,
    )


class _Mlp(nnx.Module):
  """Linear, GELU, linear."""

  def __init__(self, sizes: tuple[int, int, int], *, rngs: nnx.Rngs):
    self.first = layers.Linear(sizes[0], sizes[1], use_bias=True, rngs=rngs)
    self.second = layers.Linear(sizes[1], sizes[2], use_bias=True, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.second(jax.nn.gelu(self.first(x)))


class _LayerNorm(nnx.Module):
  """Layer norm with scale and offset over the last axis."""

  def __init__(self, features: int):
    self.scale = nnx.Param(jnp.ones((features,)))
    self.offset = nnx.Param(jnp.zeros((features,)))

  def __call__(self, x: jax.Array) -> jax.Array:
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    scale = jnp.broadcast_to(self.scale[...], x.shape)
    return x * scale + jnp.broadcast_to(self.offset[...], x.shape)


class Policy(module.Model):
  """One pre-norm causal block between an input mix and the action head."""

  def __init__(self, config: PolicyConfig, *, rngs: nnx.Rngs):
    """Random weights; the last layer of the gain head starts at zero."""
    c = config
    self.config = c
    linear = functools.partial(layers.Linear, use_bias=True, rngs=rngs)
    # time, effective flag, targets or price, deviations from them
    num_scalars = 2 + 2 * c.goal_size
    num_scalars += len(observation.SCALARS) if c.surprise else 0
    self.scalars = linear(num_scalars, 64)
    self.scalars_norm = _LayerNorm(64)
    self.action_table = nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (c.num_actions + 1, 32))
    )
    self.mix = linear(2 * c.lm_width + 64 + 32, c.width)
    self.positions = nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (c.horizon, c.width))
    )
    self.attn_norm = _LayerNorm(c.width)
    self.qkv = linear(c.width, 3 * c.width)
    self.out = linear(c.width, c.width)
    self.mlp_norm = _LayerNorm(c.width)
    self.mlp = _Mlp((c.width, 4 * c.width, c.width), rngs=rngs)
    self.final_norm = _LayerNorm(c.width)
    if c.head == "gain":
      self.head = linear(c.width, 3)
      self.head.rescale(0.0)
      self.shortcut = (
        linear(len(observation.SCALARS), 3) if c.surprise else None
      )
      if self.shortcut is not None:
        self.shortcut.rescale(0.0)
    else:
      self.head = linear(c.width, c.num_actions)
      self.goal_head = _Mlp((3, 32, c.num_actions), rngs=rngs)

  def inputs(self, seen: Observation, goal: jax.Array) -> jax.Array:
    """Mixes what was seen (..., D) and the goal (..., G) into (..., M)."""
    c = self.config
    step = seen.step.astype(jnp.float32)
    numbers = [
      ((step + 1) / c.horizon)[..., None],
      jnp.ones_like(step)[..., None],
    ]
    if c.head == "gain":
      started = (step > 0)[..., None]
      spent = jnp.mean(seen.spent, axis=-1, keepdims=True)
      numbers += [jnp.log(goal), jnp.where(started, spent, 0.0)]
    else:
      started = (step > 0)[..., None]
      numbers += [goal, jnp.where(started, seen.spent - goal, 0.0)]
    if c.surprise:
      numbers.append(seen.scalars)
    mixed = self.scalars(jnp.concatenate(numbers, axis=-1))
    mixed = self.scalars_norm(jax.nn.gelu(mixed))
    action = self.action_table[...][seen.previous]
    x = jnp.concatenate([seen.hidden, seen.embed, mixed, action], axis=-1)
    return self.mix(x) + self.positions[...][seen.step]

  def heads(
    self,
    x: jax.Array,
    seen: Observation,
    goal: jax.Array,
    damage: jax.Array,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Logits (..., A), sensitivities (..., 3) or None, from (..., M)."""
    c = self.config
    raw = self.head(self.final_norm(x))
    if c.head == "published":
      return (raw + self.goal_head(goal)) / c.temperature, None
    if self.shortcut is not None:
      raw = raw + self.shortcut(seen.scalars)
    return light_policy.gain_logits(c.costs, c.temperature, raw, goal, damage)

  def __call__(
    self, seen: Observation, goal: jax.Array, damage: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Logits (W, R, T, A) and sensitivities (W, R, T, 3) of whole episodes.

    Args:
      seen: (W, R, T, ...), standardised.
      goal: (W, R, G).
      damage: (A, 3), see `damage.measure`; "gain" alone reads it.
    """
    goal = jnp.broadcast_to(goal[:, :, None], (*seen.step.shape, goal.shape[2]))
    x = self.inputs(seen, goal)
    shape = x.shape
    q, k, v = self._project(x.reshape(-1, *shape[2:]))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = self._finish(x, mixed.reshape(shape))
    return self.heads(x, seen, goal, damage)

  def step(
    self,
    seen: Observation,
    goal: jax.Array,
    damage: jax.Array,
    cache: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Logits (W, R, A) of one step, and the cache with its keys and values.

    Args:
      seen: (W, R, ...), standardised; all rollouts at the same step.
      goal: (W, R, G).
      damage: (A, 3).
      cache: keys and values (W, R, T, heads, M / heads).
    """
    x = self.inputs(seen, goal)
    q, k, v = self._project(x[..., None, :])
    t = seen.step[0, 0]
    cache = tuple(
      jax.lax.dynamic_update_slice_in_dim(old, new, t, axis=2)
      for old, new in zip(cache, (k, v), strict=True)
    )
    flat = lambda y: y.reshape(-1, *y.shape[2:])
    visible = (jnp.arange(cache[0].shape[2]) <= t)[None, None, None]
    mixed = jax.nn.dot_product_attention(
      flat(q), flat(cache[0]), flat(cache[1]), mask=visible
    )
    x = self._finish(x, mixed.reshape(x.shape))
    return self.heads(x, seen, goal, damage)[0], cache

  def _project(self, x):
    """q, k, v (..., T, heads, M / heads) of (..., T, M)."""
    c = self.config
    qkv = self.qkv(self.attn_norm(x))
    qkv = qkv.reshape(*x.shape[:-1], 3, c.num_heads, c.width // c.num_heads)
    return (qkv[..., i, :, :] for i in range(3))

  def _finish(self, x, mixed):
    x = x + self.out(mixed)
    return x + self.mlp(self.mlp_norm(x))


def _kind(config: PolicyConfig) -> type[module.Model]:
  return Policy if config.kind == "large" else light_policy.LightPolicy


def init(config: PolicyConfig, key: jax.Array) -> Params:
  """Random weights of a policy of any kind."""
  return _kind(config).init(config, key)


def bind(config: PolicyConfig, params: Params) -> Any:
  """The policy of any kind over its weights."""
  return _kind(config).bind(config, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputStats:
  """What the policy knows from training text before it learns.

  Means and scales that standardise its inputs, and the damage of actions.

  Attributes:
    hidden: (2, D) mean and standard deviation.
    embed: (2, D).
    scalars: (2, 9).
    damage: (A, 3) mean damage of each action's levels, in nats.
  """

  hidden: jax.Array
  embed: jax.Array
  scalars: jax.Array
  damage: jax.Array

  @classmethod
  def identity(cls, width: int, damage: jax.Array) -> "InputStats":
    """Leaves the inputs as they are (published)."""
    one = lambda n: jnp.stack([jnp.zeros((n,)), jnp.ones((n,))])
    return cls(
      hidden=one(width),
      embed=one(width),
      scalars=one(len(observation.SCALARS)),
      damage=damage,
    )

  @classmethod
  def measure(cls, seen: Observation, damage: jax.Array) -> "InputStats":
    """Statistics of the observations (..., D), over all leading axes."""

    def one(x):
      x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
      return jnp.stack([jnp.mean(x, axis=0), jnp.std(x, axis=0) + 1e-4])

    return cls(
      hidden=one(seen.hidden),
      embed=one(seen.embed),
      scalars=one(seen.scalars),
      damage=damage,
    )

  def apply(self, seen: Observation) -> Observation:
    """Standardises hidden states, embeddings and scalars."""

    def one(x, stats):
      shape = (1,) * (x.ndim - 1) + (-1,)
      mean, scale = (row.reshape(shape) for row in stats)
      return (x.astype(jnp.float32) - mean) / scale

    return dataclasses.replace(
      seen,
      hidden=one(seen.hidden, self.hidden),
      embed=one(seen.embed, self.embed),
      scalars=one(seen.scalars, self.scalars),
    )


@functools.lru_cache(maxsize=64)
def controller(config: PolicyConfig, *, greedy: bool) -> Controller:
  """The policy as a controller of `rollout.scan`.

  Its parameters are the pair (policy parameters, InputStats), its goal is
  (W, R, G). It records the log-probability of the action it took.

  Args:
    config: of the policy.
    greedy: take the most likely action instead of a sample.
  """
  head_dim = config.width // config.num_heads

  def start(_, goal):
    held = jnp.zeros(goal.shape[:2], jnp.int32)
    if config.kind != "large":
      return (), held
    shape = (*goal.shape[:2], config.horizon, config.num_heads, head_dim)
    return (jnp.zeros(shape), jnp.zeros(shape)), held

  def act(params_and_stats, goal, carry, seen, key):
    params, stats = params_and_stats
    cache, held = carry
    model = bind(config, params)
    logits, cache = model.step(stats.apply(seen), goal, stats.damage, cache)
    if greedy:
      action = jnp.argmax(logits, axis=-1)
    else:
      action = jax.random.categorical(key, logits, axis=-1)
    action = action.astype(jnp.int32)
    if config.hold > 1:
      action = jnp.where(seen.step % config.hold == 0, action, held)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_probs, action[..., None], axis=-1)
    return action, (cache, action), picked[..., 0]

  return Controller(start=start, act=act)
