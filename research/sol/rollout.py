"""Episodes under actions: one token at a time, or all at once.

Axis letters: W windows, R rollouts of a window, T steps, L layers, N key/value
heads, K head dimension, D width, A actions.

`scan` runs T decode steps in one `lax.scan`, a controller choosing each
action from what it sees. `score_block` scores schedules that are fixed in
advance in one block forward: the key/value states that step t reads are those
that the actions of earlier steps produced, in both, so the two agree.

Source of the actions' semantics: SOL (arXiv 2605.10875) and Quest
(arXiv 2406.10774); `keep_sink_and_current` and `prune="intermediate"` are
options beyond them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import ops
from models import layers, transformer
from models.transformer_config import TransformerConfig
from research.sol import observation
from research.sol import prefix as prefix_lib
from research.sol.actions import ActionTable
from research.sol.observation import Observation
from research.sol.prefix import Prefix

# (memory, tokens (W, R), actions (W, R), step) -> hidden states (W, R, D) and
# the next memory.
Forward = Callable[
  [Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """What is fixed about the episodes of a run.

  Attributes:
    config: of the frozen LLM.
    table: the actions.
    horizon: T, steps of an episode.
    page_size: tokens a page.
    keep_sink_and_current: force the first and the query's own page in.
    shared_pages: query heads that share a key head share its pages, too.
    prune: which MLP channels rho drops: "input" (published) or
      "intermediate".
    attention: implementation of the dense attention of the prefix.
    begin: token that is read in place of the first of every window, which no
      episode predicts; None leaves it.
  """

  config: TransformerConfig
  table: ActionTable
  horizon: int
  page_size: int
  keep_sink_and_current: bool = False
  shared_pages: bool = False
  prune: str = "input"
  attention: str | None = None
  begin: int | None = None

  @property
  def drops_tokens(self) -> bool:
    """Some action reads only part of the context."""
    return min(self.table.kappa) < 1.0

  def build_prefix(
    self, params: transformer.Params, tokens: jax.Array, first_start: int
  ) -> Prefix:
    """`prefix.build` for this set-up: `tokens` (W, S + 1)."""
    tokens = self.begun(tokens)
    return prefix_lib.build(
      self.config,
      params,
      tokens,
      first_start=first_start,
      page_size=self.page_size if self.drops_tokens else None,
      attention=self.attention,
    )

  def begun(self, tokens: jax.Array) -> jax.Array:
    """Windows (W, S') as the model reads them, with the begin token."""
    return tokens if self.begin is None else tokens.at[:, 0].set(self.begin)


@dataclasses.dataclass(frozen=True)
class Controller:
  """Chooses actions step by step.

  Attributes:
    start: (params, goal) -> carry, a pytree with leading axes (W, R).
    act: (params, goal, carry, observation, key) -> (actions (W, R) int32,
      carry, extras), where extras is a pytree with leading axes (W, R) that
      the rollout records.
  """

  start: Callable[[Any, Any], Any]
  act: Callable[..., tuple[jax.Array, Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Play:
  """A controller, and what it is told.

  Attributes:
    controller: chooses the actions.
    params: its parameters.
    goal: its goal, a pytree with leading axes (W, R).
  """

  controller: Controller
  params: Any = None
  goal: Any = None

  def start(self) -> Any:
    """The controller's carry at the first step."""
    return self.controller.start(self.params, self.goal)

  def act(self, carry: Any, seen: Observation, key: jax.Array) -> Any:
    """Actions, carry and extras of a step, see `Controller`.

    Args:
      carry: of the step before.
      seen: observations.
      key: of what is random.
    """
    return self.controller.act(self.params, self.goal, carry, seen, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
  """What happened in W x R episodes of T steps.

  Attributes:
    actions: (W, R, T) int32.
    log_p: (W, R, T) log-likelihood of the true next tokens, nats.
    observations: what the controller saw (W, R, T, ...), or None; `embed` is
      left out as None, since the tokens give it.
    extras: what the controller recorded, (W, R, T, ...).
    divergence: (W, R, T) of the dense model's predictions from these (KL), in
      nats, or None.
  """

  actions: jax.Array
  log_p: jax.Array
  observations: Observation | None
  extras: Any
  divergence: jax.Array | None = None

  @property
  def rewards(self) -> jax.Array:
    """(W, R, T) nats: minus the divergence where it is known, else log_p."""
    return self.log_p if self.divergence is None else -self.divergence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Signals:
  """What the last token left behind, (W, R, ...)."""

  hidden: jax.Array
  hidden_before: jax.Array
  surprise: jax.Array
  entropy: jax.Array
  previous_surprise: jax.Array
  mean_surprise: jax.Array


def _signals_at_start(prefix: Prefix, starts: jax.Array) -> _Signals:
  pick = lambda values, at: prefix_lib.at_starts(values, at)
  return _Signals(
    hidden=pick(prefix.hidden, starts),
    hidden_before=pick(prefix.hidden, starts - 1),
    surprise=pick(prefix.surprise, starts),
    entropy=pick(prefix.entropy, starts),
    previous_surprise=pick(prefix.surprise, starts - 1),
    mean_surprise=prefix_lib.mean_surprise(prefix, starts),
  )


def _advance(signals, hidden, surprise, entropy) -> _Signals:
  """Signals after a token whose successor had `surprise`."""
  mean = signals.mean_surprise
  return _Signals(
    hidden=hidden,
    hidden_before=signals.hidden,
    surprise=surprise,
    entropy=entropy,
    previous_surprise=signals.surprise,
    mean_surprise=mean + (surprise - mean) / prefix_lib.MEAN_SPAN,
  )


def _observe(signals, embed, previous, spent, step) -> Observation:
  return Observation(
    hidden=signals.hidden,
    embed=embed,
    scalars=observation.scalars(
      signals.surprise,
      signals.entropy,
      signals.previous_surprise,
      signals.mean_surprise,
      signals.hidden,
      embed,
    ),
    drift=observation.drift(signals.hidden, signals.hidden_before),
    previous=previous,
    spent=spent,
    step=step,
  )


def _forward(
  model, setup, prefix, tokens, starts, actions, *, suffix=None, slot=0
):
  """Hidden states (W, R, T, D) and keys, values (L, W, R, T, N, K).

  Args:
    model: the frozen LLM.
    setup: the set-up.
    prefix: dense state of the windows.
    tokens: (W, R, T), the first one sits in suffix slot `slot`.
    starts: (W, R).
    actions: (W, R, T).
    suffix: keys and values (L, W, R, C, N, K) of the slots before `slot`, or
      None when `tokens` are the whole suffix.
    slot: int or int32 scalar.
  """
  table = setup.table
  kappa, rho, bits = (axis[actions] for axis in table.arrays())
  keep = kappa if setup.drops_tokens else None
  prune = lambda x: ops.keep_top_channels(x, rho)
  hooks = layers.MlpHooks(
    on_input=prune if min(table.rho) < 1 and setup.prune == "input" else None,
    on_middle=prune
    if min(table.rho) < 1 and setup.prune == "intermediate"
    else None,
    on_output=(lambda y: ops.fake_quantize(y, bits))
    if min(table.bits) < 16
    else None,
  )

  def attend(q, k, v, layer, behind=None):
    prefix_k, prefix_v, page_min, page_max, layer_suffix = layer
    if layer_suffix is None:
      suffix_k, suffix_v = k, v
    else:
      suffix_k, suffix_v = (
        jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)
        for old, new in zip(layer_suffix, (k, v), strict=True)
      )
    mixed = ops.sparse_attention(
      q,
      prefix_k,
      prefix_v,
      suffix_k,
      suffix_v,
      keep,
      prefix_lengths=starts,
      query_start=slot,
      page_size=setup.page_size,
      bounds=None if page_min is None else (page_min, page_max),
      keep_sink_and_current=setup.keep_sink_and_current,
      shared=setup.shared_pages,
      behind=behind,
    )
    return mixed, (k, v)

  steps = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
  positions = starts[..., None] + slot + steps[None, None]
  return model(
    model.embed(tokens),
    positions,
    attend,
    layer_inputs=(
      prefix.k,
      prefix.v,
      prefix.page_min,
      prefix.page_max,
      suffix,
    ),
    hooks=hooks,
  )


def _step_stats(model, hidden, targets, dense):
  """Statistics (W, R) of hidden (W, R, D); dense (W, E, D) or None."""
  logits = model.logits(hidden)
  if dense is None:
    return prefix_lib.token_stats(logits, targets)
  group = lambda x: x.reshape(*dense.shape[:2], -1, *x.shape[2:])
  stats = prefix_lib.token_stats(
    group(logits), group(targets), model.logits(dense)[:, :, None]
  )
  return jax.tree.map(lambda x: x.reshape(targets.shape), stats)


def _block_stats(model, hidden, targets, dense, chunk):
  """Statistics (W, R, T) of (W, R, T, D); dense (W, E, T, D) or None."""
  windows, rollouts, horizon = targets.shape
  episodes = rollouts if dense is None else dense.shape[1]

  def by_place(x):
    x = x.reshape(windows, episodes, -1, *x.shape[2:]).swapaxes(2, 3)
    return x.reshape(windows, episodes * horizon, -1, *x.shape[4:])

  if dense is not None:
    dense = dense.reshape(windows, episodes * horizon, -1)
  stats = prefix_lib.stats_in_chunks(
    model, by_place(hidden), by_place(targets), chunk, dense
  )

  def by_rollout(x):
    x = x.reshape(windows, episodes, horizon, -1).swapaxes(2, 3)
    return x.reshape(targets.shape)

  return jax.tree.map(by_rollout, stats)


def action_costs(table: ActionTable) -> jax.Array:
  """(A, 3) of (kappa, rho, bits / 16)."""
  kappa, rho, bits = table.arrays()
  return jnp.stack([kappa, rho, bits / 16.0], axis=-1)


def dense_hidden(
  setup: Setup,
  params: transformer.Params,
  prefix: Prefix,
  tokens: jax.Array,
  starts: jax.Array,
) -> jax.Array:
  """What the dense model's episodes end in: (W, E, T, D), for `starts` (W, E).

  The `dense` of `scan` and `score_block`, whose R = E K rollouts lie side by
  side, K of every episode; they then measure the divergence from it. For a
  calibrated model the divergence is what an action does to the log-likelihood
  of the true token in the mean, without the noise of which token it was.
  """
  inputs, _ = prefix_lib.episode_tokens(tokens, starts, setup.horizon)
  full = jnp.full(inputs.shape, setup.table.full_index, jnp.int32)
  model = transformer.bind(setup.config, params)
  return _forward(model, setup, prefix, inputs, starts, full)[0]


def scan(
  setup: Setup,
  params: transformer.Params,
  prefix: Prefix,
  tokens: jax.Array,
  starts: jax.Array,
  play: Play,
  key: jax.Array,
  *,
  record: bool = False,
  dense: jax.Array | None = None,
  episodes: int = 1,
) -> Rollout:
  """Runs the controller for T steps, or for several episodes on end.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    prefix: dense state of the windows.
    tokens: (W, S') the windows' tokens; every start + T must lie inside.
    starts: (W, R) int32 first token of each episode, multiples of the page
      size, at least 2 and at most S.
    play: who chooses the actions.
    key: randomness of the controller.
    record: keep the observations.
    dense: (W, E, T, D) of `dense_hidden`, or None.
    episodes: how many follow each other without a refresh: the controller
      begins anew every T steps, but reads what its actions left behind.

  Returns:
    The rollout, of `episodes` * T steps.
  """
  config, steps = setup.config, episodes * setup.horizon
  model = transformer.bind(config, params)
  inputs, targets = prefix_lib.episode_tokens(tokens, starts, steps)
  empty = no_suffix(config, starts.shape, steps, prefix.k.dtype)
  fresh = (
    jnp.full(starts.shape, setup.table.size, jnp.int32),
    jnp.zeros((*starts.shape, 3), jnp.float32),
    play.start(),
  )
  start = (empty, _signals_at_start(prefix, starts), fresh)
  over_steps = (
    jnp.arange(steps, dtype=jnp.int32),
    jnp.moveaxis(inputs, -1, 0),
    jnp.moveaxis(targets, -1, 0),
    None if dense is None else jnp.moveaxis(dense, 2, 0),
    jax.random.split(key, steps),
  )
  step = functools.partial(
    _step,
    setup,
    model,
    prefix,
    starts,
    play,
    fresh if episodes > 1 else None,
    action_costs(setup.table),
    record,
  )
  _, outputs = jax.lax.scan(step, start, over_steps)
  actions, log_p, divergence, seen, extras = jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 2), outputs
  )
  return Rollout(
    actions=actions,
    log_p=log_p,
    divergence=divergence,
    observations=seen,
    extras=extras,
  )


def _step(
  setup, model, prefix, starts, play, fresh, costs, record, carry, per_step
):
  """One step of `scan`, which begins anew by `fresh` every T, or by None not.

  The carry is the keys and values of the steps so far, the signals of the last
  token, and the last actions, the sum of their costs and the controller's own.
  """
  _, signals, own = carry
  t, token, target, dense_now, key = per_step
  at = t
  if fresh is not None:
    at = t % setup.horizon
    own = jax.tree.map(lambda x, y: jnp.where(at == 0, x, y), fresh, own)
  seen, own, memory, hidden, extras = _read(
    setup, model, prefix, starts, play, costs, carry[:2], own, token, (t, at),
    key,
  )  # fmt: skip
  stats = _step_stats(model, hidden, target, dense_now)
  carry = (
    memory,
    _advance(signals, hidden, -stats.log_p, stats.entropy),
    own,
  )
  kept = dataclasses.replace(seen, embed=None) if record else None
  return carry, (own[0], stats.log_p, stats.divergence, kept, extras)


def _read(
  setup, model, prefix, starts, play, costs, past, own, token, places, key,
  dense=None, forward=None,
):  # fmt: skip
  """Chooses how much a token computes, and reads it so.

  Args:
    setup: the set-up.
    model: the bound LLM.
    prefix: of the windows.
    starts: (W, R), as in `scan`.
    play: who chooses.
    costs: (A, 3) of actions.
    past: keys and values of the steps so far, or what `forward` has in their
      place, and signals of the last token.
    own: the last actions, the sum of their costs, the controller's own.
    token: (W, R) int32.
    places: the step, and which one it is of its episode.
    key: of the choice.
    dense: scalar bool, whether the token is read with all there is instead.
    forward: reads the token, see `Forward`; None for `masked`.

  Returns:
    What was observed; `own`, keys and values with this step; hidden states
    (W, R, D); and what the controller keeps of its choice.
  """
  (memory, signals), (t, at) = past, places
  previous, spent_sum, inner = own
  seen = _observe(
    signals,
    model.embed(token),
    previous,
    spent_sum / jnp.maximum(at, 1),
    jnp.broadcast_to(at, token.shape),
  )
  action, inner, extras = play.act(inner, seen, key)
  if dense is not None:
    action = jnp.where(dense, setup.table.full_index, action).astype(jnp.int32)
  forward = forward or masked(setup, model, prefix, starts)
  hidden, memory = forward(memory, token, action, t)
  own = (action, spent_sum + costs[action], inner)
  return seen, own, memory, hidden, extras


def masked(
  setup: Setup,
  model: transformer.Transformer,
  prefix: Prefix,
  starts: jax.Array,
) -> Forward:
  """Reads a token by computing all and masking what its action drops.

  Its memory is the keys and values (L, W, R, C, N, K) of the steps so far.

  Args:
    setup: the set-up.
    model: the bound LLM.
    prefix: of the windows.
    starts: (W, R), as in `scan`.
  """

  def forward(suffix, token, action, t):
    hidden, new = _forward(
      model,
      setup,
      prefix,
      token[..., None],
      starts,
      action[..., None],
      suffix=suffix,
      slot=t,
    )
    suffix = tuple(
      jax.lax.dynamic_update_slice_in_dim(old, x, t, axis=3)
      for old, x in zip(suffix, new, strict=True)
    )
    return hidden[:, :, 0], suffix

  return forward


def no_suffix(
  config: TransformerConfig, shape: tuple[int, ...], steps: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """The memory of `masked` for rollouts of `shape` (W, R) and some steps."""
  size = (
    config.num_layers,
    *shape,
    steps,
    config.num_kv_heads,
    config.head_dim,
  )
  empty = jnp.zeros(size, dtype)
  return empty, empty


def score_block(
  setup: Setup,
  params: transformer.Params,
  prefix: Prefix,
  tokens: jax.Array,
  starts: jax.Array,
  actions: jax.Array,
  *,
  record: bool = False,
  dense: jax.Array | None = None,
  chunk: int = 256,
) -> Rollout:
  """Scores schedules `actions` (W, R, T) that are fixed in advance.

  The other arguments are those of `scan`; `chunk` is how many of a window's
  R x T tokens have their logits alive at a time. Agrees with `scan` under a
  controller that plays the same actions.
  """
  model = transformer.bind(setup.config, params)
  windows, _, horizon = actions.shape
  inputs, targets = prefix_lib.episode_tokens(tokens, starts, horizon)
  hidden, _ = _forward(model, setup, prefix, inputs, starts, actions)
  stats = _block_stats(model, hidden, targets, dense, chunk)
  seen = None
  if record:
    seen = _observe_block(
      setup,
      model,
      prefix,
      starts,
      inputs,
      actions,
      hidden,
      -stats.log_p,
      stats.entropy,
    )
  return Rollout(
    actions=actions,
    log_p=stats.log_p,
    divergence=stats.divergence,
    observations=seen,
    extras=None,
  )


def _observe_block(
  setup, model, prefix, starts, inputs, actions, hidden, surprise, entropy
):
  """The observations that `scan` would have recorded."""
  costs = action_costs(setup.table)[actions]
  steps = jnp.arange(actions.shape[-1], dtype=jnp.int32)
  spent = jnp.cumsum(costs, axis=2) - costs
  spent = spent / jnp.maximum(steps, 1)[None, None, :, None]
  first = jnp.full((*starts.shape, 1), setup.table.size, jnp.int32)
  previous = jnp.concatenate([first, actions[..., :-1]], axis=-1)

  def step(signals, per_step):
    h, s, e = per_step
    return _advance(signals, h, s, e), signals

  by_step = lambda x: jnp.moveaxis(x, 2, 0)
  _, signals = jax.lax.scan(
    step,
    _signals_at_start(prefix, starts),
    (by_step(hidden), by_step(surprise), by_step(entropy)),
  )
  signals = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), signals)
  step_index = jnp.broadcast_to(steps[None, None], actions.shape)
  seen = _observe(signals, model.embed(inputs), previous, spent, step_index)
  return dataclasses.replace(seen, embed=None)


