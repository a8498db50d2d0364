import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, layers, transformer
from models.attention import causal_attend
from models.transformer_config import TransformerConfig

VARIANTS = {
  "plain": {},
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qk_norm": True, "tie_embeddings": False},
  "multi-query": {"num_kv_heads": 1},
}
SIZES = {
  "transformer_63m": 62_693_888,
  "smollm2_135m": 134_515_008,
  "smollm2_360m": 361_821_120,
  "smollm2_1_7b": 1_711_376_384,
  "llama3_2_1b": 1_235_814_400,
  "llama3_2_3b": 3_212_749_824,
  "llama3_1_8b": 8_030_261_248,
  "qwen2_5_0_5b": 494_032_768,
  "qwen2_5_1_5b": 1_543_714_304,
  "qwen2_5_7b": 7_615_616_512,
  "qwen3_0_6b": 596_049_920,
  "qwen3_1_7b": 1_720_574_976,
  "qwen3_4b": 4_022_468_096,
  "qwen3_8b": 8_190_735_360,
  "gemma3_270m": 268_098_176,
  "gemma3_1b": 999_885_952,
}
forward = jax.jit(language_model.forward, static_argnums=0)
prefill = jax.jit(
  transformer.prefill, static_argnums=0, static_argnames="cache_size"
)
decode = jax.jit(transformer.decode, static_argnums=0)


def draw(config, shape=(2, 12), seed=0):
  params = transformer.init(config, jax.random.key(seed))
  tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
  return params, tokens


