"""Models whose weights are in few bits, through every way of calling them."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from models import language_model, mamba
from models.convert import load, save_safetensors
from models.convert import quantized as convert_quantized
from models.errors import InputError
from models.implementations import Implementations
from models.mamba_config import MambaConfig
from models.module import num_params
from models.quantized import quantize_params
from models.transformer_config import TransformerConfig
from ops import dispatch
from ops.quantized import (
  Percentile,
  QTensor,
  QWeight,
  as_array,
  formats,
  quantize,
)
from research.decoding import loop
from research.decoding.plain import Plain
from research.decoding.sampling import Sampling
from tests.ops.quantized_test import GROUP, LATER, TWO_LEVELS

CONFIGS = {
  "transformer": TransformerConfig.tiny(qkv_bias=True, tie_embeddings=False),
  "mamba1": MambaConfig.tiny("mamba1", vocab_multiple=1),
  "hybrid": MambaConfig.tiny("hybrid", vocab_multiple=1),
}
EVERYTHING = r".*\.(kernel|table)"
LENGTH, CACHE = 6, 12


def params_of(name):
  return random_params(CONFIGS[name])


@functools.cache
def random_params(config):
  """Weights of a width and a scale at which every layer tells."""
  rng = np.random.default_rng(0)

  def leaf(path, abstract):
    noise = rng.normal(size=abstract.shape).astype(np.float32)
    if path[-1].key == "kernel":
      return jnp.asarray(noise / abstract.shape[-2] ** 0.5)
    return jnp.asarray(
      1 + 0.3 * noise if path[-1].key == "scale" else 0.5 * noise
    )

  abstract = language_model.abstract_params(config)
  return jax.tree_util.tree_map_with_path(leaf, abstract)


@jax.jit
def dense(params):
  """What the QTensors of a tree stand for."""
  return jax.tree.map(as_array, params, is_leaf=is_quantized)


def is_quantized(leaf):
  return isinstance(leaf, QTensor | QWeight)


def tokens_of(config):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.integers(0, config.vocab_size, (2, LENGTH)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def scores(config, params, tokens):
  """Logits of one causal pass, and of reading half and appending the rest."""
  hidden = language_model.hidden_states(config, params, tokens)
  whole = language_model.logits(config, params, hidden)
  half = LENGTH // 2
  lengths = jnp.full(len(tokens), half, jnp.int32)
  hidden, state = language_model.prefill(
    config, params, tokens[:, :half], lengths, cache_size=CACHE
  )
  read = language_model.logits(config, params, hidden)

  def step(state, token):
    logits, state = language_model.decode(config, params, token[:, None], state)
    return state, logits[:, 0]

  _, appended = jax.lax.scan(step, state, tokens[:, half:].T)
  return whole, jnp.concatenate([read, appended.swapaxes(0, 1)], axis=1)


def relative(found, expected):
  error = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
  return np.sqrt(np.mean(error**2) / np.mean(np.square(expected)))


def test_a_step_takes_the_named_product_of_its_head():
  config, params = CONFIGS["mamba1"], params_of("mamba1")
  quantized = quantize_params(params, "int8", r"embed\.table")
  state = language_model.init_state(
    config, 2, cache_size=CACHE, dtype=jnp.bfloat16
  )
  token = jnp.zeros((2, 1), jnp.int32)

  def step(params, head):
    named = Implementations(head=head)
    run = functools.partial(mamba.decode, config, implementations=named)
    return jax.eval_shape(run, params, token, state=state)[0].shape

  assert step(quantized, "xla") == step(quantized, None)
  # A table that is not quantized has one product.
  assert step(params, "mosaic_gpu") == step(params, None)
  with pytest.raises(dispatch.UnsupportedError, match="quantized_matmul"):
    step(quantized, "mosaic_gpu")


@pytest.mark.parametrize(
  "name, form, where",
  [
    ("transformer", "int8", EVERYTHING),
    ("transformer", "int4:8", r".*\.kernel"),
    ("transformer", "fp8_e4m3", r".*\.kernel"),
    ("mamba1", "int8", r".*\.(kernel|weight)"),
    ("hybrid", "int4:8", EVERYTHING),
  ],
)
def test_a_model_is_close_to_the_one_it_is_made_of(name, form, where):
  config, params = CONFIGS[name], params_of(name)
  q = quantize_params(params, form, where)
  leaves = jax.tree.leaves(q, is_leaf=is_quantized)
  count = sum(map(is_quantized, leaves))
  assert count >= 4
  tokens = tokens_of(config)
  whole, stepped = scores(config, q, tokens)
  assert whole.shape == (2, LENGTH, config.vocab_size)
  # The same numbers as of float weights that stand on the levels.
  levels = dense(q)
  same, same_stepped = scores(config, levels, tokens)
  np.testing.assert_allclose(whole, same, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(stepped, same_stepped, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(stepped, whole, rtol=1e-4, atol=1e-4)
  # Rounding a weight adds noise of at most half the distance of levels; noise
  # of independent products adds up in squares.
  noise = max(
    relative(level, b)
    for a, level, b in zip(
      leaves, jax.tree.leaves(levels), jax.tree.leaves(params), strict=True
    )
    if is_quantized(a)
  )
  bound = {"int8": 0.01, "int4:8": 0.12, "fp8_e4m3": 0.04}[form]
  assert 0 < noise < bound
  products = 7 * config.num_layers + 2
  float_scores, _ = scores(config, params, tokens)
  assert 0 < relative(whole, float_scores) < 2 * noise * products**0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_what_kernels_multiply_is_rotated_and_rounded(name):
  """W8A8: close to the float model, and no closer than rounding allows."""
  config, params = CONFIGS[name], params_of(name)
  tokens = tokens_of(config)
  expected, _ = scores(config, params, tokens)
  rotated = quantize_params(
    params, "int8", r".*\.(in|out|up|down)_proj\.kernel", hadamard=True
  )
  q = quantize_params(rotated, "int8", input="int8")
  whole, stepped = scores(config, q, tokens)
  np.testing.assert_allclose(stepped, whole, rtol=2e-2, atol=2e-2)
  assert 0 < relative(whole, expected) < 0.05
  assert num_params(q) == num_params(params)


@pytest.mark.parametrize("name", ["transformer", "hybrid"])
def test_tokens_are_generated(name):
  """By the loop on the device, the same as by float weights on the levels."""
  config = CONFIGS[name]
  q = quantize_params(params_of(name), "int8")
  method = Plain(config=config, sampling=Sampling(temperature=0.0))
  tokens = tokens_of(config)

  def draw(params):
    lengths = jnp.asarray([LENGTH, LENGTH - 2])
    batch, first = loop.begin(
      method, params, tokens, lengths, jax.random.key(0), cache_size=CACHE
    )
    _, rest = loop.advance(method, params, batch, steps=4)
    return np.hstack([first.tokens[..., 0], rest.tokens[..., 0]])

  found = draw(q)
  assert found.shape == (2, 5) and found.max() < config.vocab_size
  np.testing.assert_array_equal(found, draw(dense(q)))


def test_formats_add_up_and_say_what_they_are_for():
  params = params_of("transformer")
  q = quantize_params(
    params, "int4:8", r"layers\.mlp\..*", observer=Percentile(99.0)
  )
  q = quantize_params(q, "fp8_e4m3:tensor")
  mlp, attn = q["layers"]["mlp"], q["layers"]["attn"]
  assert str(mlp["up_proj"]["kernel"].format) == "int4:8"
  kernel = attn["q_proj"]["kernel"]
  assert str(kernel.format) == "fp8_e4m3:tensor"
  # Each layer of the stack has a scale of its own.
  assert kernel.scales.shape == (2, 1, 1)
  assert not is_quantized(attn["q_proj"]["bias"])
  assert not is_quantized(q["embed"]["table"])
  assert num_params(q) == num_params(params)


WRONG = {
  "matches": ("int8", r"layers\.mpl.*", "no weight matches 'layers"),
  "table": ("int8", r".*table", "embed.table: kernels alone multiply", "int8"),
  "input": ("int8", r".*kernel", "there is no number format 'int5'", "int5"),
  "vector": ("int8", r".*scale", "final_norm.scale: is no kernel, table or"),
  "group": (
    "int4:7",
    r".*up_proj.*",
    "layers.mlp.up_proj.kernel: quantize: gr",
  ),
  "format": ("int7", r".*", "there is no number format 'int7'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_choices_get_one_clear_line(case):
  form, where, message, *input = WRONG[case]
  input = input[0] if input else None
  with pytest.raises(InputError, match=message) as found:
    quantize_params(params_of("transformer"), form, where, input=input)
  assert "\n" not in str(found.value)


def write(directory, name, form, where=EVERYTHING, dtype="float32"):
  params = jax.tree.map(lambda x: x.astype(dtype), params_of(name))
  q = quantize_params(params, form, where)
  save_safetensors(directory, CONFIGS[name], q)
  return q


@pytest.mark.parametrize(
  "name, form, where, dtype",
  [
    ("transformer", "int4:8", EVERYTHING, "float32"),
    ("transformer", "fp8_e4m3", r".*(up|down)_proj\.kernel", "bfloat16"),
    ("hybrid", "int8", r".*\.(kernel|weight)", "float32"),
    ("mamba1", "int4:row", r".*(in|dt)_proj\.kernel", "bfloat16"),
  ],
)
def test_files_give_the_same_bits(tmp_path, name, form, where, dtype):
  q = write(tmp_path / "model", name, form, where, dtype)
  checkpoint = load(tmp_path / "model", dtype)
  assert checkpoint.config == CONFIGS[name]
  chex.assert_trees_all_equal(checkpoint.params, q, strict=True)
  # Other programs must not take the weights for missing.
  hf = json.loads((tmp_path / "model/config.json").read_text())
  assert hf["quantization_config"] == {"quant_method": "frugax"}


@pytest.mark.parametrize(
  "name, hadamard, static", [("hybrid", True, True), ("transformer", 0, 0)]
)
def test_files_keep_what_inputs_are_rounded_to(
  tmp_path, name, hadamard, static
):
  params = params_of(name)
  q = quantize_params(
    params, "int8", r".*_proj\.kernel", input="int8", hadamard=hadamard
  )
  scales = lambda w: 0.01 + jnp.arange(w.shape[0], dtype="float32")[:, None]
  fix = lambda w: (
    dataclasses.replace(w, input=dataclasses.replace(w.input, scales=scales(w)))
    if static and isinstance(w, QWeight)
    else w
  )
  q = jax.tree.map(fix, q, is_leaf=is_quantized)
  assert any(map(is_quantized, jax.tree.leaves(q, is_leaf=is_quantized)))
  save_safetensors(tmp_path, CONFIGS[name], q)
  found = load(tmp_path, "float32").params
  chex.assert_trees_all_equal(found, q, strict=True)


def test_formats_to_come_are_kept_too(monkeypatch):
  """Zero points, codebooks and a second level, without a line for each."""
  table = {form.name: form for form in (*LATER, TWO_LEVELS)}
  monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS) | table)
  x = np.random.default_rng(0).normal(size=(6, 2 * GROUP)).astype("float32")
  for form in table.values():
    q = jax.tree.map(np.asarray, quantize(jnp.asarray(x), form))
    arrays, header = convert_quantized.to_arrays({"w": q, "b": x})
    file = convert_quantized.Quantized(header, list(arrays), "file")
    assert sorted(file.names()) == ["b", "w"]
    shapes = {part: array.shape for part, array in arrays.items()}
    assert file.shape("w", shapes.__getitem__) == x.shape
    chex.assert_trees_all_equal(
      file.read("w", arrays.__getitem__), q, strict=True
    )


def rewrite(path, change):
  """Changes the arrays and the text of QTensors of a file."""
  with safetensors.safe_open(path, framework="numpy") as file:
    arrays = {name: file.get_tensor(name) for name in file.keys()}
    header = file.metadata()
  text = json.loads(header[convert_quantized.KEY])
  change(arrays, text)
  header[convert_quantized.KEY] = json.dumps(text)
  safetensors.numpy.save_file(arrays, path, metadata=header)


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
  "format": (
    lambda arrays, text: text[UP].update(format="int5:8"),
    "there is no number format 'int5'",
  ),
  "text": (lambda arrays, text: text[UP].pop("axis"), "cannot be read"),
  "axis": (
    lambda arrays, text: text[UP].update(axis=text[UP]["axis"] + 2),
    "axis [01]",
  ),
  "values": (
    lambda arrays, text: arrays.update(
      {f"{UP}.values": arrays[f"{UP}.values"][:, 1:]}
    ),
    "do not hold 32 codes",
  ),
  "scales": (
    lambda arrays, text: arrays.update(
      {f"{UP}.scales": arrays[f"{UP}.scales"][1:]}
    ),
    "scales .* do not fit",
  ),
  "missing": (lambda arrays, text: arrays.pop(f"{UP}.scales"), "is missing"),
  "layers": (
    lambda arrays, text: (
      text[UP].update(format="int4:16"),
      arrays.update({f"{UP}.scales": arrays[f"{UP}.scales"][:, ::2]}),
    ),
    "differ in their number format",
  ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_get_one_clear_line(tmp_path, case):
  change, message = BROKEN[case]
  write(tmp_path, "transformer", "int4:8", r".*up_proj\.kernel")
  rewrite(tmp_path / "model.safetensors", change)
  with pytest.raises(InputError, match=message) as found:
    load(tmp_path)
  assert "model.safetensors" in str(found.value)
  assert "\n" not in str(found.value)
