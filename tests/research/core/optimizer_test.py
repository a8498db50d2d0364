import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import contrib

from models import mamba, transformer
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.core import optimizer
from research.core.options import SCHEDULES


def rates(schedule, steps=100, warmup=10, final=0.1, decay=0.2):
  found = optimizer.learning_rate(
    schedule,
    2.0,
    steps,
    warmup_steps=warmup,
    final_share=final,
    decay_share=decay,
  )
  return np.asarray(jax.vmap(found)(jnp.arange(steps + 1)), np.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_loses_no_update(schedule):
  np.testing.assert_allclose(
    rates(schedule)[:10], 0.2 * np.arange(1, 11), rtol=1e-6
  )


def test_cosine_falls_to_its_end():
  step = np.arange(10, 101)
  share = 0.5 * (1 + np.cos(np.pi * (step - 10) / 90))
  np.testing.assert_allclose(
    rates("cosine")[10:], 2 * (0.1 + 0.9 * share), rtol=1e-5
  )


def test_wsd_holds_and_falls_linearly():
  found = rates("wsd")
  np.testing.assert_allclose(found[10:81], 2.0, rtol=1e-6)
  np.testing.assert_allclose(found[80:], np.linspace(2.0, 0.2, 21), rtol=1e-5)


def test_constant_holds():
  np.testing.assert_allclose(rates("constant")[10:], 2.0, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 500])
def test_any_warmup_does(schedule, warmup):
  found = rates(schedule, warmup=warmup)
  assert np.isfinite(found).all() and (found >= 0).all()
  assert found.max() <= 2.0 + 1e-6
  assert (found[:100] > 0).all()


def test_an_unknown_schedule_is_told():
  with pytest.raises(ValueError, match="cosine"):
    rates("linear")


def names(params, wanted):
  mask = jax.tree_util.tree_leaves_with_path(optimizer.decayed(params))
  return {
    jax.tree_util.keystr(path, simple=True, separator=".").rsplit("layers.")[-1]
    for path, decays in mask
    if decays == wanted
  }


def test_matrices_of_a_transformer_decay():
  config = TransformerConfig.tiny(
    qkv_bias=True, qk_norm=True, tie_embeddings=False
  )
  params = transformer.abstract_params(config)
  assert names(params, True) == {
    "embed.table",
    "lm_head.kernel",
    *(f"attn.{name}_proj.kernel" for name in "qkvo"),
    *(f"mlp.{name}_proj.kernel" for name in ("gate", "up", "down")),
  }
  assert names(params, False) == {
    "final_norm.scale",
    "attn_norm.scale",
    "mlp_norm.scale",
    "attn.q_norm.scale",
    "attn.k_norm.scale",
    *(f"attn.{name}_proj.bias" for name in "qkv"),
  }


@pytest.mark.parametrize(
  "kind, more, norms",
  [("mamba1", ("x_proj", "dt_proj"), ()), ("mamba2", (), ("norm.scale",))],
)
def test_matrices_of_mamba_decay(kind, more, norms):
  params = mamba.abstract_params(MambaConfig.tiny(kind))
  matrices = ("in_proj", "out_proj", *more)
  assert names(params, True) == {
    "embed.table",
    "0.mixer.conv.weight",
    *(f"0.mixer.{name}.kernel" for name in matrices),
  }
  left = ("conv.bias", "A_log", "D", "dt_bias", *norms)
  assert names(params, False) == {
    "final_norm.scale",
    "0.norm.scale",
    *(f"0.mixer.{name}" for name in left),
  }


def adamw(**changes):
  settings = {
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
  }
  rate = lambda step: 0.01
  return optimizer.adamw(rate, **(settings | changes))


def test_an_update_is_that_of_adamw():
  params = {"kernel": jnp.array([[2.0, -3.0]]), "bias": jnp.array([4.0])}
  grads = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])}
  tx = adamw()
  updates, _ = tx.update(grads, tx.init(params), params)
  # The first step's moments are the gradient's own, and its size divides out.
  np.testing.assert_allclose(
    updates["kernel"], [[-0.01 - 0.01 * 0.1 * 2, 0.01 * 0.1 * 3]], rtol=1e-5
  )
  np.testing.assert_allclose(updates["bias"], [-0.01], rtol=1e-5)


def test_the_gradient_is_clipped_as_a_whole():
  params = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)}
  grads = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])}

  def moment(clip_norm):
    tx = adamw(clip_norm=clip_norm)
    state = tx.update(grads, tx.init(params), params)[1]
    leaves = jax.tree.leaves(state)
    return sorted(float(x.max()) for x in leaves if x.dtype == jnp.float32)

  np.testing.assert_allclose(moment(1.0)[-2:], [0.06, 0.08], rtol=1e-5)
  np.testing.assert_allclose(moment(0.0)[-1], 0.8, rtol=1e-5)


def test_muon_of_matrices_together_is_muon_of_each():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    "down": {"kernel": draw(3, 6, 4)},
    "norm": {"scale": draw(3, 4)},
    "q": {"kernel": draw(3, 4, 6)},
    "table": draw(5, 4),
    "up": {"kernel": draw(2, 4, 6)},
  }
  rate = lambda step: 0.01
  together = optimizer.muon(
    rate, adam_beta2=0.98, weight_decay=0.1, clip_norm=0.0
  )
  one = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
  alone = contrib.muon(
    rate,
    weight_decay=0.1,
    weight_decay_mask=optimizer.decayed,
    adam_b2=0.98,
    muon_weight_dimension_numbers=jax.tree.map(
      lambda leaf: one if leaf.ndim == 3 else None, params
    ),
    consistent_rms=0.2,
  )
  states = [tx.init(params) for tx in (together, alone)]
  for _ in range(2):
    grads = jax.tree.map(lambda leaf: draw(*leaf.shape), params)
    found, states[0] = together.update(grads, states[0], params)
    wanted, states[1] = alone.update(grads, states[1], params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
      found,
      wanted,
    )
