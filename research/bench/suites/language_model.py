"""The suite of language models: decoding, prefill and training updates.

The least work of an update is its matrix products
(`research.cost.language_model`), of a decoding step what
`research.bench.suites.decoding` says, of a prompt what `prefilling` does. Speed
does not depend on the weights, which are random.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from models.errors import InputError
from models.implementations import Implementations
from models.module import num_params
from models.state_format import StateFormat
from research.bench import specs
from research.bench.case import Call, Case, Say, SuiteOfCases
from research.bench.plan import Plan
from research.bench.suites import decoding, prefilling
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.cost import language_model as cost
from research.cost.roofline import Phase
from research.language_model import architectures, learn, training
from research.language_model.options import Options

# Updates of one call.
_UPDATES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(SuiteOfCases):
  """Which models, and on what.

  Attributes:
    decode: see `research.bench.suites.decoding.parse`.
    prefill: see `research.bench.suites.prefilling.parse`.
    train: "ARCH/PRESET:BxL" each, of `research.language_model.options`.
    steps: implementations of a decoding step, of `specs.STEPS`.
    tokens: decoded in one call.
    state_format: of recurrent states in decoding and prefill, see
      `StateFormat.parse`.
    weights_format: of weights in decoding and prefill, see `decoding.Decoding`,
      or "bfloat16"; one for each format of states, or one for all.
    keep_pages: shares of the pages of a cache that decoding steps read, a case
      each; 1 is without pages.
    unroll: layers in one iteration of the scan in training; 0 for all.
    remat: compute layers again in the backward pass.
  """

  decode: Sequence[str] = ()
  prefill: Sequence[str] = ()
  train: Sequence[str] = ()
  steps: Sequence[str] = ("xla", "mosaic_gpu")
  tokens: int = 64
  state_format: Sequence[str] = ("float32",)
  weights_format: Sequence[str] = ("bfloat16",)
  keep_pages: Sequence[float] = (1.0,)
  unroll: int = 1
  remat: bool = False

  def cases(self, plan: Plan, note: Say) -> Iterator[Case]:
    """Yields a case a decoding, a prompt and an update.

    Raises:
      InputError: a name does not exist.
    """
    del note
    specs.check_language_model(**vars(self), peers=plan.peers or ())
    formats = self._formats()
    decoded = [
      decoding.parse(
        spec,
        keep_pages=None if keep == 1 else keep,
        tokens=self.tokens,
        **kept,
      )
      for spec in self.decode
      for kept in formats
      for keep in self.keep_pages
    ]
    prompts = [
      prefilling.parse(spec, **kept)
      for spec in self.prefill
      for kept in formats
    ]
    trained = [(spec, specs.trained(spec)) for spec in self.train]
    return self._cases(decoded, prompts, trained)

  def _formats(self) -> list[dict[str, Any]]:
    """Options of `Decoding` for each pair of formats.

    Raises:
      InputError: one does not exist, or there are several of different number.
    """
    states, weights = list(self.state_format), list(self.weights_format)
    most = max(len(states), len(weights))
    if not {len(states), len(weights)} <= {1, most}:
      raise InputError(
        f"weights_format: {len(weights)} for {len(states)} of state_format: "
        "give as many, or one for all"
      )
    for form in weights:
      if form != "bfloat16":
        decoding.check_formats(form)
    return [
      {
        "state_format": StateFormat.parse(states[i % len(states)]),
        "weights_format": None if form == "bfloat16" else form,
      }
      for i in range(most)
      for form in [weights[i % len(weights)]]
    ]

  def _cases(self, decoded, prompts, trained) -> Iterator[Case]:
    for what in decoded:
      yield decoding.case(what, self.steps)
    for what in prompts:
      yield prefilling.case(what)
    for spec, options in trained:
      yield self._update(spec, options)

  def _update(self, spec: str, options: Options) -> Case:
    model = self._model(options)
    flops = cost.training(model.config, options.length)
    return Case(
      op="update",
      model=spec.partition(":")[0],
      shape=f"B{options.batch} L{options.length}",
      dtype=options.dtype,
      which="fwd+bwd",
      phases=(Phase(options.tokens_per_step * flops, 0.0),),
      ours={"default": functools.partial(_call, model, options)},
      amounts={"tokens": options.tokens_per_step},
      columns={
        "params": num_params(jax.eval_shape(model.init, jax.random.key(0)))
      },
    )

  def _model(self, options: Options) -> architectures.Model:
    cudnn = options.arch == "transformer" and jax.default_backend() == "gpu"
    return architectures.Model(
      config=architectures.config_of(options, specs.VOCAB),
      dtype=options.dtype,
      implementations=Implementations(attention="cudnn" if cudnn else None),
      document_mask=False,
      unroll=self.unroll,
      remat=self.remat,
    )


def _call(model: architectures.Model, options: Options) -> Call:
  """Updates on random tokens, one after the other."""
  schedule, tx = training.make_optimizer(options)
  mesh = mesh_lib.data_mesh(1)
  step = learn.make_step(
    model, tx, schedule, vocab_size=specs.VOCAB, z_loss=options.z_loss
  )
  step = state_lib.jit_step(step, mesh)
  draw = np.random.default_rng(0).integers
  shape = options.batch, options.length
  batch = {
    "tokens": draw(specs.VOCAB, size=(shape[0], shape[1] + 1), dtype=np.int32),
    "segment_ids": np.zeros(shape, np.int32),
  }
  batch = mesh_lib.shard_batch(mesh, batch)
  params = jax.jit(model.init)(jax.random.key(0))
  state = state_lib.create_state(params, tx, jax.random.key(0))

  def updates():
    nonlocal state
    for _ in range(_UPDATES):
      state, metrics = step(state, batch, None)
    return metrics

  return Call(start=updates, count=_UPDATES)
