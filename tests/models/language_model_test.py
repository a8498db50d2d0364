import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig

# 61 tokens in tables of 64 rows.
CONFIGS = {
  "transformer": TransformerConfig.tiny(
    vocab_size=61, vocab_multiple=8, tie_embeddings=False
  ),
  "hybrid": MambaConfig.tiny("hybrid"),
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
  """A config, parameters at which every term tells, and (2, 12) tokens."""
  config, rng = CONFIGS[request.param], np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32),
    language_model.abstract_params(config),
  )
  return config, params, rng.integers(61, size=(2, 12), dtype=np.int32)


def test_every_family_has_the_same_functions():
  shared = ("init", "abstract_params", "num_params", "bind", "init_state")
  shared += ("hidden_states", "prefill", "decode")
  one, *others = language_model.FAMILIES.values()
  for other in others:
    for name in shared:
      ours = inspect.signature(getattr(one, name)).parameters
      theirs = inspect.signature(getattr(other, name)).parameters
      # A family may take more options, which have a default.
      assert list(ours) == [key for key in theirs if key in ours]
      for key in theirs.keys() - ours.keys():
        assert theirs[key].default is not inspect.Parameter.empty


def test_a_segment_whose_id_comes_back_is_another_text(model):
  """Ids 0, 1, 0 are three texts, and padding is none of them."""
  config, params, tokens = model
  run = jax.jit(language_model.hidden_states, static_argnums=0)
  alone = run(config, params, tokens)
  first, second = tokens
  packed = np.concatenate([first[:5], second[:3], [9], first[:3]])[None]
  segment_ids = np.array([[0] * 5 + [1] * 3 + [-1] + [0] * 3], np.int32)
  found = run(config, params, packed, segment_ids=segment_ids)[0]
  np.testing.assert_allclose(found[:5], alone[0, :5], **TOLERANCE)
  np.testing.assert_allclose(found[5:8], alone[1, :3], **TOLERANCE)
  np.testing.assert_allclose(found[9:], alone[0, :3], **TOLERANCE)


def test_rows_of_different_length_are_read_as_they_are_alone(model):
  config, params, tokens = model
  whole = jax.jit(language_model.forward, static_argnums=0)
  whole = whole(config, params, tokens)
  prefill = jax.jit(
    language_model.prefill, static_argnums=0, static_argnames="cache_size"
  )
  lengths = jnp.array([4, 6])
  hidden, state = prefill(config, params, tokens[:, :6], lengths, cache_size=9)
  last = language_model.logits(
    config, params, hidden[jnp.arange(2), lengths - 1]
  )
  # Rows of the table beyond the vocabulary have no probability.
  assert last.shape == (2, 61)
  assert language_model.head(config, params).shape == (64, 32)
  np.testing.assert_allclose(last[0], whole[0, 3], **TOLERANCE)
  np.testing.assert_allclose(last[1], whole[1, 5], **TOLERANCE)
  decode = jax.jit(language_model.decode, static_argnums=0)
  following = np.stack([tokens[0, 4:7], tokens[1, 6:9]])
  found, state = decode(config, params, following, state)
  assert found.shape == (2, 3, 61)
  np.testing.assert_allclose(found[0], whole[0, 4:7], **TOLERANCE)
  np.testing.assert_allclose(found[1], whole[1, 6:9], **TOLERANCE)
  np.testing.assert_array_equal(state.length, [7, 9])


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_writes_a_donated_cache_in_place(name, num_layers, optimized):
  """Without another copy of it, also where no scan orders reads and writes."""
  if name == "transformer":
    config = TransformerConfig.tiny(num_layers=num_layers)
  else:
    attention = CONFIGS["hybrid"].attention
    indices = tuple(range(num_layers))
    config = MambaConfig.tiny(
      num_layers=num_layers + 1,
      attention=dataclasses.replace(attention, indices=indices),
    )
  state = jax.eval_shape(
    lambda: language_model.init_state(
      config, 3, cache_size=37, dtype=jnp.float32
    )
  )
  step = jax.jit(language_model.decode, static_argnums=0, donate_argnums=3)
  compiled = step.lower(
    config,
    language_model.abstract_params(config),
    jax.ShapeDtypeStruct((3, 1), jnp.int32),
    state,
  ).compile()
  nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert compiled.memory_analysis().alias_size_in_bytes == nbytes
  text = compiled.as_text()
  assert f"f32[{num_layers},3,37,2,8]" in text
  copied = re.findall(r"= f32\[([\d,]*)\]\S* copy\(", text)
  whole = {f"{num_layers},3,37,2,8"} | (
    {"3,37,2,8"} if num_layers == 1 else set()
  )
  assert not whole & set(copied)
