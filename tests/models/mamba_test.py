import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model, mamba
from models.implementations import Implementations
from models.mamba_blocks import GatedRMSNorm
from models.mamba_config import AttentionLayers, MambaConfig
from ops.dispatch import UnsupportedError
from tests.models import parameter_counts

CONFIGS = {
  "mamba1": MambaConfig.tiny("mamba1"),
  "hybrid": MambaConfig.tiny("hybrid", num_groups=2),
}
# As transformers counts them.
SIZES = {
  "mamba_130m": 129_135_360,
  "mamba_370m": 371_516_416,
  "mamba_790m": 793_204_224,
  "mamba_1_4b": 1_372_178_432,
  "mamba_2_8b": 2_768_345_600,
  "mamba2_130m": 128_989_632,
  "mamba2_370m": 368_346_624,
  "mamba2_780m": 780_161_280,
  "mamba2_1_3b": 1_343_757_312,
  "mamba2_2_7b": 2_702_599_680,
  "mamba2_8b": 8_236_999_680,
}
ATTENTION = AttentionLayers(
  indices=(0, 2, 3), num_heads=4, num_kv_heads=4, head_dim=8
)
CACHE = 16
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
forward = jax.jit(
  language_model.forward, static_argnums=0, static_argnames="dtype"
)
prefill = jax.jit(mamba.prefill, static_argnums=0)
decode = jax.jit(mamba.decode, static_argnums=0)


def random_params(config):
  """Parameters at which every term tells, without a compilation."""
  rng = np.random.default_rng(0)

  def leaf(path, abstract):
    noise = rng.normal(size=abstract.shape).astype(np.float32)
    if path[-1].key == "kernel":
      return noise / abstract.shape[-2] ** 0.5
    return 1 + 0.3 * noise if path[-1].key == "scale" else 0.5 * noise

  return jax.tree_util.tree_map_with_path(leaf, mamba.abstract_params(config))


@functools.cache
def draw(name):
  """A config, its parameters, and (2, 12) tokens."""
  config = CONFIGS[name]
  rng = np.random.default_rng(1)
  tokens = rng.integers(config.vocab_size, size=(2, 12), dtype=np.int32)
  return config, random_params(config), tokens


def whole(name):
  """Logits of the (2, 12) tokens in one pass."""
  config, params, tokens = draw(name)
  return forward(config, params, tokens, segment_ids=ids([0] * 12, [0] * 12))


def ids(*rows):
  return np.array(rows, np.int32)


class Reader:
  """Reads chunks of at most six tokens, all with the same two programs."""

  def __init__(self, name):
    self.config, self.params, _ = draw(name)
    self.state = mamba.init_state(self.config, 2, cache_size=CACHE)

  def prefill(self, tokens, segment_ids):
    """Logits (2, T, V) of a chunk, which is padded on its right."""
    width = ((0, 0), (0, 6 - tokens.shape[1]))
    hidden, self.state = prefill(
      self.config,
      self.params,
      np.pad(tokens, width, constant_values=3),
      state=self.state,
      segment_ids=np.pad(segment_ids, width, constant_values=-1),
    )
    logits = mamba.bind(self.config, self.params).logits(hidden)
    return logits[:, : tokens.shape[1]]

  def decode(self, tokens):
    """Logits (2, T, V) of one or a few tokens."""
    logits, state = decode(self.config, self.params, tokens, self.state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, self.state)
    self.state = state
    return logits


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
  config = getattr(MambaConfig, name)()
  assert mamba.num_params(config) == SIZES[name]


@pytest.mark.parametrize(
  "config",
  [
    *CONFIGS.values(),
    MambaConfig.tiny(),
    MambaConfig.tiny(num_layers=5, attention=ATTENTION),
  ],
)
def test_parameters_are_counted_and_make_the_round_trip(config):
  tree = mamba.abstract_params(config)
  assert mamba.num_params(config) == parameter_counts.expected(config)
  model = mamba.bind(config, tree)
  assert len(model.layers) == len(config.runs)
  for run, stack in zip(config.runs, model.layers, strict=True):
    for leaf in jax.tree.leaves(stack):
      assert leaf.shape[0] == run.num_layers


