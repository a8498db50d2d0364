"""The suite of language models: decoding and training updates.

The least work of an update is its matrix products
(`research.cost.language_model`), of a decoding step what
`research.bench.suites.decoding` says. Speed does not depend on the weights,
which are random.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from models.implementations import Implementations
from models.module import num_params
from models.state_format import StateFormat
from research.bench import specs
from research.bench.case import Call, Case, Say, SuiteOfCases
from research.bench.plan import Plan
from research.bench.suites import decoding
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
    train: "ARCH/PRESET:BxL" each, of `research.language_model.options`.
    steps: implementations of a decoding step, of `specs.STEPS`.
    tokens: decoded in one call.
    state_format: of recurrent states in decoding, see `StateFormat.parse`.
    weights_format: of weights in decoding, see `decoding.Decoding`.
    keep_pages: shares of the pages of a cache that decoding steps read, a case
      each; 1 is without pages.
    unroll: layers in one iteration of the scan in training; 0 for all.
    remat: compute layers again in the backward pass.
  """

  decode: Sequence[str] = ()
  train: Sequence[str] = ()
  steps: Sequence[str] = specs.STEPS
  tokens: int = 64
  state_format: str = "float32"
  weights_format: str | None = None
  keep_pages: Sequence[float] = (1.0,)
  unroll: int = 1
  remat: bool = False

  def cases(self, plan: Plan, note: Say) -> Iterator[Case]:
    """Yields a case a decoding and an update.

    Raises:
      InputError: a name does not exist.
    """
    del note
    specs.check_language_model(**vars(self), peers=plan.peers or ())
    options = {
      "tokens": self.tokens,
      "state_format": StateFormat.parse(self.state_format),
      "weights_format": self.weights_format,
    }
    decoding.check_formats(self.weights_format)
    decoded = [
      decoding.parse(spec, keep_pages=None if keep == 1 else keep, **options)
      for spec in self.decode
      for keep in self.keep_pages
    ]
    trained = [(spec, specs.trained(spec)) for spec in self.train]
    return self._cases(decoded, trained)

  def _cases(self, decoded, trained) -> Iterator[Case]:
    for what in decoded:
      yield decoding.case(what, self.steps)
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