def extend(
  setup: Setup,
  params: transformer.Params,
  prefix: Prefix,
  tail: jax.Array,
  play: Play,
  key: jax.Array,
  *,
  steps: int,
  temperature: float,
  dense_below: int = 0,
  memory: Any = None,
  forward: Forward | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws the tokens behind a prompt, each under the controller's action.

  Args:
    setup: the set-up.
    params: of the frozen LLM.
    prefix: of one window, of all S tokens of which `tail` is the rest.
    tail: (F,) int32 the prompt's tokens from S on. All but the last are read
      densely.
    play: who chooses the actions; it begins anew every T steps.
    key: of the draws.
    steps: n, tokens to draw.
    temperature: of the draws; 0 is greedy.
    dense_below: tokens of a context, up to which all actions are the dense one.
    memory: of `forward` behind the prefix; None for that of `masked`.
    forward: reads a token; None for `masked`.

  Returns:
    Tokens and actions, (n,) int32.
  """
  model = transformer.bind(setup.config, params)
  known = tail.shape[0]
  total = known + steps - 1
  starts = jnp.full((1, 1), prefix.hidden.shape[1], jnp.int32)
  if memory is None:
    memory = no_suffix(setup.config, (1, 1), total, prefix.k.dtype)
  fresh = (
    jnp.full((1, 1), setup.table.size, jnp.int32),
    jnp.zeros((1, 1, 3), jnp.float32),
    play.start(),
  )
  costs = action_costs(setup.table)

  def step(carry, per_step):
    memory, signals, own, token = carry
    t, now, key = per_step
    token = jnp.where(t < known, tail[jnp.minimum(t, known - 1)], token)
    at = jnp.maximum(t - known + 1, 0) % setup.horizon
    own = jax.tree.map(lambda x, y: jnp.where(at == 0, x, y), fresh, own)
    read = jnp.full((1, 1), token, jnp.int32)
    dense = (t < known - 1) | (starts[0, 0] + t < dense_below)
    _, own, memory, hidden, _ = _read(
      setup, model, prefix, starts, play, costs, (memory, signals), own, read,
      (t, at), key, dense=dense, forward=forward,
    )  # fmt: skip
    logits = model.logits(hidden)
    if temperature:
      drawn = jax.random.categorical(now, logits[0, 0] / temperature)
    else:
      drawn = jnp.argmax(logits[0, 0])
    later = tail[jnp.minimum(t + 1, known - 1)]
    token = jnp.where(t + 1 < known, later, drawn).astype(jnp.int32)
    stats = prefix_lib.token_stats(logits, jnp.full((1, 1), token))
    signals = _advance(signals, hidden, -stats.log_p, stats.entropy)
    return (memory, signals, own, token), (token, own[0][0, 0])

  keys = jax.random.split(key, (2, total))
  start = (memory, _signals_at_start(prefix, starts), fresh, tail[0])
  each = (jnp.arange(total, dtype=jnp.int32), keys[0], keys[1])
  _, (tokens, actions) = jax.lax.scan(step, start, each)
  return tokens[known - 1 :], actions[known - 1 :]