def test_runs_are_the_neighbours_of_one_kind():
  config = MambaConfig.tiny(num_layers=5, attention=ATTENTION)
  found = [(run.kind, run.start, run.stop) for run in config.runs]
  assert found == [
    ("attention", 0, 1),
    ("mamba", 1, 2),
    ("attention", 2, 4),
    ("mamba", 4, 5),
  ]
  assert len(MambaConfig.tiny().runs) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_split_text_equals_the_whole(name):
  """Two chunks, then two tokens at once, then one at a time."""
  _, _, tokens = draw(name)
  reader = Reader(name)
  parts = [
    reader.prefill(tokens[:, :6], ids([0] * 6, [0] * 6)),
    reader.prefill(tokens[:, 6:8], ids([0] * 2, [0] * 2)),
    reader.decode(tokens[:, 8:10]),
    reader.decode(tokens[:, 10:11]),
    reader.decode(tokens[:, 11:]),
  ]
  found = jnp.concatenate(parts, axis=1)
  assert found.shape == (2, 12, draw(name)[0].vocab_size)
  np.testing.assert_allclose(found, whole(name), **TOLERANCE)
  np.testing.assert_array_equal(reader.state.length, 12)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_left_padded_batch_equals_its_rows_alone(name):
  config, params, tokens = draw(name)
  expected, reader = whole(name), Reader(name)
  batch = np.stack([np.pad(tokens[0, :4], (2, 0)), tokens[1, :6]])
  found = reader.prefill(batch, ids([-1] * 2 + [0] * 4, [0] * 6))
  np.testing.assert_allclose(found[0, 2:], expected[0, :4], **TOLERANCE)
  np.testing.assert_allclose(found[1], expected[1, :6], **TOLERANCE)
  # Another chunk that is padded on the left, then single tokens.
  batch = np.stack([tokens[0, 4:6], np.pad(tokens[1, 6:7], (1, 0))])
  found = reader.prefill(batch, ids([0, 0], [-1, 0]))
  np.testing.assert_array_equal(reader.state.length, [6, 7])
  np.testing.assert_allclose(found[0], expected[0, 4:6], **TOLERANCE)
  np.testing.assert_allclose(found[1, 1], expected[1, 6], **TOLERANCE)
  found = reader.decode(np.stack([tokens[0, 6:7], tokens[1, 7:8]]))
  np.testing.assert_allclose(found[0, 0], expected[0, 6], **TOLERANCE)
  np.testing.assert_allclose(found[1, 0], expected[1, 7], **TOLERANCE)
  # In a pass without state too.
  batch = np.stack([np.pad(row, (n, 0))[:12] for row, n in zip(tokens, (5, 2))])
  padding = ids([-1] * 5 + [0] * 7, [-1] * 2 + [0] * 10)
  found = forward(config, params, batch, segment_ids=padding)
  np.testing.assert_allclose(found[0, 5:], expected[0, :7], **TOLERANCE)
  np.testing.assert_allclose(found[1, 2:], expected[1, :10], **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_texts_equal_separate_ones(name):
  """Ids may come back, and padding may lie between texts."""
  config, params, tokens = draw(name)
  expected, reader = whole(name), Reader(name)
  # Both rows hold beginnings of the texts of `whole`.
  first, second = tokens
  packed = np.stack(
    [
      np.concatenate([first[:5], second[:4], first[:3]]),
      np.concatenate([[9], second[:3], [9], first[:7]]),
    ]
  )
  segment_ids = ids(
    [0] * 5 + [1] * 4 + [0] * 3, [-1] + [7] * 3 + [-1] + [8] * 7
  )
  texts = [(0, 0, 0, 5), (0, 1, 5, 4), (0, 0, 9, 3), (1, 1, 1, 3), (1, 0, 5, 7)]
  for found in (
    forward(config, params, packed, segment_ids=segment_ids),
    # A text of each row is cut in two, and goes on from the state.
    np.concatenate(
      [
        reader.prefill(packed[:, :6], segment_ids[:, :6]),
        reader.prefill(packed[:, 6:], segment_ids[:, 6:]),
      ],
      axis=1,
    ),
  ):
    for row, text, start, length in texts:
      np.testing.assert_allclose(
        found[row, start : start + length], expected[text, :length], **TOLERANCE
      )
  # Decoding goes on from the last text of a row.
  found = reader.decode(np.array([[first[3]], [first[7]]]))
  np.testing.assert_allclose(found[0, 0], expected[0, 3], **TOLERANCE)
  np.testing.assert_allclose(found[1, 0], expected[0, 7], **TOLERANCE)


def test_no_token_sees_a_later_one():
  config, params, tokens = draw("hybrid")
  one = forward(config, params, tokens)
  np.testing.assert_allclose(one, whole("hybrid"), **TOLERANCE)
  changed = tokens.copy()
  changed[:, 7] = (changed[:, 7] + 1) % config.vocab_size
  other = forward(config, params, changed)
  np.testing.assert_array_equal(one[:, :7], other[:, :7])
  assert np.abs(one[:, 7:] - other[:, 7:]).max((0, 2)).min() > 1e-4


@pytest.mark.parametrize("name", ["mamba1", "hybrid"])
def test_bfloat16_is_close_and_has_float32_logits(name):
  config, params, tokens = draw(name)
  options = {"dtype": jnp.bfloat16}
  if name == "hybrid":
    # Weights in bfloat16, instead of work in bfloat16 over float32 weights.
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    options = {}
  found, exact = forward(config, params, tokens, **options), whole(name)
  assert found.dtype == jnp.float32
  error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 4 * 2.0**-7


def test_states_are_float32_and_the_rest_of_the_dtype_of_the_pass():
  config, params, tokens = draw("hybrid")
  run = functools.partial(mamba.prefill, config, cache_size=CACHE)
  half = functools.partial(run, dtype=jnp.bfloat16)
  hidden, state = jax.eval_shape(half, params, tokens)
  assert hidden.dtype == state.dtype == jnp.bfloat16
  first, second, _ = state.layers
  assert first.ssm.dtype == jnp.float32
  assert first.conv.dtype == second.k.dtype == jnp.bfloat16
  # Decoding keeps to the state it is given.
  step = functools.partial(mamba.decode, config)
  logits, following = jax.eval_shape(step, params, tokens[:, :1], state)
  assert logits.dtype == jnp.float32
  chex.assert_trees_all_equal_shapes_and_dtypes(following, state)
  hidden, state = jax.eval_shape(run, params, tokens)
  assert hidden.dtype == state.dtype == jnp.float32


def test_every_parameter_has_a_gradient():
  """With layers recomputed, which changes the program and not the numbers."""
  config = MambaConfig.tiny("hybrid", num_layers=2, d_model=16)
  tokens = np.array([[3, 1, 4, 1]])

  def loss(params, remat):
    out = language_model.forward(config, params, tokens, remat=remat)
    return -jnp.mean(jax.nn.log_softmax(out)[..., 5])

  params = random_params(config)
  # Norms are recomputed in any case, and each kind of layer is one more.
  without, with_layers = (
    str(jax.make_jaxpr(lambda p: loss(p, remat))(params)).count("remat2[")  # noqa: B023
    for remat in (False, True)
  )
  assert with_layers == without + 2
  value, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, True)))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
  # Down the slope by as much as the slope says.
  step = 1e-3 / jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
  moved = jax.tree.map(lambda p, g: p - step * g, params, grads)
  fallen = value - jax.jit(lambda p: loss(p, True))(moved)
  np.testing.assert_allclose(fallen, 1e-3 * 1e-3 / step, rtol=0.05)


