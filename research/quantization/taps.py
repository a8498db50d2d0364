"""Scales of what a state-space layer rounds besides its products.

Shapes by axis letter: E channels, H heads of P, G groups, N states.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from models.mamba_config import MambaConfig
from ops.quantized import Format, Quantizer, Taps, formats
from research.quantization import gptq, reordering
from research.quantization.recipes import Recipe
from research.quantization.statistics import PLACES, Statistics


def fixed(
  config: MambaConfig, recipe: Recipe, seen: Mapping[str, Statistics]
) -> Taps:
  """The taps of one layer, by what calibration saw there.

  Args:
    config: of the model.
    recipe: with formats of taps and states.
    seen: by name of the place.
  """
  found = Taps()
  if recipe.taps is not None:
    form = formats.get(recipe.taps)
    scale = _Scales(config, recipe, form, seen)
    found = Taps(**{name: scale(name) for name in PLACES if name in seen})
  if recipe.states is None:
    return found
  ssm = Quantizer(scales=None, format=formats.get(recipe.states))
  return dataclasses.replace(
    found, ssm_state=ssm, conv_state=_conv_state(recipe.states, seen, found)
  )


class _Scales:
  """Makes the quantizer of a place."""

  def __init__(self, config, recipe, form: Format, seen):
    self._config, self._recipe, self._form = config, recipe, form
    self._seen = seen

  def __call__(self, name: str) -> Quantizer:
    seen, form, c = self._seen[name], self._form, self._config
    if self._recipe.clusters is None or name in ("conv_x", "z"):
      largest = seen.absmax.max()
      if name == "x":
        largest = seen.percentile(self._recipe.clip)
      return static_quantizer(largest, form, "tensor")
    if name == "x":
      if c.kind == "mamba1":
        return static_quantizer(seen.absmax, form, 1)
      absmax = np.asarray(seen.absmax).reshape(c.num_heads, c.head_dim)
      labels = reordering.clusters(absmax, c.num_groups, *self._recipe.clusters)
      scales = reordering.cluster_scales(absmax, *labels)
      return static_quantizer(jnp.asarray(scales), form, 1)
    if name == "dt":
      return static_quantizer(seen.absmax, form, 1)
    # B and C are scaled by group, since heads of a group share them.
    by_group = seen.absmax.reshape(-1, c.d_state).max(axis=-1)
    if name == "conv_BC":
      return static_quantizer(by_group, form, c.d_state)
    return static_quantizer(by_group[:, None], form, "row")


def dynamic_quantizer(form: str, size: int) -> Quantizer:
  """A quantizer whose scales are those of each token.

  Args:
    form: what `formats.get` takes.
    size: of the axis that is rounded, to which groups are made to fit.

  Raises:
    ValueError: the format is for scales, or tokens would share one.
  """
  found = gptq.fitting(formats.get(form), size)
  if found.fitted or not (found.is_signed and found.keeps_rows_apart):
    raise ValueError(
      f"{form}: is no format of what tokens bring: it is for scales, tokens "
      "share one, or it fits levels to a whole tensor"
    )
  return Quantizer(scales=None, format=found)


def static_quantizer(
  largest: jax.Array, form: Format, group: int | str
) -> Quantizer:
  """A quantizer whose largest level is a magnitude, () or (..., G).

  Args:
    largest: magnitudes.
    form: of the codes.
    group: how many channels share one.
  """
  top = float(np.abs(form.levels).max())
  scales = jnp.maximum(jnp.atleast_1d(largest), 1e-12) / top
  return Quantizer(
    scales=scales.astype(jnp.float32),
    format=dataclasses.replace(form, group=group),
  )


def _conv_state(states: str, seen, taps: Taps) -> Quantizer:
  """Of the last inputs of the convolution, in the steps of these inputs."""
  scales = []
  for name in ("conv_x", "conv_BC"):
    if name not in seen:
      continue
    size = seen[name].absmax.shape[0]
    own = getattr(taps, name)
    if own is None:
      own = static_quantizer(seen[name].absmax, formats.get(states), 1)
    scales.append(jnp.repeat(own.scales, size // own.scales.shape[0]))
  form = dataclasses.replace(formats.get(states), group=1)
  return Quantizer(scales=jnp.concatenate(scales), format=form)
