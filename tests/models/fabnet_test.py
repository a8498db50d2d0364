"""FABNet's blocks: padding, order, switches, positions, files, bad configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import fabnet
from models.errors import InputError
from models.fabnet import Compute
from models.fabnet_config import FABNetConfig

TINY = FABNetConfig.tiny()
CONFIGS = {
  "fabnet": TINY,
  "tied": FABNetConfig.tiny(tied_butterflies=True, fourier_norm=True),
  "released": FABNetConfig.tiny().released(),
  "mamba": FABNetConfig.tiny(
    fourier_layers=0, attention_layers=0, mamba_layers=2, ffn="dense"
  ),
  "rotary": FABNetConfig.tiny(
    fourier_layers=0,
    attention_layers=2,
    ffn="monarch",
    projections="low_rank",
    rank=2,
    positions="rotary",
    pool="cls",
  ),
  "pairs": FABNetConfig.tiny(
    ffn="block_diagonal", projections="dense", blocks=2, pairs=True
  ),
}
LENGTHS = np.array([9, 16, 1], np.int32)


def drawn(config):
  """Parameters by NumPy, which compiles nothing."""
  generator = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(generator.normal(0, 0.5, x.shape), x.dtype)
  return jax.tree.map(draw, fabnet.abstract_params(config))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
  config = CONFIGS[request.param]
  params = drawn(config)
  run = jax.jit(lambda *a: fabnet.logits(config, params, *a))
  return config, params, run


def tokens_of(config, seed=0):
  generator = np.random.default_rng(seed)
  shape = (3, 2, 16) if config.pairs else (3, 16)
  tokens = generator.integers(1, 17, shape).astype(np.int32)
  lengths = np.stack([LENGTHS, LENGTHS[::-1]], 1) if config.pairs else LENGTHS
  there = np.arange(16) < lengths[..., None]
  return np.where(there, tokens, 0), lengths, there


def test_padding_is_seen_by_nobody_unless_the_released_code_is_asked(model):
  config, _, run = model
  tokens, lengths, there = tokens_of(config)
  scores = run(tokens, lengths)
  assert scores.shape == (3, 10) and jnp.isfinite(scores).all()
  other = run(np.where(there, tokens, 5), lengths)
  if config.mask_padding:
    np.testing.assert_array_equal(scores, other)
  else:
    assert abs(scores - other).max() > 1e-4


def test_every_token_is_seen(model):
  """The last one too, where a token in front moves all by a place."""
  config, _, run = model
  tokens, lengths, there = tokens_of(config)
  last = np.arange(16) == lengths[..., None] - 1
  changed = abs(
    run(tokens, lengths) - run(np.where(last, 18 - tokens, tokens), lengths)
  )
  # Of a sequence that fills the model's length it is lost behind a `cls`.
  short = (
    lengths.reshape(3, -1).max(1) < 16 if config.pool == "cls" else 3 * [True]
  )
  assert np.all(changed.max(1)[np.array(short)] > 0)


def test_parameters_have_the_names_and_number_that_abstract_ones_have(model):
  config, params, _ = model
  assert fabnet.num_params(config) == sum(
    x.size for x in jax.tree.leaves(params)
  )
  kinds = dict(config.runs)
  assert set(params) & {"fourier", "mamba", "attention"} == set(kinds)


def test_a_saved_model_is_the_same_bit_for_bit(model, tmp_path):
  config, params, run = model
  fabnet.save(tmp_path / "model", config, params)
  found, read = fabnet.load(tmp_path / "model")
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, read, params)
  with pytest.raises(FileExistsError):
    fabnet.save(tmp_path / "model", config, params)
  path = tmp_path / "model" / "config.json"
  path.write_text(path.read_text().replace('"d_ff": 16', '"d_ff": 0'))
  with pytest.raises(InputError, match="d_ff=0 is no positive integer"):
    fabnet.load(tmp_path / "model")


def test_an_fbfly_block_is_what_the_paper_says():
  config = FABNetConfig.tiny(attention_layers=0)
  params = jax.jit(lambda key: fabnet.init(config, key))(jax.random.key(1))
  shapes = jax.tree.map(jnp.shape, fabnet.abstract_params(config))
  assert jax.tree.map(jnp.shape, params) == shapes
  tokens = np.random.default_rng(1).integers(1, 17, (2, 16))
  x = np.asarray(params["embed"]["table"], np.float64)[tokens]
  x = x + np.asarray(params["positions"], np.float64)
  block = jax.tree.map(
    lambda p: np.asarray(p[0], np.float64), params["fourier"]
  )

  def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]

  def butterfly(x, p, features):
    # Stage by stage on pairs of channels, a value at a time.
    stacks = []
    for twiddle in p["twiddle"][:, 0]:
      y = x.copy()
      if y.shape[-1] < 2 * twiddle.shape[1]:
        y = np.pad(y, ((0, 0), (0, 0), (0, 2 * twiddle.shape[1] - y.shape[-1])))
      for stage, pairs in enumerate(twiddle):
        s = 2**stage
        for pair, t in enumerate(pairs):
          a = 2 * s * (pair // s) + pair % s
          y[..., [a, a + s]] = y[..., [a, a + s]] @ t.T
      stacks.append(y)
    return np.concatenate(stacks, -1)[..., :features] + p["bias"]

  x = x + np.fft.fft2(norm(x, block["mixer_norm"])).real
  up = butterfly(norm(x, block["ffn_norm"]), block["ffn"]["up"], 16)
  middle = np.asarray(jax.nn.gelu(jnp.asarray(up, jnp.float32)), np.float64)
  x = x + butterfly(middle, block["ffn"]["down"], 8)
  wanted = norm(x, jax.tree.map(np.asarray, params["final_norm"]))
  found = fabnet.hidden(config, params, tokens, np.full(2, 16))
  np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_order_and_switches():
  config = FABNetConfig.tiny(fourier_layers=3, attention_layers=2)
  assert config.runs == (("fourier", 3), ("attention", 2))
  released = config.released()
  assert released.runs == (("attention", 2), ("fourier", 3))
  assert released.ffn_of("attention") == released.projections == "dense"
  assert released.ffn_of("fourier") == "butterfly"
  assert not released.mask_padding and not released.fourier_norm
  params = fabnet.abstract_params(config)
  attention = params["attention"]
  twiddles = [attention["mixer"][f"{name}_proj"] for name in "qkvo"]
  twiddles += [attention["ffn"]["up"], attention["ffn"]["down"]]
  assert all(set(part) == {"twiddle", "bias"} for part in twiddles)
  assert "mixer" not in params["fourier"]


def test_dropout_drops_only_by_a_key():
  tokens, lengths, _ = tokens_of(TINY)
  params = drawn(TINY)
  run = jax.jit(
    lambda key: fabnet.logits(
      TINY, params, tokens, lengths, compute=Compute(dropout=0.5), key=key
    )
  )
  first, second = run(jax.random.key(0)), run(jax.random.key(1))
  assert abs(first - second).max() > 1e-4
  np.testing.assert_array_equal(first, run(jax.random.key(0)))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"d_model": 0}, "d_model=0 is no positive integer"),
    ({"fourier_layers": -1}, "fourier_layers=-1 is no integer from 0"),
    ({"fourier_layers": 0, "attention_layers": 0}, "has from 1 to 4096"),
    ({"ffn": "sparse"}, "ffn='sparse' is unknown: take one of"),
    ({"num_heads": 3}, "num_heads=3 does not divide d_model=8"),
    ({"positions": "rotary", "num_heads": 8}, "rotary positions need pairs"),
    ({"ffn": "low_rank"}, "rank is missing: low_rank matrices need it"),
    ({"rank": 2}, "rank=2 is of low_rank, and no matrix"),
    ({"ffn": "block_diagonal", "blocks": 3}, "blocks=3 does not divide"),
    ({"mask_padding": 1}, "mask_padding=1 is neither true nor false"),
    ({"mamba_layers": 1, "mamba_head_dim": 5}, "mamba_head_dim=5 does not"),
  ],
)
def test_a_config_that_does_not_do_is_one_line(changes, message):
  with pytest.raises(InputError, match=message):
    FABNetConfig.tiny(**changes)


def test_longer_sequences_than_the_model_has_are_refused():
  params = fabnet.abstract_params(TINY)
  tokens = jax.ShapeDtypeStruct((1, 17), np.int32)
  lengths = jax.ShapeDtypeStruct((1,), np.int32)
  with pytest.raises(InputError, match="of 17 tokens are longer"):
    jax.eval_shape(
      lambda *a: fabnet.logits(dataclasses.replace(TINY), *a),
      params,
      tokens,
      lengths,
    )