def test_padding_of_the_vocabulary_is_never_sampled():
  config, params, _ = draw("mamba1")
  assert (config.vocab_size, config.padded_vocab_size) == (61, 64)
  table = params["embed"]["table"].copy()
  assert table.shape[0] == 64
  # The padding would win.
  table[61:] = 1e3 * table[:3]
  model = mamba.bind(config, params | {"embed": {"table": table}})
  hidden = table[None, :2]
  assert (jnp.argmax(hidden @ model.head().T, axis=-1) >= 61).all()
  assert model.logits(hidden).shape == (1, 2, 61)


def test_untied_heads_have_their_own_weights():
  config = MambaConfig.tiny(tie_embeddings=False)
  params = random_params(config)
  model = mamba.bind(config, params)
  np.testing.assert_array_equal(model.head(), params["lm_head"]["kernel"].T)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_weights_start_as_published(kind):
  config = MambaConfig.tiny(kind, num_layers=4, d_model=64, d_state=4)
  init = jax.jit(mamba.init, static_argnums=0)
  mixer = init(config, jax.random.key(0))["layers"][0]["mixer"]
  dt = np.log1p(np.exp(np.asarray(mixer["dt_bias"], np.float64)))
  assert 1e-3 * 0.999 < dt.min() < 3e-3 and 0.03 < dt.max() < 0.1 * 1.001
  decay = np.exp(mixer["A_log"])
  if kind == "mamba1":
    expected = np.broadcast_to(np.arange(1.0, 5.0), decay.shape)
    np.testing.assert_allclose(decay, expected, rtol=1e-6)
  else:
    assert 1 <= decay.min() < 4 and 12 < decay.max() <= 16
  np.testing.assert_array_equal(mixer["D"], 1.0)
  for name, fan_in, scale in (("in_proj", 64, 1), ("out_proj", 128, 0.5)):
    largest = np.abs(mixer[name]["kernel"]).max()
    bound = scale / np.sqrt(fan_in)
    assert 0.99 * bound < largest <= bound
  assert 0.95 * 0.5 < np.abs(mixer["conv"]["weight"]).max() <= 0.5
  # No two layers alike.
  assert np.abs(np.diff(mixer["in_proj"]["kernel"], axis=0)).max() > 0


