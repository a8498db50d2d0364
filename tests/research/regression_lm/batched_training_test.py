"""Members that are trained at once are trained as if alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.numbers import Normalized, TargetCodec
from models.regression_lm_config import RegressionLMConfig
from research.regression_lm import batched_training
from research.regression_lm.batched_training import Pairs, Pool, Updates
from research.regression_lm.expected import Grid
from research.regression_lm.likelihood import Model
from research.regression_lm.options import LossOptions
from research.text import tokenizing

LOSS = LossOptions(expected_value=1.0, ranking=1.0, dropout=0.1)
UPDATES = Updates(steps=3, batch=4, learning_rate=1e-2, warmup=1, loss=LOSS)


@pytest.fixture(scope="module")
def made():
  tokenizer = tokenizing.load(tokenizing.BYTES)
  texts = [[f"x {i}", f"{i} x"] for i in range(6)]
  pool = Pool.read(tokenizer, texts, ["one :", "second :"], 20)
  codec = TargetCodec(format=Normalized(base=10, digits=1))
  config = RegressionLMConfig.tiny(
    vocab_size=tokenizer.vocab_size,
    target_vocab_size=len(codec.tokens),
    target_length=codec.length,
  )
  ranks = np.arange(6) / 6
  targets = codec.encode([[rank] for rank in ranks])
  pairs = Pairs(
    jnp.arange(6),
    jnp.array([0, 1] * 3),
    jnp.asarray(targets),
    jnp.asarray(ranks, jnp.float32)[:, None],
  )
  numbers = codec.encode([[k / 10] for k in range(10)])
  grid = Grid(
    ids=jnp.asarray(numbers[None]),
    scores=jnp.arange(10, dtype=jnp.float32)[None] / 10,
  )
  return Model(config=config, codec=codec), pool, pairs, grid, tokenizer


def train(made, seeds, own, updates=UPDATES):
  model, pool, pairs, grid, _ = made
  grids = jax.tree.map(lambda x: jnp.stack([x] * len(seeds)), grid)
  params = batched_training.init(model, batched_training.keys_of(seeds))
  return batched_training.train(
    model, params, pool, pairs, grids, own, updates, seeds=seeds
  )


def close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
  )


def test_the_name_of_the_task_stands_in_front_of_the_text(made):
  _, pool, _, _, tokenizer = made
  batch = pool.batch(jnp.array([3, 5]), jnp.array([1, 0]), jnp.array([1, 0]))
  for row, text in enumerate(["second :3 x", "one :x 5"]):
    ids = tokenizer.backend.encode(text).ids
    assert batch["lengths"][row] == len(ids)
    np.testing.assert_array_equal(batch["tokens"][row, : len(ids)], ids)


def test_a_member_does_not_see_the_others(made):
  own = [np.arange(6), np.array([1, 3])]
  both = train(made, [5, 9], own)
  alone = train(made, [9], own[1:])
  close(jax.tree.map(lambda x: x[1:], both), alone)


def test_what_fills_the_last_call_changes_nothing(made, monkeypatch):
  own = [np.arange(6)]
  filled = train(made, [5], own)
  monkeypatch.setattr(batched_training, "_CHUNK", 3)
  close(filled, train(made, [5], own))


def test_an_epoch_has_every_pair_of_the_member_once():
  own = [np.array([2, 4, 6]), np.array([1, 3, 5, 7])]
  found = batched_training.order(own, 4, 3, [0, 1])
  assert found.shape == (2, 4, 3)
  assert sorted(found[0, 0]) == [2, 4, 6]
  assert sorted(found[1].ravel()[:4]) == [1, 3, 5, 7]


def test_members_learn_their_pairs(made):
  model, pool, _, grid, _ = made
  updates = Updates(steps=150, batch=6, learning_rate=1e-2)
  params = train(made, [0, 1], [np.arange(6)] * 2, updates)
  grids = jax.tree.map(lambda x: jnp.stack([x] * 2), grid)
  # Pairs of the first task, its texts in both orders.
  rows = np.array([[0, 2, 4]] * 2)
  found = batched_training.chances(
    model, params, pool, grids, rows, np.zeros(2, int), views=2, batch=2
  )
  assert found.shape == (2, 3, 10)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
  np.testing.assert_array_equal(found.argmax(-1), [[0, 3, 7]] * 2)
