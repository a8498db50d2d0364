"""A random language model and settings that compile in seconds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from models.transformer_config import TransformerConfig
from research.sol.actions import ActionTable
from research.sol.options import Options
from research.sol.rollout import Controller, Setup
from research.sol.windows import Layout

CONFIG = TransformerConfig.tiny()
PAGE, HORIZON, CONTEXT = 4, 8, 16
TABLE = ActionTable.product("toy", (0.3, 1.0), (0.5, 1.0), (5, 16))
LAYOUT = Layout(context=CONTEXT, horizon=HORIZON, episodes=3)


@functools.cache
def lm():
  """Random weights; a large token table makes the predictions differ."""
  params = transformer.init(CONFIG, jax.random.key(0))
  params["embed"]["table"] = 20 * params["embed"]["table"]
  return params


def setup(**changes):
  settings = {
    "config": CONFIG,
    "table": TABLE,
    "horizon": HORIZON,
    "page_size": PAGE,
  }
  return Setup(**(settings | changes))


def text(length, seed=0):
  generator = np.random.default_rng(seed)
  return generator.integers(0, CONFIG.vocab_size, length).astype(np.int32)


def windows(count, seed=0, layout=LAYOUT):
  return jnp.asarray(text(count * layout.length, seed).reshape(count, -1))


def damage(table):
  """(A, 3): what each action leaves out."""
  kept = np.stack([table.kappa, table.rho, np.asarray(table.bits) / 16], -1)
  return jnp.asarray((1 - kept) ** 2, jnp.float32)


def replay_controller(actions):
  """Plays `actions` (W, R, T) step by step; `scan` then equals a block."""

  def act(params, goal, carry, seen, key):
    return actions[:, :, seen.step[0, 0]], carry, ()

  return Controller(start=lambda params, goal: (), act=act)


def method(mode, **changes):
  """The method of a mode, shrunk."""
  settings = {
    "preset": "J-2L",
    "page_size": PAGE,
    "context": CONTEXT,
    "horizon": HORIZON,
    "windows": 8,
    "episodes": 2,
    "group_size": 4,
    "width": 16,
  }
  options = Options(**(settings | changes)).filled(mode)
  return options.method(CONFIG, None)
