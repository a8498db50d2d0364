"""Which layers keep their activations in floats: a search by evolution.

Quamba2 (arXiv:2503.22879, section 4.4): some layers of a W4A8 model become
W4A16. A candidate is the set of these layers; the best half of a population
lives on, and its mutations and crossings join it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import language_model
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.module import Params
from ops.quantized import QWeight, Taps
from research.quantization import calibration, structure
from research.search import Genetic, Genome, Subsets, Weighted, run

# As published: candidates, rounds, and how many join in a round by each way.
_HOW = Genetic(population=40, rounds=5, mutations=10, crossings=10)
# Evaluations of a search; a candidate that comes again costs none.
EVALUATIONS = _HOW.evaluations
# Batches that candidates are judged by, the last of those of calibration.
_BATCHES = 4


def search(
  config: language_model.Config,
  params: Params,
  batches: np.ndarray,
  share: float,
  *,
  seed: int = 0,
  advance: Callable[[int], None] | None = None,
) -> Genome:
  """Finds the layers whose activations had better be floats.

  Args:
    config: of the model, of Mamba.
    params: of the model, with quantized activations.
    batches: (N, B, T) int32, none of the text that the model is judged by.
    share: of the layers, at least one.
    seed: of the search.
    advance: told of every evaluation, of `EVALUATIONS`.

  Returns:
    Numbers of the layers, rising.

  Raises:
    InputError: the layers of such a model lie in one stack, which has the same
      formats throughout.
  """
  check(config)
  judge = _Judge(config, params, batches[-_BATCHES:], advance)
  count = max(1, round(share * config.num_layers))
  found = run(
    Subsets(config.num_layers, count),
    judge.losses,
    _HOW,
    seed=seed,
    preference=Weighted(),
    objectives=("loss",),
  )
  return found.genomes[found.best(Weighted())]


def check(config: language_model.Config) -> None:
  """Raises InputError where layers cannot differ."""
  if not language_model.layers_may_differ(config):
    raise InputError(
      f"a {config.family}'s layers have the same formats throughout: take a "
      "recipe that is not mixed"
    )


def loosened(
  config: MambaConfig, params: Params, layers: Genome
) -> tuple[MambaConfig, Params]:
  """The model whose activations are floats in some layers.

  Its config cuts the stacks where formats change.
  """
  own = structure.unstacked(config, params)
  own = [
    _loose(layer) if number in layers else layer
    for number, layer in enumerate(own)
  ]
  changes = [
    number
    for number in range(1, config.num_layers)
    if (number in layers) != (number - 1 in layers)
  ]
  config = dataclasses.replace(config, splits=tuple(changes))
  return config, structure.with_layers(config, params, own)


def _loose(layer: dict[str, Any]) -> dict[str, Any]:
  """A layer whose weights and states alone are of few bits."""
  for path in structure.kernels(layer):
    layer = structure.update(layer, (*path, "kernel"), _float_input)
  if structure.has(layer, ("mixer", "taps")):
    layer = structure.update(
      layer,
      ("mixer", "taps"),
      lambda taps: Taps(ssm_state=taps.ssm_state, conv_state=taps.conv_state),
    )
  return layer


def _float_input(kernel: Any) -> Any:
  if not isinstance(kernel, QWeight):
    return kernel
  if not kernel.hadamard:
    return kernel.weight
  return dataclasses.replace(kernel, input=None)


class _Judge:
  """The losses of candidates, in nats a token."""

  def __init__(self, config, params, batches, advance=None):
    self._config, self._params = config, params
    self._tight = structure.unstacked(config, params)
    self._loose = [_loose(layer) for layer in self._tight]
    self._kinds = [one.kind for one in language_model.layers_of(config)]
    self._batches = [jnp.asarray(batch) for batch in batches]
    self._advance = advance or (lambda _: None)

  def losses(self, genomes: list[Genome]) -> np.ndarray:
    """(N,); infinity where a loss is NaN."""
    found = []
    for genome in genomes:
      found.append(self._loss(genome))
      self._advance(1)
    return np.nan_to_num(found, nan=np.inf, posinf=np.inf)

  def _loss(self, genome) -> float:
    losses = []
    for tokens in self._batches:
      stream = calibration.begin(self._config, self._params, tokens)
      for number, kind in enumerate(self._kinds):
        own = (self._loose if number in genome else self._tight)[number]
        stream = calibration.run_layer(self._config, kind, own, stream)
      losses.append(_loss_of(self._config, self._params, stream, tokens))
    return float(np.mean(losses))


@functools.partial(jax.jit, static_argnums=0)
def _loss_of(config, params, stream, tokens):
  hidden = language_model.after_layers(config, params, stream)
  logits = language_model.logits(config, params, hidden[:, :-1])
  scores = jax.nn.log_softmax(logits)
  taken = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)
  return -jnp.mean(taken)
