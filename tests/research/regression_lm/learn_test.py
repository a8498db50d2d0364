import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import regression_lm
from models.errors import InputError
from models.numbers import MISSING, Ieee, TargetCodec
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.regression_lm import expected, learn, likelihood, sampling
from research.regression_lm.expected import Scale
from research.regression_lm.options import LossOptions
from tests.research.regression_lm import toy

CODEC = TargetCodec(format=Ieee(base=2, mantissa_digits=2), num_objectives=2)
ALL = LossOptions(z_loss=0.1, expected_value=0.5, ranking=0.3)


@functools.cache
def set_up():
  model = toy.model(CODEC)
  tokens, lengths = toy.texts(8)
  targets = toy.targets(CODEC, 8)
  width = CODEC.format.length
  targets[1, :width] = MISSING
  targets[2, width:] = MISSING
  targets[3] = MISSING
  values = CODEC.values(targets)
  scale = Scale.fit("value", values)
  batch = {
    "tokens": tokens,
    "lengths": lengths,
    "targets": targets,
    "scores": scale.scores(values),
  }
  return model, toy.params(model), batch, scale


@functools.cache
def objective_of_all():
  """The objective of all terms over the examples, its sums and gradients."""
  model, params, batch, scale = set_up()
  grid = scale.grid(CODEC, 4)
  run = jax.jit(
    jax.value_and_grad(
      lambda p: learn.loss_sums(model, p, batch, ALL, grid), has_aux=True
    )
  )
  (objective, sums), grads = run(params)
  return objective, sums, grads


def test_the_loss_is_the_mean_over_what_is_there():
  model, params, batch, _ = set_up()
  _, sums = jax.jit(lambda p: learn.loss_sums(model, p, batch, LossOptions()))(
    params
  )
  parts = sampling.score(
    model, params, batch["tokens"], batch["lengths"], batch["targets"][:, None]
  )[:, 0]
  count = (batch["targets"] != MISSING).sum(-1)
  total = -np.asarray(parts).sum(-1)
  assert (np.asarray(parts)[[1, 2, 3, 3], [0, 1, 0, 1]] == 0).all()
  there = count > 0
  assert sums["examples"] == there.sum() == 7
  np.testing.assert_allclose(sums["nll"], total.sum(), rtol=1e-5)
  np.testing.assert_allclose(
    sums["loss"], (total[there] / count[there]).sum(), rtol=1e-5
  )


def test_the_objective_is_its_terms_with_their_weights():
  model, params, batch, scale = set_up()
  grid = scale.grid(CODEC, 4)
  objective, sums, _ = objective_of_all()
  targets = batch["targets"]

  @jax.jit
  def parts(params):
    memory = regression_lm.encode(
      model.config, params, batch["tokens"], batch["lengths"]
    )
    _, normalizer = likelihood.token_logprobs(
      model, params, memory, targets[:, None]
    )
    means = expected.scores(model, params, memory, targets, grid)
    return (
      normalizer,
      expected.squared_error(means, batch["scores"]),
      expected.ranking_loss(means, batch["scores"]),
    )

  normalizer, squared_error, ranking = parts(params)
  squares = np.square(np.asarray(normalizer, np.float64))[:, 0].sum(-1)
  count = (targets != MISSING).sum(-1)
  squares = (squares / np.maximum(count, 1)).sum()
  terms = {
    "loss": (1.0, float(sums["loss"])),
    "squared_normalizer": (0.1, squares),
    "squared_error": (0.5, float(squared_error)),
    "ranking": (0.3, float(ranking)),
  }
  for name, (_, value) in terms.items():
    assert float(sums[name]) == pytest.approx(value, rel=1e-4), name
    assert value > 0.1, name
  total = sum(weight * value for weight, value in terms.values())
  assert float(objective) == pytest.approx(total, rel=1e-5)


def test_an_update_goes_down_the_objective():
  """Plain descent by the gradient of all terms, over the examples."""
  _, params, _, _ = set_up()
  _, _, grads = objective_of_all()
  _, state = run(ONE, ALL, steps=1)
  jax.tree.map(
    lambda p, g, after: np.testing.assert_allclose(
      after, np.asarray(p) - 0.05 * np.asarray(g) / 7, rtol=1e-4, atol=1e-6
    ),
    params,
    grads,
    state.params,
  )


def test_gradients_are_finite_and_blind_to_what_is_forbidden():
  _, _, grads = objective_of_all()
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
  head = np.asarray(grads["head"]["kernel"])
  assert (head[:, : MISSING + 1] == 0).all() and np.abs(head[:, 2:]).min() > 0


ONE = {"data": 1}


def run(shape, options, steps=3, rate=0.05):
  model, params, batch, scale = set_up()
  mesh = mesh_lib.make(shape)
  schedule = optax.schedules.constant_schedule(rate)
  tx = optax.sgd(schedule)
  frozen = {"grid": scale.grid(CODEC, 4)} if options.needs_grid else None
  step = state_lib.jit_step(learn.make_step(model, tx, schedule, options), mesh)
  state = state_lib.create_state(
    jax.tree.map(jnp.copy, params), tx, jax.random.key(0)
  )
  history = []
  for _ in range(steps):
    state, metrics = step(state, batch, frozen)
    history.append({k: float(v) for k, v in metrics.items()})
  return history, state


