import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, mamba, transformer
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.decoding import loop as generation
from research.decoding.sampling import Sampling

CONFIGS = {
  "transformer": TransformerConfig.tiny(vocab_size=61),
  "mamba1": MambaConfig.tiny("mamba1"),
  "hybrid": MambaConfig.tiny("hybrid", num_layers=2),
}
GREEDY = generation.Rules(sampling=Sampling(temperature=0.0))
ENDS = (0, 1, 2)
# Hot, so that rows differ from step to step.
DRAWN = generation.Rules(
  sampling=Sampling(temperature=10.0), end_ids=ENDS, vocab_size=20
)
LENGTHS = (7, 3, 1)
WIDTH, ADDED = 8, 7


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """At these sizes it is what the tests wait for."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def init(config):
  module = transformer if config is CONFIGS["transformer"] else mamba
  params = module.init(config, jax.random.key(0))
  # Sharper, so that no two tokens are about as likely.
  params["embed"]["table"] = 20 * params["embed"]["table"]
  return params


@pytest.fixture(scope="module")
def drawn():
  """Parameters of a transformer, and what it draws."""
  config = CONFIGS["transformer"]
  params = init(config)
  return params, generate(config, params, DRAWN, steps=3)


def prompts():
  tokens = np.random.default_rng(0).integers(1, 61, (len(LENGTHS), WIDTH))
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)


def keys():
  return jax.random.split(jax.random.key(3), 3)


def generate(config, params, rules, *, steps, rows=slice(None)):
  tokens, lengths = prompts()
  batch, drawn = generation.begin(
    config,
    params,
    tokens[rows],
    lengths[rows],
    keys()[rows],
    cache_size=WIDTH + ADDED,
    rules=rules,
  )
  found = [np.asarray(drawn)]
  while sum(x.shape[1] for x in found) < ADDED:
    batch, drawn = generation.advance(
      config, params, batch, steps=steps, rules=rules
    )
    found.append(np.asarray(drawn))
  return np.concatenate(found, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def likeliest(config, params, tokens):
  hidden = language_model.hidden_states(config, params, tokens)
  return language_model.logits(config, params, hidden).argmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_continue_as_each_would_alone(name):
  config = CONFIGS[name]
  params = init(config)
  drawn = generate(config, params, GREEDY, steps=3)
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
  alone = generate(
    CONFIGS["transformer"], params, DRAWN, rows=slice(1, 2), steps=1
  )
  np.testing.assert_array_equal(found[1:2], alone)
  assert len(np.unique(alone)) > 3


def test_rows_end_and_rare_ids_are_not_drawn(drawn):
  _, found = drawn
  assert found.max() < 20
  ended = 0
  for row in found:
    at = np.flatnonzero(np.isin(row, ENDS))
    if at.size:
      ended += 1
      assert (row[at[0] :] == row[at[0]]).all()
  assert ended


@pytest.mark.parametrize("name", ["transformer", "hybrid"])
def test_the_state_is_donated(name):
  config = CONFIGS[name]
  params = init(config)
  tokens, lengths = prompts()
  batch, _ = generation.begin(
    config,
    params,
    tokens,
    lengths,
    keys(),
    cache_size=WIDTH + ADDED,
    rules=GREEDY,
  )
  before = jax.tree.leaves(batch.state)
  generation.advance(config, params, batch, steps=3, rules=GREEDY)
  assert all(leaf.is_deleted() for leaf in before)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_families_have_names_and_bounds():
  names = {language_model.family(config) for config in CONFIGS.values()}
  assert names == set(CONFIGS)
  assert language_model.max_length(CONFIGS["transformer"]) == 256
  assert language_model.max_length(CONFIGS["hybrid"]) is None
