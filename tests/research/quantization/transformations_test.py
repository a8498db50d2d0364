"""What leaves a model's function as it is, and what it changes inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.errors import InputError
from research.quantization import (
  calibration,
  reordering,
  rotation,
  smoothing,
  structure,
)
from tests.research.quantization.conftest import (
  GEMMA,
  difference,
  logits,
  random_model,
)

# Sums of some dozen float32 numbers in another order, layer after layer.
SAME = 2e-5


def test_a_layer_by_itself_gives_what_the_model_does(model, batches):
  config, params = model
  stream = language_model.before_layers(config, params, batches[0])
  for layer in language_model.layers_of(config):
    stack = structure.at(params, layer.stack)
    own = jax.tree.map(lambda a, i=layer.index: a[i], stack)
    stream = language_model.layer(config, own, layer.kind, stream)
  hidden = language_model.after_layers(config, params, stream)
  found = language_model.logits(config, params, hidden)
  assert difference(found, logits(config, params, batches[0])) < SAME


def test_folded_norms_and_rotated_streams(model, batches):
  config, params = model
  wanted = logits(config, params, batches[0])
  config, params = rotation.fold_norms(config, params)
  assert not config.tie_embeddings
  assert (params["final_norm"]["scale"] == 1).all()
  turn = rotation.hadamard(config.d_model)
  turned = rotation.rotate_stream(config, params, turn)
  turned = rotation.rotate_inputs(config, turned)
  assert difference(logits(config, turned, batches[0]), wanted) < SAME
  table = params["embed"]["table"]
  assert difference(turned["embed"]["table"] @ turn.T, table) < 1e-5


def test_a_rotation_spreads_an_outlier(mamba2, batches):
  config, params = rotation.fold_norms(*mamba2)
  table = params["embed"]["table"].at[:, 3].set(2.0)
  params = params | {"embed": {"table": table}}

  def ratio(params):
    notes, _ = calibration.calibrate(config, params, batches)
    absmax = notes[0]["mixer.in_proj"].absmax
    return float(absmax.max() / jnp.median(absmax))

  turned = rotation.rotate_stream(
    config, params, rotation.hadamard(config.d_model)
  )
  assert ratio(params) > 10
  assert ratio(turned) < 3


def test_eigenvectors_make_channels_uncorrelated():
  x = np.random.default_rng(0).normal(size=(100, 6)) @ np.diag(range(1, 7))
  turn = rotation.principal(jnp.asarray(x.T @ x, jnp.float32))
  turned = np.asarray(x @ turn)
  gram = turned.T @ turned
  diagonal = np.diag(gram)
  assert np.abs(gram - np.diag(diagonal)).max() < 1e-3 * diagonal.max()
  assert (np.diff(diagonal) < 0).all()


def test_norms_that_do_not_commute_with_a_rotation_are_one_line():
  params = language_model.abstract_params(GEMMA)
  with pytest.raises(InputError, match="take a recipe without one"):
    rotation.fold_norms(GEMMA, params)


def test_smoothed_keys_pass_through_norms_and_windows(batches):
  config, params = random_model("gemma")
  notes, _ = calibration.calibrate(config, params, batches[:1])
  smooth = smoothing.smooth_keys(config, params, notes)
  expected = logits(config, params, batches[0])
  assert difference(logits(config, smooth, batches[0]), expected) < SAME


def test_a_width_without_a_hadamard_matrix_is_one_line():
  with pytest.raises(InputError, match="without rotations"):
    rotation.hadamard(7)


def test_smoothing_moves_outliers_into_weights(model, batches):
  config, params = model
  wanted = logits(config, params, batches[0])
  planted = smoothing.plant_outliers(config, params, factor=100.0, count=1)
  assert difference(logits(config, planted, batches[0]), wanted) < SAME
  notes, _ = calibration.calibrate(config, planted, batches)
  smooth = smoothing.smooth(config, planted, notes, 0.8)
  assert difference(logits(config, smooth, batches[0]), wanted) < SAME
  after, _ = calibration.calibrate(config, smooth, batches)
  first = language_model.layers_of(config)[0]
  (_, kernels), *_ = structure.readers(structure.at(params, first.stack))
  name = ".".join(kernels[0])
  ratio = lambda seen: float(
    seen[name].absmax.max() / jnp.median(seen[name].absmax)
  )
  assert ratio(notes[0]) > 20
  assert ratio(after[0]) < ratio(notes[0]) / 5


def test_any_order_of_heads_and_channels_is_the_same_model(mamba2, batches):
  config, params = mamba2
  generator = np.random.default_rng(0)
  per = config.num_heads // config.num_groups
  heads = np.concatenate(
    [g * per + generator.permutation(per) for g in range(config.num_groups)]
  )
  channels = np.concatenate(
    [h * config.head_dim + generator.permutation(config.head_dim)
     for h in heads]
  )  # fmt: skip
  other = structure.each_layer(
    config,
    params,
    lambda _, own: reordering.rearranged(config, own, heads, channels),
  )
  assert (
    difference(*(logits(config, p, batches[0]) for p in (other, params))) < SAME
  )


def test_heads_and_channels_alike_share_a_cluster():
  generator = np.random.default_rng(0)
  # Two kinds of heads, each with two sizes of channels, in any order.
  kinds = np.array([[1.0, 1, 1, 8], [4, 4, 9, 9]])
  of_head = np.array([0, 1, 1, 0, 1, 0])
  absmax = generator.permuted(kinds[of_head], axis=1)
  absmax = absmax * generator.uniform(0.95, 1.05, absmax.shape)
  heads, ranks = reordering.clusters(absmax, 1, 2, 2)
  np.testing.assert_array_equal(heads, of_head)
  np.testing.assert_array_equal(ranks[of_head == 0], [[0, 0, 0, 1]] * 3)
  np.testing.assert_array_equal(ranks[of_head == 1], [[0, 0, 1, 1]] * 3)
  scales = reordering.cluster_scales(absmax, heads, ranks)
  assert (scales >= absmax).all() and (scales < 1.12 * absmax).all()
  assert len(np.unique(scales)) == 4
