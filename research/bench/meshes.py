"""Times of training updates on meshes: tokens a second, memory, collectives.

Weights are random, tokens are, too: speed depends on neither.
"""

import dataclasses
import time
from typing import Any, Self

import jax
import numpy as np

from models import language_model
from models.errors import InputError
from models.implementations import Implementations
from research.bench import specs
from research.core import mesh as mesh_lib
from research.core import mesh_shape
from research.core import state as state_lib
from research.cost import language_model as cost
from research.language_model import learn, training
from research.language_model.architectures import Model
from research.language_model.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One update to time.

  Attributes:
    name: of the model.
    config: of it.
    batch: rows.
    length: tokens of a row.
    shape: of the mesh.
  """

  name: str
  config: language_model.Config
  batch: int
  length: int
  shape: dict[str, int]

  @classmethod
  def parse(cls, text: str) -> Self:
    """The case of "MODEL:BxL@MESH", as in "mamba2_1_3b:8x4096@fsdp:2".

    Raises:
      InputError: it is not written so, or there is no such model.
    """
    spec, at, shape = text.partition("@")
    name, _, numbers = spec.partition(":")
    models = specs.models()
    parts = numbers.split("x")
    whole = len(parts) == 2 and all(p.isdecimal() and int(p) for p in parts)
    if not (at and whole and name in models):
      raise InputError(
        f"--case={text}: write MODEL:BxL@MESH, as in mamba2_1_3b:8x4096@fsdp:2,"
        f" with MODEL one of {', '.join(models)}"
      )
    return cls(
      name=name,
      config=models[name](),
      batch=int(parts[0]),
      length=int(parts[1]),
      shape=mesh_shape.parse(shape),
    )


def timed(
  case: Case, *, dtype: str, attention: str | None, updates: int
) -> dict[str, Any]:
  """A row of results: an update's least time of three, and what it holds.

  Args:
    case: what is timed.
    dtype: of activations; parameters and AdamW's moments are float32.
    attention: implementation, or None.
    updates: of one measurement.

  Raises:
    InputError: the mesh does not do.
  """
  c, mesh = case.config, mesh_lib.make(case.shape)
  mesh_lib.check_batch(mesh, case.batch)
  mesh_lib.check_length(mesh, case.length)
  model = Model(
    config=c,
    dtype=dtype,
    implementations=Implementations(attention=attention),
    document_mask=False,
    remat=True,
  )
  mesh_lib.check_used(mesh, language_model.abstract_params(c))
  schedule, tx = training.make_optimizer(Options(steps=1000))
  step = learn.make_step(model, tx, schedule, vocab_size=c.vocab_size)
  state = mesh_lib.build(
    mesh,
    lambda key: state_lib.create_state(model.init(key), tx, key),
    jax.random.key(0),
  )
  draw = np.random.default_rng(0).integers
  tokens = draw(c.vocab_size, size=(case.batch, case.length + 1))
  batch = {
    "tokens": tokens.astype(np.int32),
    "segment_ids": np.zeros((case.batch, case.length), np.int32),
  }
  batch = mesh_lib.shard_batch(mesh, batch)
  began = time.perf_counter()
  lowered = state_lib.compiled(step, mesh, state).lower(state, batch, None)
  run = lowered.compile()
  compiling = time.perf_counter() - began
  times = []
  for _ in range(3):
    state, metrics = run(state, batch, None)
    jax.block_until_ready(metrics)
    began = time.perf_counter()
    for _ in range(updates):
      state, metrics = run(state, batch, None)
    loss = float(metrics["loss"])
    times.append((time.perf_counter() - began) / updates)
  memory, text = run.memory_analysis(), run.as_text()
  held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  seconds, count = min(times), case.batch * case.length
  return {
    "system": "scale",
    "model": case.name,
    "batch": case.batch,
    "length": case.length,
    "mesh": mesh_shape.words(case.shape),
    "devices": mesh.size,
    "dtype": dtype,
    "ms": 1e3 * seconds,
    "tokens_per_second": count / seconds,
    "tflops_per_device": (
      cost.training(c, case.length) * count / seconds / mesh.size / 1e12
    ),
    "gib_per_device": held / 2**30,
    "loss": loss,
    "compile_seconds": compiling,
    "collectives": mesh_lib.collectives(text),
  }