def test_one_device_and_many_give_the_same():
  one, one_state = run(ONE, LossOptions(z_loss=0.1))
  shape = {"data": 2, "fsdp": 2, "tensor": 2}
  many, many_state = run(shape, LossOptions(z_loss=0.1))
  for a, b in zip(one, many):
    for name in ("loss", "nll", "grad_norm"):
      assert a[name] == pytest.approx(b[name], rel=1e-4), name
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    one_state.params,
    many_state.params,
  )
  assert one[-1]["loss"] < one[0]["loss"]


def test_dropout_differs_by_step_and_not_in_a_second_run():
  frozen_rate = {"rate": 0.0, "steps": 2}
  first, _ = run(ONE, LossOptions(dropout=0.3), **frozen_rate)
  again, _ = run(ONE, LossOptions(dropout=0.3), **frozen_rate)
  assert first == again
  assert first[0]["loss"] != first[1]["loss"]


def test_evaluation_adds_up_batches():
  model, params, batch, _ = set_up()
  mesh = mesh_lib.data_mesh(1)
  halves = [
    {name: x[part] for name, x in batch.items()}
    for part in (slice(0, 3), slice(3, 8))
  ]
  whole = learn.make_evaluation(model, mesh, [batch])(params)
  parts = learn.make_evaluation(model, mesh, halves)(params)
  assert parts == pytest.approx(whole, rel=1e-5)


def test_the_expected_value_is_that_of_the_exact_distribution():
  """With every number on the grid it is the mean of the distribution."""
  codec = TargetCodec(format=Ieee(base=2, mantissa_digits=2))
  model = toy.model(codec)
  params = toy.params(model)
  tokens, lengths = toy.texts(3)
  rows = toy.support(codec)
  values = codec.values(rows)
  scale = Scale.fit("value", values)
  grid = scale.grid(codec, 50)
  # Zero is written in several ways, all of which a grid holds.
  assert np.isfinite(grid.scores).sum() == len(values) > len(np.unique(values))
  targets = np.full((3, codec.length), MISSING, np.int32)

  @jax.jit
  def means(params):
    memory = regression_lm.encode(model.config, params, tokens, lengths)
    return expected.scores(model, params, memory, targets, grid)

  found = means(params)
  repeated = np.broadcast_to(rows, (3, *rows.shape))
  logprob = sampling.score(model, params, tokens, lengths, repeated).sum(-1)
  chances = np.exp(np.asarray(logprob, np.float64))
  chances /= chances.sum(1, keepdims=True)
  exact = chances @ scale.scores(values)[:, 0]
  np.testing.assert_allclose(found[:, 0], exact, atol=1e-5)


def test_later_objectives_of_a_grid_are_given_the_earlier():
  model, params, batch, scale = set_up()
  grid = scale.grid(CODEC, 4)

  @jax.jit
  def over_grid(params):
    memory = regression_lm.encode(
      model.config, params, batch["tokens"], batch["lengths"]
    )
    return expected.grid_logprobs(model, params, memory, batch["targets"], grid)

  logprobs = np.asarray(over_grid(params))
  assert logprobs.shape == (8, 2, 4)
  width = CODEC.format.length
  for g in range(4):
    rows = np.array(batch["targets"])
    rows[:, width:] = grid.ids[1, g]
    parts = sampling.score(
      model, params, batch["tokens"], batch["lengths"], rows[:, None]
    )
    parts = np.asarray(parts)
    np.testing.assert_allclose(logprobs[:, 1, g], parts[:, 0, 1], atol=1e-4)


def test_scales_map_to_standard_values_and_to_ranks():
  values = np.array([[1.0], [2.0], [2.0], [5.0], [np.nan], [np.inf]])
  standard = Scale.fit("value", values).scores(values)[:, 0]
  np.testing.assert_allclose(standard[:4].mean(), 0, atol=1e-6)
  np.testing.assert_allclose(standard[:4].std(), 1, rtol=1e-6)
  assert np.isnan(standard[4:]).all()
  ranks = Scale.fit("rank", values).scores(values)[:, 0]
  np.testing.assert_allclose(ranks[:4], [0.125, 0.5, 0.5, 0.875])
  for kind in ("value", "rank"):
    fitted = Scale.fit(kind, values)
    back = fitted.values(fitted.scores(values[:4]))
    np.testing.assert_allclose(back, values[:4], rtol=1e-6)
  with pytest.raises(InputError, match="scale 'log'"):
    Scale.fit("log", values)
  with pytest.raises(InputError, match="objective 0 has no finite"):
    Scale.fit("rank", values[4:])


def test_losses_of_expected_values_by_hand():
  means = jnp.array([[0.0], [1.0], [3.0]])
  truth = jnp.array([[2.0], [1.0], [jnp.nan]])
  assert expected.squared_error(means, truth) == 4.0
  # One pair, 0 above 1, and the mean says the other way by 1.
  loss = expected.ranking_loss(means, truth)
  assert loss == pytest.approx(3 * np.log1p(np.e), rel=1e-6)
