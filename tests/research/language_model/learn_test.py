import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import language_model, mamba
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.language_model import learn
from research.language_model.architectures import Model

VOCAB = 50
LENGTH = 12
CUT = 5
CONFIGS = {
  "transformer": TransformerConfig.tiny(num_layers=1),
  "mamba1": MambaConfig.tiny("mamba1", num_layers=1, vocab_size=VOCAB),
  "mamba2": MambaConfig.tiny("mamba2", num_layers=1, vocab_size=VOCAB),
  "hybrid": MambaConfig.tiny("hybrid", vocab_size=VOCAB),
  "deep": MambaConfig.tiny("mamba2", num_layers=2, vocab_size=VOCAB),
}


def batch_of(seed, rows=8):
  """Windows of two documents; the last one is padding."""
  generator = np.random.default_rng((7, seed))
  tokens = generator.integers(0, VOCAB, (rows, LENGTH + 1), dtype=np.int32)
  segments = np.tile((np.arange(LENGTH) >= CUT).astype(np.int32), (rows, 1))
  # So parts and devices do not have the same number of tokens.
  segments[-1] = -1
  return {"tokens": tokens, "segment_ids": segments}


@functools.cache
def params_of(arch):
  return Model(config=CONFIGS[arch]).init(jax.random.key(1))


@functools.cache
def compiled(arch, devices, accumulate, z_loss, options):
  """The optimizer and the update, compiled once for all tests of its kind."""
  mesh = mesh_lib.data_mesh(devices)
  schedule = optax.schedules.constant_schedule(0.3)
  tx = optax.sgd(schedule)
  step = learn.make_step(
    Model(config=CONFIGS[arch], **dict(options)),
    tx,
    schedule,
    vocab_size=VOCAB,
    accumulate=accumulate,
    z_loss=z_loss,
  )
  return tx, state_lib.jit_step(step, mesh)


def run(arch, *, steps=3, devices=1, accumulate=1, z_loss=1e-2, **options):
  """Losses, gradient norms and the parameters after some updates."""
  options = tuple(sorted(options.items()))
  tx, step = compiled(arch, devices, accumulate, z_loss, options)
  params = jax.tree.map(jnp.copy, params_of(arch))
  state = state_lib.create_state(params, tx, jax.random.key(0))
  found = []
  for _ in range(steps):
    state, metrics = step(state, batch_of(0), None)
    found.append((metrics["loss"], metrics["grad_norm"]))
  return np.asarray(found, np.float64), state.params


@functools.cache
def plain(arch):
  return run(arch)


def test_the_loss_is_the_mean_over_tokens_in_float64():
  config, params = CONFIGS["transformer"], params_of("transformer")
  batch = batch_of(0)
  sums = jax.jit(
    lambda params: learn.token_sums(Model(config=config), params, batch, VOCAB)
  )(params)
  forward = jax.jit(
    lambda tokens: language_model.forward(config, params, tokens)
  )
  nll, squares = 0.0, 0.0
  # The documents, each alone; the last row is padding.
  for part in (slice(0, CUT), slice(CUT, LENGTH)):
    logits = np.asarray(forward(batch["tokens"][:-1, :-1][:, part]), np.float64)
    logits = logits[..., :VOCAB]
    normalizer = np.log(np.exp(logits).sum(-1))
    targets = batch["tokens"][:-1, 1:][:, part, None]
    chosen = np.take_along_axis(logits, targets, -1)[..., 0]
    nll += np.sum(normalizer - chosen)
    squares += np.sum(normalizer**2)
  assert sums["tokens"] == 7 * LENGTH
  assert float(sums["nll"]) == pytest.approx(nll, rel=1e-5)
  assert float(sums["squared_normalizer"]) == pytest.approx(squares, rel=1e-5)


def test_packed_documents_of_a_hybrid_are_those_alone():
  model, params = Model(config=CONFIGS["hybrid"]), params_of("hybrid")
  batch = batch_of(0, rows=2)
  inputs = batch["tokens"][:, :-1]
  segments = np.tile(batch["segment_ids"][:1], (2, 1))
  hidden = jax.jit(model.hidden)(params, inputs, segments)
  alone = jax.jit(
    lambda tokens: mamba.hidden_states(model.config, params, tokens)
  )(inputs[:, CUT:])
  np.testing.assert_allclose(hidden[:, CUT:], alone, atol=2e-5)


