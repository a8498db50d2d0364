import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from models.numbers import MISSING, P10, START, Ieee, TargetCodec

CODEC = TargetCodec(format=Ieee(special=True), num_objectives=3)


def test_objectives_stand_in_order_and_come_back():
  targets = [(1.5, -2.0, 3e4), [0.25, None, 7], (9.0,), np.array([1.0, 2.0])]
  ids = CODEC.encode(targets)
  assert ids.shape == (4, 21) and ids.dtype == np.int32
  values = CODEC.values(ids)
  nan = math.nan
  np.testing.assert_array_equal(
    values,
    [[1.5, -2.0, 3e4], [0.25, nan, 7], [9.0, nan, nan], [1.0, 2.0, nan]],
  )
  assert (ids[1, 7:14] == MISSING).all()
  names = "".join(CODEC.tokens[i] for i in ids[0, :7])
  assert names == "<+><+><0><1><5><0><0>"
  np.testing.assert_allclose(CODEC.widths(ids)[0], [1e-3, 1e-3, 10])


def test_a_number_is_a_target_of_one_objective():
  codec = TargetCodec(format=P10())
  ids = codec.encode([1.0, np.float32(2), [3.0], (None,)])
  np.testing.assert_array_equal(codec.values(ids), [[1], [2], [3], [math.nan]])


def test_the_grammar_goes_round_once_for_every_objective():
  ids = CODEC.encode([(1.5, math.nan, -0.0), (math.inf, 2.0, 1e-12)])
  assert CODEC.grammar.accepts(ids).all()
  assert not CODEC.grammar.accepts(ids[:, :-1]).any()
  assert not CODEC.grammar.allowed[:, [START, MISSING]].any()
  assert not CODEC.grammar.accepts(CODEC.encode([(1.5, None, 2.0)]))


def test_the_table_runs_on_the_device():
  """A uniform draw over the table, in one scan, gives whole numbers."""
  table = jnp.asarray(CODEC.grammar.next_state)

  def step(state, key):
    logits = jnp.where(table[state] >= 0, 0.0, -jnp.inf)
    token = jax.random.categorical(key, logits)
    return table[state, token], token

  def draw(key):
    return jax.lax.scan(step, 0, jax.random.split(key, CODEC.length))[1]

  ids = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 300))
  assert CODEC.grammar.accepts(np.asarray(ids)).all()
  values = CODEC.values(ids)
  finite = values[np.isfinite(values)]
  assert len(finite) > 100 and np.isnan(values).any()
  again = CODEC.encode(
    [tuple(row) for row in values[np.isfinite(values).all(1)]]
  )
  np.testing.assert_array_equal(
    CODEC.values(again), values[np.isfinite(values).all(1)]
  )


def test_mistakes_name_the_example():
  with pytest.raises(InputError, match="example 1: a target has 4 objectives"):
    CODEC.encode([(1, 2, 3), (1, 2, 3, 4)])
  with pytest.raises(InputError, match="example 2: target 'x' is no number"):
    CODEC.encode([1.0, 2.0, "x"])
  with pytest.raises(InputError, match="num_objectives"):
    TargetCodec(format=Ieee(), num_objectives=0)
