"""Hidden states against transformers, made by `golden/generate_t5gemma.py`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import regression_lm, t5gemma
from models.convert import t5gemma as convert
from models.errors import InputError
from models.regression_lm import Compute
from models.regression_lm_config import RegressionLMConfig
from tests.models.t5gemma_checkpoint import write

_NAMES = ("t5gemma", "t5gemma2")
_TOLERANCE = 1e-4


def run(checkpoint, tokens, lengths, **options):
  encoder = t5gemma.Encoder.bind(checkpoint.config, checkpoint.params())
  mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
  return encoder(jnp.asarray(tokens), mask, **options)


def error(found, expected, lengths):
  """Relative, over what is no padding."""
  there = np.arange(found.shape[1])[None] < lengths[:, None]
  difference = np.asarray(found, np.float64) - expected
  return np.linalg.norm(difference[there]) / np.linalg.norm(expected[there])


@pytest.mark.parametrize("name", _NAMES)
def test_hidden_states_agree(name, tmp_path):
  tokens, lengths, hidden = write(name, tmp_path)
  checkpoint = convert.open_encoder(tmp_path)
  # Longer than the window, and padded.
  assert lengths[0] > 2 * checkpoint.config.behind and lengths[-1] == 3
  assert error(run(checkpoint, tokens, lengths), hidden, lengths) <= _TOLERANCE


@pytest.mark.parametrize("name", _NAMES)
def test_queries_in_parts_and_remat_agree(name, tmp_path, monkeypatch):
  tokens, lengths, hidden = write(name, tmp_path)
  # 29 tokens: the last part is not full.
  monkeypatch.setattr(t5gemma, "_QUERIES", 8)
  found = run(convert.open_encoder(tmp_path), tokens, lengths, remat=True)
  assert error(found, hidden, lengths) <= _TOLERANCE


@pytest.mark.parametrize(
  "prefix", ["encoder.", "encoder.text_model.", "model.encoder.text_model."]
)
def test_other_names_of_the_same_tensors(prefix, tmp_path):
  old = "model.encoder."

  def rename(name):
    """An encoder alone has no decoder."""
    is_encoder = name.startswith(old) and "vision" not in name
    return prefix + name.removeprefix(old) if is_encoder else None

  tokens, lengths, hidden = write("t5gemma", tmp_path, rename)
  found = run(convert.open_encoder(tmp_path), tokens, lengths)
  assert error(found, hidden, lengths) <= _TOLERANCE


def test_keys_of_transformers_4_say_the_same(tmp_path):
  (tmp_path / "old").mkdir()
  (tmp_path / "new").mkdir()
  write("t5gemma", tmp_path / "new")
  write("t5gemma", tmp_path / "old", drop=["layer_types", "rope_theta"])
  new, old = (convert.open_encoder(tmp_path / n).config for n in ("new", "old"))
  assert new == old and new.sliding == (True, False) * 2
  write("t5gemma2", tmp_path / "new")
  write(
    "t5gemma2",
    tmp_path / "old",
    drop=["rope_parameters"],
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    rope_scaling={"rope_type": "linear", "factor": 8.0},
  )
  new, old = (convert.open_encoder(tmp_path / n).config for n in ("new", "old"))
  assert new == old and new.rope_factor == 8
  assert (new.behind, new.ahead) == (2, 3)


@pytest.mark.parametrize(
  "name, changes, words",
  [
    ("t5gemma", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
    ("t5gemma", {"attention_bias": True}, "attention_bias=True"),
    ("t5gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("t5gemma", {"layer_types": ["chunked_attention"] * 4}, "chunked"),
    ("t5gemma", {"layer_types": ["full_attention"]}, "does not name 4"),
    ("t5gemma", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
    ("t5gemma", {"sliding_window": 0}, "sliding_window=0"),
    ("t5gemma", {"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    ("t5gemma", {"head_dim": 7}, "head_dim=7 is odd"),
    ("t5gemma", {"hidden_size": "wide"}, "d_model='wide'"),
    ("t5gemma", {"rms_norm_eps": None}, "rms_norm_eps is missing"),
    ("t5gemma", {"query_pre_attn_scalar": 0}, "query_scalar=0"),
    ("t5gemma", {"intermediate_size": 40}, "has shape (24, 32)"),
    ("t5gemma", {"num_hidden_layers": 5, "layer_types": None}, "is missing"),
    ("t5gemma", {"num_hidden_layers": 3, "layer_types": None}, "is unknown"),
  ],
)
def test_what_does_not_do_is_one_line(name, changes, words, tmp_path):
  write(name, tmp_path, **changes)
  with pytest.raises(InputError) as caught:
    convert.open_encoder(tmp_path).params()
  assert words in str(caught.value) and "\n" not in str(caught.value)
  assert str(tmp_path) in str(caught.value)


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
  write("t5gemma", tmp_path)
  monkeypatch.setattr(convert.hub, "download", {"a/b": tmp_path}.get)
  found = convert.open_encoder("a/b")
  assert found.folder == tmp_path and found.config.d_model == 24


def test_other_folders_are_refused(tmp_path):
  with pytest.raises(InputError, match="is no folder"):
    convert.open_encoder(tmp_path / "none")
  with pytest.raises(InputError, match="config.json: is missing"):
    convert.open_encoder(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(InputError, match="model_type 'llama'"):
    convert.open_encoder(tmp_path)
  (tmp_path / "config.json").write_text('{"model_type": "t5gemma2"}')
  with pytest.raises(InputError, match="encoder is missing"):
    convert.open_encoder(tmp_path)


def decoder_on(checkpoint, **changes):
  options = {"target_vocab_size": 14, "target_length": 7, **changes}
  return RegressionLMConfig.on_t5gemma(checkpoint.config, "tiny", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_of_another_width_reads_the_encoder(dtype, tmp_path):
  tokens, lengths, _ = write("t5gemma", tmp_path)
  checkpoint = convert.open_encoder(tmp_path)
  config = decoder_on(checkpoint)
  assert (config.d_model, config.text_width) == (16, 24)
  params = regression_lm.init(config, jax.random.key(0))
  params["encoder"] = checkpoint.params()
  compute = Compute(dtype=dtype)

  @jax.jit
  def logits(tokens, lengths, targets):
    memory = regression_lm.encode(
      config, params, tokens, lengths, compute=compute
    )
    return regression_lm.logits(
      config, params, memory, targets, compute=compute
    )

  targets = np.ones((len(tokens), 2, 7), np.int32)
  together = logits(tokens, lengths, targets)
  # A row is what it is alone, whatever stands behind it.
  alone = logits(tokens[1:2, : lengths[1]], lengths[1:2], targets[1:2])
  tolerance = 1e-4 if dtype == "float32" else 0.1
  np.testing.assert_allclose(
    np.asarray(together[1], np.float32),
    np.asarray(alone[0], np.float32),
    atol=tolerance,
  )
  garbage = np.where(
    np.arange(tokens.shape[1])[None] < lengths[:, None], tokens, 10**6
  )
  np.testing.assert_array_equal(together, logits(garbage, lengths, targets))


def test_every_weight_of_the_encoder_has_a_gradient(tmp_path):
  tokens, lengths, _ = write("t5gemma2", tmp_path)
  checkpoint = convert.open_encoder(tmp_path)
  config = decoder_on(checkpoint)
  params = regression_lm.init(config, jax.random.key(0))
  params["encoder"] = checkpoint.params()

  @jax.jit
  def loss(params, key=None):
    memory = regression_lm.encode(
      config, params, tokens, lengths, key=key, dropout=0.2
    )
    keys_and_values = jax.tree.leaves((memory.k, memory.v))
    return sum(jnp.square(leaf).sum() for leaf in keys_and_values)

  grads = jax.jit(jax.grad(loss))(params)["encoder"]
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all() and (np.asarray(leaf) != 0).any()
  assert loss(params, jax.random.key(1)) != loss(params)


def test_the_config_goes_through_json_and_is_checked(tmp_path):
  write("t5gemma", tmp_path)
  config = decoder_on(convert.open_encoder(tmp_path))
  text = json.dumps(dataclasses.asdict(config))
  assert RegressionLMConfig.from_json(json.loads(text)) == config
  assert hash(config) == hash(RegressionLMConfig.from_json(json.loads(text)))
  with pytest.raises(InputError, match="give their folder"):
    RegressionLMConfig.tiny(encoder="t5gemma")
  with pytest.raises(InputError, match="vocab_size=9, the encoder's is 64"):
    dataclasses.replace(config, vocab_size=9)