def test_gated_norm_against_float64():
  rng = np.random.default_rng(0)
  y, z, scale = rng.normal(size=(3, 2, 5, 12))
  norm = GatedRMSNorm(12, 3, eps=1e-5)
  norm.scale[...] = scale[0, 0].astype("f4")
  gated = (y * z / (1 + np.exp(-z))).reshape(2, 5, 3, 4)
  mean_square = np.mean(gated**2, axis=-1, keepdims=True)
  expected = (gated / np.sqrt(mean_square + 1e-5)).reshape(y.shape) * scale[
    0, 0
  ]
  found = norm(jnp.asarray(y, jnp.float32), jnp.asarray(z, jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_depth_does_not_grow_the_program():
  def size(layers):
    config = MambaConfig.tiny(num_layers=layers)
    params = mamba.abstract_params(config)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    lowered = forward.lower(config, params, tokens)
    return len(lowered.as_text().splitlines())

  assert size(2) == size(9)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_decoding_writes_a_donated_state_in_place(kind, optimized):
  config = MambaConfig.tiny(kind, num_layers=5)
  state = jax.eval_shape(lambda: mamba.init_state(config, 3))
  step = jax.jit(mamba.decode, static_argnums=0, donate_argnums=3)
  tokens = jax.ShapeDtypeStruct((3, 1), jnp.int32)
  compiled = step.lower(
    config, mamba.abstract_params(config), tokens, state
  ).compile()
  nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert compiled.memory_analysis().alias_size_in_bytes == nbytes
  copied = re.findall(r"= (\w+\[[\d,]*\])\S* copy\(", compiled.as_text())
  for leaf in (state.layers[0].conv, state.layers[0].ssm):
    shape = ",".join(map(str, leaf.shape))
    assert f"f32[{shape}]" in compiled.as_text()
    assert f"f32[{shape}]" not in copied


@pytest.mark.parametrize("op", ["scan", "conv", "norm"])
def test_implementations_are_passed_on(op):
  config, params, tokens = draw("hybrid")

  def run(function, name, *arrays):
    named = Implementations(**{op: name})
    call = functools.partial(function, config, implementations=named)
    if function is mamba.prefill:
      call = functools.partial(call, cache_size=CACHE)
    return jax.eval_shape(call, params, *arrays)

  state = mamba.init_state(config, 2, cache_size=CACHE)
  for name in ("xla", None):
    assert run(language_model.forward, name, tokens).shape == (2, 12, 61)
  for function, *arrays in (
    (language_model.forward, tokens),
    (mamba.prefill, tokens),
    (mamba.decode, tokens[:, :1], state),
  ):
    if op == "norm" and function is mamba.decode:
      # For a few tokens it takes the best that runs.
      assert run(function, "none", *arrays)[0].shape == (2, 1, 61)
      continue
    with pytest.raises(UnsupportedError, match="'none'"):
      run(function, "none", *arrays)


def test_a_hybrid_must_know_the_size_of_its_cache():
  config, params, tokens = draw("hybrid")
  with pytest.raises(ValueError, match="needs a cache_size"):
    mamba.prefill(config, params, tokens)


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"kind": "mamba3"}, "kind='mamba3'"),
    ({"head_dim": 24}, "head_dim=24"),
    ({"num_groups": 3}, "num_groups=3"),
    ({"d_state": 0}, "d_state=0"),
    ({"num_layers": 3, "attention": ATTENTION}, r"\(0, 2, 3\)"),
  ],
)
def test_sizes_that_do_not_fit_are_told(changes, part):
  with pytest.raises(ValueError, match=part):
    MambaConfig.tiny(**changes)
