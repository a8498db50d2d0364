import dataclasses

import jax
import pytest

from models import language_model
from models.errors import InputError
from research.cost import language_model as flops
from research.language_model import architectures
from research.language_model.options import ARCHITECTURES, PRESETS, Options
from tests.models import parameter_counts

NAMED = [(arch, name) for arch in PRESETS for name in PRESETS[arch]]


def config_of(vocab_size=32768, **options):
  return architectures.config_of(Options(**options), vocab_size)


@pytest.mark.parametrize("arch, preset", NAMED)
def test_every_preset_is_a_model(arch, preset):
  config = config_of(arch=arch, preset=preset)
  assert language_model.num_params(config) == parameter_counts.expected(config)


def test_models_of_60m_are_alike():
  sizes = [
    language_model.num_params(config_of(arch=arch, preset="60m"))
    for arch in ("transformer", "mamba1", "mamba2")
  ]
  assert min(sizes) > 57e6 and max(sizes) < 59e6


def test_every_architecture_has_a_preset_to_start_from():
  assert set(PRESETS) == set(ARCHITECTURES)
  for arch in ARCHITECTURES:
    assert language_model.num_params(config_of(arch=arch, vocab_size=512)) < 2e6


def test_sizes_that_are_given_win():
  options = Options(arch="mamba2", preset="60m", layers=3, d_model=64)
  assert options.sizes() == PRESETS["mamba2"]["60m"] | {
    "layers": 3,
    "d_model": 64,
  }
  config = architectures.config_of(options, 1000)
  assert (config.num_layers, config.d_model, config.d_state) == (3, 64, 128)


def test_vocabularies_are_padded():
  for arch in ("transformer", "mamba2"):
    config = config_of(50277, arch=arch)
    assert (config.vocab_size, config.padded_vocab_size) == (50277, 50304)


def test_a_hybrid_has_attention_at_every_so_many_layers():
  config = config_of(arch="hybrid", layers=7, attention_every=3, d_ff=32)
  assert config.attention_indices == (2, 5)
  assert config.attention.d_ff == 32


@pytest.mark.parametrize(
  "options, says",
  [
    ({"preset": "7b"}, "--preset='7b' .* tiny, 60m, 130m"),
    ({"arch": "mamba1", "preset": "1.3b"}, "790m, 1.4b"),
    ({"arch": "mamba3"}, "--arch='mamba3'"),
    ({"batch": 10, "accumulate": 4}, "--batch=10 .* --accumulate=4"),
    ({"d_state": 16}, "--d_state says nothing about --arch=transformer"),
    ({"arch": "mamba1", "heads": 2}, "--heads says nothing"),
    ({"window": 4}, "--window says nothing about --arch=transformer"),
  ],
)
def test_options_that_do_not_fit_are_told(options, says):
  with pytest.raises(InputError, match=says) as error:
    Options(**options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "options, says",
  [
    ({"d_model": 130}, "--d_model=130 .* --heads=4"),
    ({"d_model": 36, "heads": 4, "kv_heads": 4}, "odd width"),
    ({"kv_heads": 3}, "num_kv_heads=3"),
    ({"d_ff": 0}, "--d_ff=0 is for hybrids"),
    ({"arch": "mamba2", "head_dim": 24}, "head_dim=24"),
    ({"arch": "mamba2", "groups": 3}, "num_groups=3"),
    ({"arch": "attamba", "chunk_size": "four"}, "--chunk_size=four: write"),
    ({"arch": "attamba", "chunk_size": "4,8,4"}, "3 sizes do not repeat"),
    ({"arch": "attamba", "chunk_size": "2048"}, "a chunk of 2048 tokens"),
    ({"arch": "attamba", "boundaries": "by_eye"}, "boundaries='by_eye'"),
    ({"arch": "attamba", "window": -1}, "window=-1"),
    ({"arch": "attamba", "kv_heads": 2}, "not as wide as d_model"),
  ],
)
def test_sizes_that_do_not_fit_are_told(options, says):
  with pytest.raises(InputError, match=says):
    config_of(**options)


def test_every_option_has_a_text_and_bounds():
  for field in dataclasses.fields(Options):
    assert field.metadata["text"], field.name
    assert isinstance(field.default, bool | str | None) or {
      "lower",
      "upper",
    } <= set(field.metadata["bounds"]), field.name


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_products_with_weights_are_two_operations_a_weight(arch, tie):
  config = config_of(1024, arch=arch, tie_embeddings=tie)
  leaves = jax.tree_util.tree_leaves_with_path(
    language_model.abstract_params(config)["layers"]
  )
  weights = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
  found = flops.forward(config, 64)
  assert found["layers"] == 2 * weights
  assert found["head"] == 2 * 1024 * config.d_model
  assert flops.training(config, 64) == 3 * sum(found.values())


def test_new_transformers_keep_and_scale_their_stream_as_mambas_do():
  config = config_of(arch="transformer")
  assert config.float32_stream and config.scaled_outputs


def test_mixing_is_counted_by_what_a_query_sees():
  config = config_of(arch="transformer", layers=3, d_model=32, kv_heads=2)
  # Query t sees t + 1 keys; two products of 2 operations in each of 32 places.
  pairs = sum(t + 1 for t in range(10)) / 10
  assert flops.forward(config, 10)["mixing"] == 3 * 4 * 32 * pairs
  config = config_of(arch="mamba2", layers=3, d_model=32, d_state=8)
  # x B^T into the state and C out of it: 64 channels by 8.
  assert flops.forward(config, 10)["mixing"] == 3 * 4 * 64 * 8
  config = config_of(arch="hybrid", layers=4, d_model=32, d_state=8)
  expected = 2 * 4 * 64 * 8 + 2 * 4 * 32 * pairs
  assert flops.forward(config, 10)["mixing"] == expected
  assert flops.forward(config_of(arch="mamba1"), 10)["mixing"] == 0
  config = config_of(
    arch="attamba", layers=3, d_model=32, heads=1, kv_heads=1, window=2,
    chunk_size="4", compressor="mean",
  )  # fmt: skip
  # Token 0 is a chunk, and tokens 3 and 7 end others; a pooled one is seen from
  # its end on, since the window no longer shows its first token.
  window = sum(min(t, 2) + 1 for t in range(10))
  chunks = len(range(3, 10)) + len(range(4, 10)) + len(range(8, 10))
  expected = 3 * 4 * 32 * (window + chunks) / 10
  assert flops.forward(config, 10)["mixing"] == pytest.approx(expected)


def dot_flops(jaxpr):
  """Operations of all products in a traced function, scans times length."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      depth = 1
      for axis in contracted:
        depth *= left[axis]
      total += 2 * depth * equation.outvars[0].aval.size
    times = equation.params.get("length", 1)
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += times * dot_flops(inner)
  return total


def test_a_transformer_computes_what_is_counted():
  length = 16
  config = config_of(512, arch="transformer", layers=3)
  traced = jax.make_jaxpr(
    lambda params, tokens: language_model.forward(config, params, tokens)
  )(
    language_model.abstract_params(config),
    jax.ShapeDtypeStruct((2, length), "int32"),
  )
  found = flops.forward(config, length)
  # Plain XLA computes the masked half too.
  whole = found["mixing"] * length / ((length + 1) / 2)
  expected = found["layers"] + found["head"] + whole
  assert dot_flops(traced.jaxpr) == 2 * length * expected