def test_without_a_document_mask_the_window_is_one():
  model = Model(config=CONFIGS["transformer"], document_mask=False)
  params, batch = params_of("transformer"), batch_of(0, rows=2)
  hidden = jax.jit(model.hidden)
  inputs, segments = batch["tokens"][:, :-1], batch["segment_ids"]
  np.testing.assert_array_equal(
    hidden(params, inputs, segments), hidden(params, inputs, 0 * segments)
  )


@pytest.mark.parametrize("arch", ["transformer", "mamba1", "mamba2"])
def test_updates_lower_the_loss_on_their_batch(arch):
  losses = plain(arch)[0][:, 0]
  assert losses[0] == pytest.approx(np.log(VOCAB), abs=0.5)
  assert losses[-1] < losses[0] - 0.02
  assert (np.diff(losses) < 0).all()


@pytest.mark.parametrize(
  "arch, changes",
  [
    ("transformer", {"devices": 8}),
    ("transformer", {"accumulate": 4}),
    ("transformer", {"remat": True}),
    ("mamba2", {"devices": 2, "accumulate": 2}),
    ("deep", {"unroll": 0}),
  ],
)
def test_devices_parts_and_layout_change_nothing(arch, changes):
  one, other = run(arch, **changes), plain(arch)
  # Sums in another order, three updates long; gradients are of order 1.
  np.testing.assert_allclose(one[0], other[0], rtol=2e-5)
  chex.assert_trees_all_close(one[1], other[1], rtol=2e-5, atol=2e-6)


def test_an_update_goes_down_the_loss_and_the_normalizer_loss():
  """Each term by a gradient of its own, with its weight and its sign."""
  model, params = Model(config=CONFIGS["transformer"]), params_of("transformer")
  batch = batch_of(0)

  def of(name):
    sums = lambda p: learn.token_sums(model, p, batch, VOCAB)
    value, grads = jax.jit(jax.value_and_grad(lambda p: sums(p)[name]))(params)
    return float(value), grads

  (_, nll), (squares, normalizer) = of("nll"), of("squared_normalizer")
  _, after = run("transformer", steps=1, z_loss=0.5)
  rate = 0.3 / (7 * LENGTH)
  expected = jax.tree.map(
    lambda p, a, b: p - rate * (a + 0.5 * b), params, nll, normalizer
  )
  assert squares > 1
  chex.assert_trees_all_close(after, expected, rtol=1e-4, atol=1e-6)
  parts = [optax.tree.norm(tree) * rate for tree in (nll, normalizer)]
  assert min(parts) > 1e-3


def test_the_normalizer_loss_is_in_the_gradient_alone():
  little, much = plain("transformer")[0], run("transformer", z_loss=0.5)[0]
  assert little[0, 0] == pytest.approx(much[0, 0], rel=1e-6)
  assert abs(little[0, 1] - much[0, 1]) > 1e-3


@pytest.mark.parametrize("arch", ["transformer", "mamba2"])
def test_bfloat16_keeps_master_weights(arch):
  losses, params = run(arch, dtype="bfloat16")
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  # 8 bits of mantissa, on a loss of about log(50).
  np.testing.assert_allclose(losses[:, 0], plain(arch)[0][:, 0], rtol=2e-2)


def test_evaluations_are_means_over_all_tokens():
  model, params = Model(config=CONFIGS["transformer"]), params_of("transformer")
  batches = [batch_of(0), batch_of(1)]
  batches[1]["segment_ids"][-1] = 0
  found = [
    learn.make_evaluation(model, mesh_lib.data_mesh(devices), batches, VOCAB)(
      params
    )
    for devices in (1, 8)
  ]
  together = jax.tree.map(lambda *x: np.concatenate(x), *batches)
  sums = jax.jit(lambda batch: learn.token_sums(model, params, batch, VOCAB))(
    together
  )
  expected = float(sums["nll"]) / (15 * LENGTH)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
