"""`quantize`: a model by a recipe."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from models import language_model
from models.errors import InputError
from models.module import Params
from models.quantized import round_to_nearest
from ops.quantized import (
  QTensor,
  QWeight,
  Searched,
  Taps,
  absmax,
  as_array,
  formats,
  is_quantized,
)
from ops.quantized.quantize import Observer
from research.quantization import (
  gptq,
  mixed,
  reordering,
  rotation,
  smoothing,
  structure,
  taps,
)
from research.quantization.calibration import HEAD, Notes, calibrate, walk
from research.quantization.recipes import Recipe
from research.quantization.statistics import Statistics, Wanted

# Kernels of Mamba-1 that make step sizes, B and C.
_SMALL = (("mixer", "x_proj"), ("mixer", "dt_proj"))
# The notes of x, which the state space reads.
X = "mixer.x"


def quantize(
  config: language_model.Config,
  params: Params,
  recipe: Recipe,
  batches: np.ndarray | None,
  advance: Callable[[int], None] | None = None,
) -> tuple[language_model.Config, Params]:
  """Quantizes a model.

  Args:
    config: of the model.
    params: of the model, arrays.
    recipe: how.
    batches: (N, B, T) int32 tokens to calibrate on, see
      `calibration.batches_of`; may be None where the recipe needs none.
    advance: told how many more layers are done, of `work(config, recipe)`.

  Returns:
    The config, whose head is untied where the recipe rotates the residual
    stream, and parameters with `QTensor` and `QWeight` in place of arrays.

  Raises:
    InputError: the model is quantized already, there is no text to calibrate
      on, numbers are not finite, a rotation or format does not fit, layers of
      such a model cannot differ, or it keeps no keys and values.
  """
  leaves = jax.tree.leaves(params, is_leaf=is_quantized)
  if any(is_quantized(leaf) for leaf in leaves):
    raise InputError("the model is quantized already: give the one before")
  if recipe.is_static and batches is None:
    raise InputError("this recipe needs a text to calibrate on: give one")
  if recipe.float_share:
    mixed.check(config)
  if recipe.cache and not config.cached_heads:
    raise InputError(
      f"a cache in {recipe.cache}: a {config.family} keeps no keys and values "
      "of all tokens: take a recipe without"
    )
  config, params = prepare(config, params, recipe, batches, advance)
  if not recipe.is_static:
    batches = np.zeros((0, 1, 1), np.int32)
  change = lambda layer, own, notes: _layer(config, recipe, own, notes)
  wanted = Wanted(gram=recipe.gptq, percentiles=recipe.clip < 100)
  params, head = walk(
    config, params, batches, change, wanted=wanted, advance=advance
  )
  params = _ends(config, params, recipe, head)
  if recipe.float_share:
    found = mixed.search(
      config, params, batches, recipe.float_share, advance=advance
    )
    config, params = mixed.loosened(config, params, found)
  return config, params


def as_arrays(params: Params) -> Params:
  """The same model, whose weights are the arrays that they stand for.

  Its function is that of the quantized one, up to the order of sums, and one
  program serves models by many recipes. Formats of inputs and taps stay.
  """

  def one(leaf):
    if isinstance(leaf, QWeight) and leaf.input is not None:
      return dataclasses.replace(leaf, weight=as_array(leaf.weight))
    return as_array(leaf) if is_quantized(leaf) else leaf

  return jax.tree.map(one, params, is_leaf=is_quantized)


def work(config: language_model.Config, recipe: Recipe) -> int:
  """Layers that `quantize` goes through at most, in passes and a search."""
  passes = 1 + (recipe.rotation == "klt") + _transforms(recipe)
  searched = mixed.EVALUATIONS if recipe.float_share else 0
  return passes * len(language_model.layers_of(config)) + searched


def _transforms(recipe: Recipe) -> bool:
  return bool(recipe.smoothing or recipe.clusters or recipe.smooth_keys)


def prepare(
  config: language_model.Config,
  params: Params,
  recipe: Recipe,
  batches: np.ndarray | None,
  advance: Callable[[int], None] | None = None,
) -> tuple[language_model.Config, Params]:
  """The part of a recipe that leaves the model's function as it is.

  Takes and raises what `quantize` does; nothing is rounded yet.
  """
  if recipe.rotation:
    config, params = rotation.fold_norms(config, params)
    turn = rotation.hadamard(config.d_model)
    if recipe.rotation == "klt":
      notes, _ = calibrate(
        config, params, batches, wanted=Wanted(gram=True), advance=advance
      )
      turn = rotation.principal(_stream_gram(notes)) @ turn
    params = rotation.rotate_stream(config, params, turn)
  if _transforms(recipe):
    notes, _ = calibrate(config, params, batches, advance=advance)
    if recipe.clusters:
      params = reordering.reorder(config, params, notes, X, *recipe.clusters)
    if recipe.smoothing:
      stream = recipe.rotation is None
      params = smoothing.smooth(
        config, params, notes, recipe.smoothing, stream=stream
      )
    if recipe.smooth_keys:
      params = smoothing.smooth_keys(config, params, notes)
  if recipe.rotates_outputs:
    params = rotation.rotate_inputs(config, params)
  return config, params


def _stream_gram(notes: list[Notes]) -> jax.Array:
  """Sum of x x^T over all that is read of the residual stream."""
  names = [".".join(kernels[0]) for kernels in structure.READERS.values()]
  return sum(
    seen[name].gram for seen in notes for name in names if name in seen
  )


def _layer(config, recipe: Recipe, own: dict[str, Any], notes: Notes):
  """The quantized parameters of one layer."""
  for path in structure.kernels(own):
    name = ".".join(path)
    form = recipe.small_kernels if path in _SMALL else recipe.kernels
    seen = notes.get(name)
    quantized = _kernel(
      recipe, structure.at(own, path)["kernel"], form, seen, path
    )
    own = structure.put(own, (*path, "kernel"), quantized)
  if structure.has(own, ("mixer",)) and (recipe.taps or recipe.states):
    prefix = "mixer."
    seen = {
      name.removeprefix(prefix): one
      for name, one in notes.items()
      if name.startswith(prefix)
    }
    own = structure.put(
      own, ("mixer", "taps"), taps.fixed(config, recipe, seen)
    )
  if structure.has(own, ("attn",)) and recipe.cache:
    size = structure.at(own, ("attn", "k_proj"))["kernel"].shape[-1]
    each = taps.dynamic_quantizer(recipe.cache, size // config.cached_heads)
    own = structure.put(own, ("attn", "taps"), Taps(k=each, v=each))
  return own


def _kernel(
  recipe: Recipe,
  kernel: jax.Array | QWeight,
  form: str | None,
  seen: Statistics | None,
  path: structure.Path,
) -> Any:
  """One kernel in its format, and a quantizer of what it multiplies."""
  weight = rotation.plain_kernel(kernel)
  observer = Searched() if recipe.clipped else absmax
  if form is not None:
    if recipe.gptq and path not in _SMALL:
      upper = gptq.factor(seen.gram)
      if not np.isfinite(upper).all():
        raise InputError(
          f"GPTQ of {'.'.join(path)}: the activations it saw depend on each "
          "other too much: calibrate on more windows, or take another recipe"
        )
      form = formats.get(form)
      weight = gptq.gptq(weight, upper, form, observer=observer)
    else:
      weight = _nearest(weight, form, observer=observer)
  turned = isinstance(kernel, QWeight) and kernel.hadamard
  inputs = None
  if recipe.inputs is not None and recipe.dynamic:
    inputs = taps.dynamic_quantizer(recipe.inputs, kernel.shape[-2])
  elif recipe.inputs is not None:
    form = formats.get(recipe.inputs)
    clip = recipe.clip if path == _SMALL[0] else 100.0
    inputs = taps.static_quantizer(seen.percentile(clip), form, form.group)
  if inputs is None and not turned:
    return weight
  return QWeight(weight=weight, input=inputs, hadamard=turned)


def _nearest(
  weight: jax.Array, form: str, axis: int = -2, observer: Observer = absmax
) -> QTensor:
  """A weight's nearest levels, in groups that fit."""
  fitting = gptq.fitting(formats.get(form), weight.shape[axis])
  return round_to_nearest(weight, fitting, axis=axis, observer=observer)


def _ends(config, params: Params, recipe: Recipe, head: Statistics) -> Params:
  """Quantizes the head and the token table."""
  if not config.tie_embeddings:
    kernel = _kernel(
      recipe, params["lm_head"]["kernel"], recipe.head, head, (HEAD,)
    )
    params = params | {"lm_head": {"kernel": kernel}}
  if recipe.table is not None:
    table = _nearest(params["embed"]["table"], recipe.table, axis=-1)
    params = params | {"embed": {"table": table}}
  return params
