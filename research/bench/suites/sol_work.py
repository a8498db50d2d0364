"""What a benchmark of SOL times: rollouts and updates, with their work.

Axis letters: W windows, R rollouts of a window, T steps, S prefix tokens.

Operations are those of `research/cost/decode_step.py` for the dense action: a
rollout masks what an action drops and saves nothing, and the selection itself
is counted as free. Bytes are weights and cache, read once a phase for all rows;
activations and logits are counted as free.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import module, transformer
from models.transformer_config import TransformerConfig
from research.bench.case import Call, Case
from research.core import state as state_lib
from research.cost import decode_step
from research.cost.roofline import Phase
from research.sol import actions, learn
from research.sol import policy as policy_lib
from research.sol import prefix as prefix_lib
from research.sol import rollout as rollout_lib
from research.sol.actions import ActionTable
from research.sol.learn import Method
from research.sol.policy import InputStats
from research.sol.rollout import Controller, Setup

Params = transformer.Params
# Rows of the token table that stay where the head is taken out.
_FEW_TOKENS = 64


@functools.lru_cache(maxsize=64)
def uniform_controller(num_actions: int) -> Controller:
  """Draws every action uniformly; neither parameters nor goal."""

  def act(params, goal, carry, seen, key):
    del params, goal
    action = jax.random.randint(key, seen.step.shape, 0, num_actions)
    return action, carry, None

  return Controller(start=lambda params, goal: (), act=act)


def _builder(setup: Setup, first: int, stats: bool) -> Callable[..., Any]:
  """Jitted (params, tokens) -> prefix, with statistics from `first` on."""

  def build(params, tokens):
    built = setup.build_prefix(params, tokens, first)
    if stats:
      return built
    # Results that are not returned are not computed.
    return dataclasses.replace(built, surprise=None, entropy=None)

  return jax.jit(build)


class Bench:
  """The operations of one method on one model, with random tokens."""

  def __init__(
    self, method: Method, params: Params, windows: int, *, seed: int = 0
  ):
    """Takes `params` of the frozen LLM and W = `windows`."""
    self.method = method
    self.params = params
    self.windows = windows
    self._seed = np.random.SeedSequence(seed)
    # The cache is this object's own, because compilations are counted.
    self._builder = functools.cache(_builder)
    self._init = jax.jit(functools.partial(policy_lib.init, method.policy))

  def operations(self) -> dict[str, Callable[[], Case]]:
    """Prefill, rollouts and whole updates, by name; each is built on demand."""
    m = self.method
    uniform = uniform_controller(m.setup.table.size)
    return {
      "prefill": lambda: self._prefill("prefill", stats=False),
      "prefill+stats": lambda: self._prefill("prefill+stats", stats=True),
      "scan/uniform": lambda: self._scan(
        "scan/uniform", m.setup, self.params, uniform
      ),
      "scan/policy": self._policy_scan,
      "block": self._block,
      "grpo_update": self._update,
    }

  def breakdown(self) -> dict[str, Callable[[], Case]]:
    """Scans that leave parts out, so that differences tell what parts cost.

    Each axis of the actions alone; then no axis, without the head, and of
    that one layer only, or a prefix of one page only.
    """
    setup, c = self.method.setup, self.method.setup.config
    dense = ActionTable.product("dense", (1.0,), (1.0,), (16,))
    # The rest of their set-up (pages, horizon) stays this method's.
    tables = [dense, *map(actions.preset, ("S-FL", "K10", "Q5Q16"))]
    found = {
      f"scan/{table.name}": (
        dataclasses.replace(setup, table=table),
        self.params,
        None,
      )
      for table in tables
    }
    few = min(_FEW_TOKENS, c.vocab_size)
    headless = dataclasses.replace(c, vocab_size=few)
    bare = dataclasses.replace(setup, table=dense, config=headless)
    params = _cut(self.params, headless)
    found["scan/dense/headless"] = (bare, params, None)
    page = max(setup.page_size, 2)
    found["scan/dense/headless/one_page"] = (bare, params, page)
    single = dataclasses.replace(headless, num_layers=1)
    found["scan/dense/headless/one_layer"] = (
      dataclasses.replace(bare, config=single),
      _cut(params, single),
      None,
    )

    def scan(name):
      setup, params, length = found[name]
      uniform = uniform_controller(setup.table.size)
      return self._scan(name, setup, params, uniform, length)

    return {name: functools.partial(scan, name) for name in found}

  # Arguments.

  def _key(self) -> jax.Array:
    (child,) = self._seed.spawn(1)
    return jax.random.key(child.generate_state(1)[0])

  def _tokens(self, setup: Setup, length: int | None = None) -> jax.Array:
    """Random tokens (W, S + T + 1)."""
    length = self.method.layout.prefix if length is None else length
    shape = (self.windows, length + setup.horizon + 1)
    return jax.random.randint(self._key(), shape, 0, setup.config.vocab_size)

  def _starts(self, length: int | None = None) -> jax.Array:
    starts = learn.starts_of(self.method, self.windows)
    return starts if length is None else jnp.full_like(starts, length)

  def _rollouts(self) -> int:
    return self.method.layout.episodes * self.method.group_size

  def _goal(self) -> jax.Array:
    log_price = jnp.log(jnp.asarray([0.1, 10.0]))
    return learn.draw_goals(self.method, log_price, self.windows, self._key())

  def _policy(self) -> Any:
    return self._init(self._key())

  def _stats(self) -> InputStats:
    # The share of work that an action leaves out stands for its damage.
    damage = 1.0 - rollout_lib.action_costs(self.method.setup.table)
    return InputStats.identity(self.method.policy.lm_width, damage)

  # Operations.

  def _case(self, name, run, inputs, *, tokens, phases, shape, which="fwd"):
    """A case of a jitted function of its own, for compilations are counted."""
    call = Call(
      start=run,
      inputs=inputs,
      columns=lambda _: {"compiles": run._cache_size()},
    )
    return Case(
      op=name,
      shape=shape,
      dtype=str(jax.tree.leaves(self.params)[0].dtype),
      which=which,
      phases=phases,
      ours={"xla": lambda: call},
      amounts={"tokens": tokens},
      columns={"model_layers": self.method.setup.config.num_layers},
    )

  def _prefill(self, name, *, stats) -> Case:
    setup, length = self.method.setup, self.method.layout.prefix
    return self._case(
      name,
      self._builder(setup, 0, stats),
      lambda: (self.params, self._tokens(setup)[:, : length + 1]),
      tokens=self.windows * length,
      phases=(self._prefill_work(length if stats else 0),),
      shape=f"W{self.windows} S{length}",
    )

  def _scan(self, name, setup, params, controller, length=None) -> Case:
    length = self.method.layout.prefix if length is None else length
    inputs = self._scan_inputs(setup, params, length)
    return self._scan_case(name, setup, controller, inputs, length, 0)

  def _scan_inputs(self, setup, params, length) -> Callable[[], tuple]:
    """Draws a scan's arguments, for a controller without parameters or goal."""
    build = self._builder(setup, length, True)

    def inputs():
      tokens = self._tokens(setup, length)
      built = build(params, tokens[:, : length + 1])
      starts = self._starts(length)
      return params, built, tokens, starts, None, None, self._key()

    return inputs

  def _policy_scan(self) -> Case:
    m, policy, stats = self.method, self._policy(), self._stats()
    controller = policy_lib.controller(m.policy, greedy=False)
    plain = self._scan_inputs(m.setup, self.params, m.layout.prefix)

    def inputs():
      params, built, tokens, starts, _, _, key = plain()
      own = (policy, stats)
      return params, built, tokens, starts, own, self._goal(), key

    size = module.num_params(policy)
    length = m.layout.prefix
    return self._scan_case(
      "scan/policy", m.setup, controller, inputs, length, size
    )

  def _scan_case(self, name, setup, controller, inputs, length, size) -> Case:
    def run(params, built, tokens, starts, own, goal, key):
      play = rollout_lib.Play(controller=controller, params=own, goal=goal)
      return rollout_lib.scan(setup, params, built, tokens, starts, play, key)

    return self._case(
      name,
      jax.jit(run),
      inputs,
      tokens=self._episode_tokens(),
      phases=self._scan_work(setup.config, length, size),
      shape=self._shape(length),
    )

  def _block(self) -> Case:
    m = self.method
    setup, length = m.setup, m.layout.prefix
    build = self._builder(setup, length, True)
    shape = (self.windows, self._rollouts(), setup.horizon)

    def inputs():
      tokens = self._tokens(setup)
      built = build(self.params, tokens[:, : length + 1])
      drawn = jax.random.randint(self._key(), shape, 0, setup.table.size)
      return self.params, built, tokens, self._starts(), drawn

    return self._case(
      "block",
      jax.jit(functools.partial(rollout_lib.score_block, setup)),
      inputs,
      tokens=self._episode_tokens(),
      phases=self._block_work(),
      shape=self._shape(length),
    )

  def _update(self) -> Case:
    m = self.method
    updates = 1000 * m.inner_epochs
    tx = learn.optimizer(1e-4, updates, clip_norm=2.0, schedule="constant")
    policy, stats = self._policy(), self._stats()
    frozen = learn.Frozen(
      lm=self.params,
      log_price=jnp.log(jnp.asarray([0.1, 10.0])),
      stats=stats,
      reference=policy,
    )
    ids = jnp.arange(self.windows, dtype=jnp.int32)
    create = jax.jit(lambda params, k: state_lib.create_state(params, tx, k))

    def inputs():
      # The state is drawn anew as well: the step consumes it.
      state = create(self._policy(), self._key())
      tokens = jax.random.randint(
        self._key(),
        (self.windows, m.layout.length),
        0,
        m.setup.config.vocab_size,
      )
      return state, {"tokens": tokens, "ids": ids}, frozen

    size = module.num_params(policy)
    scored = m.layout.prefix - max(m.layout.context - prefix_lib.MEAN_SPAN, 0)
    rollout = self._scan_work(m.setup.config, m.layout.prefix, size)
    # Forward and twice as much backward; parameters and two moments, each
    # read and written in float32.
    epoch = Phase(6.0 * size * self._episode_tokens(), 6.0 * 4 * size)
    return self._case(
      "grpo_update",
      jax.jit(learn.make_step(m, tx), donate_argnums=0),
      inputs,
      tokens=self._episode_tokens(),
      phases=(
        self._prefill_work(scored),
        *rollout,
        *([epoch] * m.inner_epochs),
      ),
      shape=self._shape(m.layout.prefix),
      which="fwd+bwd",
    )

  # Work.

  def _episode_tokens(self) -> int:
    return self.windows * self._rollouts() * self.method.layout.horizon

  def _shape(self, length: int) -> str:
    return (
      f"W{self.windows} R{self._rollouts()} "
      f"T{self.method.layout.horizon} S{length}"
    )

  def _bytes(self) -> int:
    return jax.tree.leaves(self.params)[0].dtype.itemsize

  def _prefill_work(self, scored: int) -> Phase:
    """Windows read densely, `scored` positions of each with the head."""
    c, size = self.method.setup.config, self._bytes()
    refresh = lambda tokens: decode_step.refresh_cost(
      c, 0, tokens, weight_bytes=size, kv_bytes=size
    )
    one, weights = refresh(self.method.layout.prefix), refresh(0).bytes
    head = c.vocab_size * c.d_model
    read = weights + self.windows * (one.bytes - weights)
    return Phase(
      self.windows * (one.flops + 2.0 * head * scored),
      read + size * head * (scored > 0),
    )

  def _step_work(self, c, length, step, policy_size) -> Phase:
    """One token of every rollout: weights are read once, prefixes once."""
    size = self._bytes()
    page_size = self.method.setup.page_size
    read = lambda context: float(
      decode_step.bytes_per_token(
        *(c, 1, 1, context),
        page_size=page_size,
        weight_bytes=size,
        kv_bytes=size,
      )
    )
    weights = read(0)
    rows = self.windows * self._rollouts()
    flops = decode_step.flops_per_token(
      *(c, 1, 1, length + step + 1),
      page_size=page_size,
      policy_params=policy_size,
    )
    cached = self.windows * (read(length) - weights)
    cached += rows * (read(step + 1) - weights)
    return Phase(rows * float(flops), weights + cached + 4 * policy_size)

  def _scan_work(
    self, config: TransformerConfig, length: int, policy_size: int
  ) -> tuple[Phase, ...]:
    return tuple(
      self._step_work(config, length, step, policy_size)
      for step in range(self.method.layout.horizon)
    )

  def _block_work(self) -> tuple[Phase, ...]:
    """The steps' operations, but weights and cache read only once."""
    c, length = self.method.setup.config, self.method.layout.prefix
    steps = self._scan_work(c, length, 0)
    return (Phase(sum(step.flops for step in steps), steps[-1].bytes),)


def _cut(params: Params, config: TransformerConfig) -> Params:
  """The beginning of every array, as a smaller config asks for."""
  return jax.tree.map(
    lambda x, asked: x[tuple(map(slice, asked.shape))],
    params,
    transformer.abstract_params(config),
  )