@pytest.fixture(scope="module")
def plain():
  config = TransformerConfig.tiny()
  return config, *draw(config)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
  config = getattr(TransformerConfig, name)()
  assert transformer.num_params(config) == SIZES[name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_split_text_equals_the_whole(variant):
  """Prefill, then several tokens, then one at a time."""
  config = TransformerConfig.tiny(**VARIANTS[variant])
  params, tokens = draw(config)
  whole = forward(config, params, tokens)
  assert whole.shape == (2, 12, config.vocab_size)
  hidden, state = prefill(config, params, tokens[:, :6], cache_size=14)
  parts = [transformer.bind(config, params).logits(hidden)]
  for start, end in ((6, 9), (9, 12)):
    logits, state = decode(config, params, tokens[:, start:end], state)
    parts.append(logits)
  found = jnp.concatenate(parts, axis=1)
  np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(state.length, 12)


def test_rows_of_different_length_share_a_cache(plain):
  config, params, tokens = plain
  whole = forward(config, params, tokens)
  _, state = transformer.prefill(
    config, params, tokens[:, :6], lengths=jnp.array([6, 4]), cache_size=14
  )
  # Row 1 takes its tokens 4 and 5 once more, over the old ones.
  following = jnp.stack([tokens[0, 6:9], tokens[1, 4:7]])
  logits, state = decode(config, params, following, state)
  np.testing.assert_allclose(logits[0], whole[0, 6:9], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(logits[1], whole[1, 4:7], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(state.length, [9, 7])


def test_no_token_sees_a_later_one(plain):
  config, params, tokens = plain
  changed = tokens.at[:, 7].add(1) % config.vocab_size
  one, other = forward(config, params, tokens), forward(config, params, changed)
  np.testing.assert_array_equal(one[:, :7], other[:, :7])
  assert np.abs(one[:, 7:] - other[:, 7:]).max((0, 2)).min() > 1e-4


def test_positions_matter_only_relative_to_each_other(plain):
  config, params, tokens = plain
  model = transformer.bind(config, params)
  x, positions = model.embed(tokens), transformer.token_positions(tokens)
  attend = causal_attend()
  here, _ = model(x, positions, attend)
  shifted, _ = model(x, positions + 50, attend)
  stretched, _ = model(x, 3 * positions, attend)
  np.testing.assert_allclose(here, shifted, rtol=1e-3, atol=1e-4)
  assert np.abs(here - stretched).max() > 1e-3


def test_too_long_a_prompt_is_told(plain):
  config, params, tokens = plain
  with pytest.raises(ValueError, match="12 tokens do not fit into 11 slots"):
    transformer.prefill(config, params, tokens, cache_size=11)


def test_hooks_stand_where_they_say(plain):
  config, params, tokens = plain
  model = transformer.bind(config, params)
  shapes = {}

  def run(**hooks):
    return model(
      model.embed(tokens),
      transformer.token_positions(tokens),
      causal_attend(),
      hooks=layers.MlpHooks(**hooks),
    )[0]

  def note(name, x):
    shapes[name] = x.shape[-1]
    return x

  plain_output = run()
  noted = run(
    **{
      name: functools.partial(note, name)
      for name in ("on_input", "on_middle", "on_output")
    }
  )
  np.testing.assert_array_equal(noted, plain_output)
  assert shapes == {"on_input": 32, "on_middle": 48, "on_output": 32}
  # Each of the three alone can silence the MLP.
  silenced = [
    run(**{name: jnp.zeros_like})
    for name in ("on_input", "on_middle", "on_output")
  ]
  for other in silenced:
    np.testing.assert_allclose(other, silenced[0], rtol=1e-5, atol=1e-6)
    assert np.abs(other - plain_output).max() > 1e-3


def test_layer_inputs_and_outputs_go_with_their_layer(plain):
  config, params, tokens = plain
  model = transformer.bind(config, params)

  def attend(q, k, v, layer_input):
    out, _ = causal_attend()(q, k, v, None)
    return out * layer_input, layer_input

  _, outputs = model(
    model.embed(tokens),
    transformer.token_positions(tokens),
    attend,
    layer_inputs=jnp.array([2.0, 3.0]),
  )
  np.testing.assert_array_equal(outputs, [2.0, 3.0])


def test_parameters_make_the_round_trip(plain):
  config, params, tokens = plain
  model = transformer.bind(config, params)
  assert model.embed.table.shape == (64, 32)
  assert params["layers"]["attn"]["q_proj"]["kernel"].shape == (2, 32, 32)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.tree.map(jnp.zeros_like, params),
    jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      transformer.abstract_params(config),
    ),
  )
  again = transformer.init(config, jax.random.key(0))
  chex.assert_trees_all_equal(params, again)


def test_bfloat16_computes_in_its_own_type_with_float32_logits(plain):
  config, params, tokens = plain
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  hidden, state = prefill(config, half, tokens, cache_size=12)
  assert hidden.dtype == state.cache.k.dtype == jnp.bfloat16
  logits = forward(config, half, tokens)
  assert logits.dtype == jnp.float32
  exact = forward(config, params, tokens)
  error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
  assert error < 2 * 2.0**-7


def test_a_float32_stream_changes_the_sums_of_narrow_passes_alone(plain):
  config, params, tokens = plain
  wide = TransformerConfig.tiny(float32_stream=True)
  exact = forward(config, params, tokens)
  np.testing.assert_array_equal(forward(wide, params, tokens), exact)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  hidden, state = prefill(wide, half, tokens[:, :8], cache_size=12)
  assert hidden.dtype == state.cache.k.dtype == jnp.bfloat16
  logits, _ = decode(wide, half, tokens[:, 8:], state)
  whole = forward(wide, half, tokens)
  np.testing.assert_allclose(logits, whole[:, 8:], atol=2.0**-6)
  errors = [
    np.linalg.norm(forward(c, half, tokens) - exact) for c in (wide, config)
  ]
  assert 0 < errors[0] < errors[1]


def test_scaled_outputs_start_smaller_by_the_root_of_their_number():
  key = jax.random.key(3)
  plain, scaled = (
    transformer.init(TransformerConfig.tiny(scaled_outputs=on), key)["layers"]
    for on in (False, True)
  )
  for module, name in (("attn", "o_proj"), ("mlp", "down_proj")):
    kernels = [layers[module].pop(name)["kernel"] for layers in (plain, scaled)]
    # Two layers write twice each.
    np.testing.assert_allclose(kernels[1], kernels[0] / 2, rtol=1e-6)
  chex.assert_trees_all_equal(plain, scaled)


def test_depth_does_not_grow_the_program():
  def size(layers):
    config = TransformerConfig.tiny(num_layers=layers)
    params = transformer.abstract_params(config)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    lowered = jax.jit(language_model.forward, static_argnums=0).lower(
      config, params, tokens
    )
    return len(lowered.as_text().splitlines())

  assert size(2) == size(9)


def test_heads_must_share_keys_evenly():
  with pytest.raises(ValueError, match="num_heads=4 is no multiple of"):
    TransformerConfig.tiny(num_kv_heads=3)
