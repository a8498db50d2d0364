"""Rounds: order of sequences, evaluation, augmentation, broken updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import fabnet
from models.fabnet import Compute
from models.fabnet_config import FABNetConfig
from research.lra import learn
from research.lra.options import Options
from research.lra.reading import Split
from research.lra.tasks import TASKS

CONFIG = FABNetConfig.tiny(
  attention_layers=0, ffn="dense", fourier_norm=True, max_length=8
)
OPTIONS = Options(batch=4, dropout=0.0)
COMPUTE = Compute()
SEEDS = np.array([3, 8])


def split_of(count, seed=0):
  generator = np.random.default_rng(seed)
  tokens = generator.integers(1, 17, (count, 8), np.uint8)
  labels = generator.integers(0, 10, count).astype(np.int32)
  return Split(tokens, np.full(count, 8, np.int32), labels)


def members(count=2):
  generator = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(
    generator.normal(0, 0.5, (count, *x.shape)), jnp.float32
  )
  return jax.tree.map(draw, fabnet.abstract_params(CONFIG))


def test_every_epoch_of_a_member_has_every_sequence_once():
  whole = learn.rows_of(0, 15, 4, 10, SEEDS)
  assert whole.shape == (15, 2, 4)
  for member in range(2):
    epochs = whole[:, member].reshape(6, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 6
  assert (whole[:, 0] != whole[:, 1]).any()
  # A run that goes on at update 7 takes what it would have taken.
  np.testing.assert_array_equal(learn.rows_of(7, 8, 4, 10, SEEDS), whole[7:])


def test_pretraining_has_orders_and_keys_of_its_own():
  rows = [
    learn.rows_of(0, 5, 4, 10, SEEDS, pretraining=before)
    for before in (True, False)
  ]
  assert (rows[0] != rows[1]).any(axis=(0, 2)).all()
  keys = [
    jax.random.key_data(
      learn.create_state(members(), OPTIONS, SEEDS, pretraining=before).key
    )
    for before in (True, False)
  ]
  # Four keys of two members, all different.
  assert len(np.unique(np.concatenate(keys), axis=0)) == 4


@pytest.fixture(scope="module")
def evaluate():
  return jax.jit(learn.make_evaluation(CONFIG, COMPUTE, 4))


def test_an_evaluation_counts_every_sequence_once(evaluate):
  split, params = split_of(10), members()
  shares = evaluate(params, learn.on_device(split))
  run = jax.jit(lambda p, t: fabnet.logits(CONFIG, p, t, np.full(10, 8)))
  for member, share in enumerate(shares):
    own = jax.tree.map(lambda x, m=member: x[m], params)
    found = run(own, split.tokens.astype(np.int32)).argmax(-1)
    assert float(share) == pytest.approx(np.mean(found == split.labels))


def test_a_round_keeps_the_best_and_leaves_broken_updates_out(evaluate):
  step = jax.jit(
    learn.make_round(
      learn.classify_loss(CONFIG, COMPUTE), OPTIONS, TASKS["listops"], evaluate
    )
  )
  data = {
    "train": learn.on_device(split_of(10)),
    "valid": learn.on_device(split_of(10, 1)),
  }
  # The second member's parameters are no numbers, and so are its gradients.
  broken = lambda x: x.at[1].set(jnp.nan)
  params = jax.tree.map(broken, members())
  state = learn.create_state(params, OPTIONS, SEEDS)
  before = jax.tree.map(np.asarray, state.params)
  batch = {
    "rows": learn.rows_of(0, 3, 4, 10, SEEDS),
    "rates": np.full((3, 2), 1e-3, np.float32),
    "numbers": np.arange(3),
  }
  state, metrics = step(state, batch, data)
  assert np.isfinite(metrics["loss"]) and np.isnan(metrics["losses"][1])
  for old, new, best in zip(
    *map(jax.tree.leaves, (before, state.params, state.extras["best"]))
  ):
    assert (old[0] != new[0]).any() and np.isnan(new[1]).all()
    # The first evaluation is the best so far.
    np.testing.assert_array_equal(new[0], best[0])
  moments = jax.tree.leaves(state.opt_state)
  assert all(np.isfinite(x).all() for x in moments)
  np.testing.assert_array_equal(
    state.extras["accuracy"], metrics["valid_accuracy"]
  )


@pytest.mark.parametrize("task", ["image", "pathfinder32"])
def test_augmented_images_are_the_same_but_for_place(task):
  generator = np.random.default_rng(0)
  images = np.zeros((6, 32, 32), np.uint8)
  # Four pixels from all edges, so that no shift loses any.
  images[:, 4:-4, 4:-4] = generator.integers(1, 255, (6, 24, 24))
  found = jax.jit(lambda x, key: learn.augmented(TASKS[task], x, key))(
    images.reshape(6, 1024), jax.random.key(0)
  )
  assert (np.asarray(found) != images.reshape(6, 1024)).any()
  np.testing.assert_array_equal(
    np.sort(found, axis=1), np.sort(images.reshape(6, 1024), axis=1)
  )


def test_hidden_tokens_alone_are_restored():
  loss = learn.restore_loss(CONFIG, COMPUTE, TASKS["listops"], 0.5)
  params = jax.tree.map(lambda x: x[0], members(1))
  params["embed"]["table"] = jnp.zeros((18, 8))
  split = split_of(6)
  tokens = split.tokens.astype(np.int32)
  nll, right = jax.jit(loss)(
    params, tokens, split.lengths, split.labels, jax.random.key(0)
  )
  # A table of zeros gives all 18 tokens the same chance.
  assert float(nll) == pytest.approx(np.log(18), rel=1e-5)
  assert float(right) == 0.0
