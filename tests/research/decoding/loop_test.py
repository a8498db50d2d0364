import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, mamba, transformer
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling

CONFIGS = {
  "transformer": TransformerConfig.tiny(vocab_size=61),
  "mamba1": MambaConfig.tiny("mamba1"),
  "hybrid": MambaConfig.tiny("hybrid", num_layers=2),
}
GREEDY = Sampling(temperature=0.0)
ENDS = (0, 1, 2)
LENGTHS = (7, 3, 1)
WIDTH, ADDED = 8, 7


@functools.cache
def init(config):
  module = transformer if config is CONFIGS["transformer"] else mamba
  params = jax.jit(module.init, static_argnums=0)(config, jax.random.key(0))
  # Sharper, so that no two tokens are about as likely.
  params["embed"]["table"] = 20 * params["embed"]["table"]
  return params


def hot(config):
  """So hot that rows differ from step to step."""
  return Plain(
    config=config, sampling=Sampling(temperature=10.0), vocab_size=20
  )


@pytest.fixture(scope="module")
def drawn():
  """Parameters of a transformer, and what it draws."""
  config = CONFIGS["transformer"]
  params = init(config)
  return params, generate(hot(config), params, steps=3, end_ids=ENDS)


def prompts():
  tokens = np.random.default_rng(0).integers(1, 61, (len(LENGTHS), WIDTH))
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)


def keys():
  return jax.random.split(jax.random.key(3), 3)


def begin(method, params, rows=slice(None), end_ids=()):
  tokens, lengths = prompts()
  return loop.begin(
    method,
    params,
    tokens[rows],
    lengths[rows],
    keys()[rows],
    cache_size=WIDTH + ADDED,
    end_ids=end_ids,
  )


def generate(method, params, *, steps, rows=slice(None), end_ids=()):
  """The tokens (n,) that each row finds, up to its end."""
  batch, found = begin(method, params, rows, end_ids)
  rows = [found.rows()]
  for _ in range(1, ADDED, steps):
    batch, found = loop.advance(
      method, params, batch, steps=steps, end_ids=end_ids
    )
    assert found.tokens.shape == (len(batch.done), steps, method.width)
    rows.append(found.rows())
  return [np.concatenate(row) for row in zip(*rows, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def likeliest(config, params, tokens):
  hidden = language_model.hidden_states(config, params, tokens)
  return language_model.logits(config, params, hidden).argmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_continue_as_each_would_alone(name):
  config = CONFIGS[name]
  params = init(config)
  method = Plain(config=config, sampling=GREEDY)
  drawn = np.stack(generate(method, params, steps=3))
  assert drawn.shape == (3, ADDED) and drawn.dtype == np.int32
  whole = np.zeros((3, WIDTH + ADDED), np.int32)
  for row, length in enumerate(LENGTHS):
    whole[row, :length] = prompts()[0][row, :length]
    whole[row, length : length + ADDED] = drawn[row]
  best = likeliest(config, params, jnp.asarray(whole))
  for row, length in enumerate(LENGTHS):
    seen = best[row, length - 1 : length - 1 + ADDED]
    np.testing.assert_array_equal(drawn[row], seen)


def test_a_row_draws_the_same_in_any_company_and_any_steps(drawn):
  params, found = drawn
  method = hot(CONFIGS["transformer"])
  (alone,) = generate(method, params, rows=slice(1, 2), steps=1, end_ids=ENDS)
  np.testing.assert_array_equal(found[1], alone)
  assert len(np.unique(alone)) > 3


def test_rows_end_and_rare_ids_are_not_drawn(drawn):
  _, found = drawn
  assert max(map(max, found)) < 20
  ended = [row for row in found if len(row) < ADDED]
  assert ended and all(row[-1] in ENDS for row in ended)
  assert not any(np.isin(row[:-1], ENDS).any() for row in found)


@pytest.mark.parametrize("name", ["transformer", "hybrid"])
def test_the_state_is_donated(name):
  config = CONFIGS[name]
  params = init(config)
  method = Plain(config=config, sampling=GREEDY)
  batch, _ = begin(method, params)
  before = jax.tree.leaves(batch.state.model)
  loop.advance(method, params, batch, steps=3)
  assert all(leaf.is_deleted() for leaf in before)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class Counting:
  """Guesses three numbers at a time; row b may keep b + 1 of them."""

  width = 3

  def begin(self, params, tokens, lengths, keys, *, cache_size):
    del keys, cache_size
    return self.step(params, tokens[jnp.arange(len(tokens)), lengths - 1])

  def step(self, params, state):
    accepted = jnp.arange(len(state)) + 1
    tokens = state[:, None] + params * jnp.arange(1, 4)[None]
    return tokens, accepted, state + params * accepted


def test_a_step_may_find_several_tokens_and_ends_within_them():
  first = prompts()[0][np.arange(3), np.asarray(LENGTHS) - 1]
  for ends in ((), (int(first[2]) + 8,)):
    found = generate(Counting(), 1, steps=2, end_ids=ends)
    for row, tokens in enumerate(found):
      expected = first[row] + 1 + np.arange(7 * (row + 1))
      if ends and ends[0] in expected:
        expected = expected[: list(expected).index(ends[0]) + 1]
      np.testing.assert_array_equal(tokens, expected)
  assert len(found[2]) == 8


@pytest.mark.parametrize("damage", [jnp.nan, jnp.inf])
def test_logits_that_are_not_finite_are_told(drawn, damage):
  config = CONFIGS["transformer"]
  norm = jax.tree.map(lambda x: x * damage, drawn[0]["final_norm"])
  damaged = drawn[0] | {"final_norm": norm}
  greedy = Plain(config=config, sampling=GREEDY)
  for method, ends in ((hot(config), ENDS), (greedy, ())):
    _, found = begin(method, damaged, end_ids=ends)
    assert (np.asarray(found.tokens) == loop.BROKEN).all()


def test_families_have_names_and_bounds():
  names = {config.family for config in CONFIGS.values()}
  assert names == set(CONFIGS)
  assert CONFIGS["transformer"].max_position == 256
  assert CONFIGS["hybrid"].max_position is None
