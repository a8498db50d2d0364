"""The suite of regression LMs: updates and draws, beside a peer.

The least work of an update is its matrix products, of a call that draws those
of the encoder, and then for each token of the numbers to read the keys and
values of the texts once, or its products. Weights are random: speed does not
depend on them. The peer is google-deepmind/regress-lm (`research.bench.peers.
regress_lm`), of equal layers, width, heads, vocabularies and lengths; its MLPs
have two matrices of 4 D, ours three of 8/3 D.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import attention, regression_lm
from models.errors import InputError
from models.numbers import Ieee, TargetCodec
from models.regression_lm import Compute
from models.regression_lm_config import RegressionLMConfig
from research.bench import specs
from research.bench.case import (
  Call,
  Case,
  Measured,
  Peer,
  Row,
  Say,
  SuiteOfCases,
)
from research.bench.peers import regress_lm
from research.bench.plan import Plan
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.cost import regression_lm as cost
from research.cost.roofline import Phase
from research.regression_lm import learn, sampling, training
from research.regression_lm.likelihood import Model
from research.regression_lm.options import Options
from research.regression_lm.token_batches import Texts

PEER = "regress-lm"

# Those of T5, the peer's vocabulary of texts.
_VOCAB = 32100
# Updates of one call.
_UPDATES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(SuiteOfCases):
  """Which models, and on what.

  Attributes:
    train: "WIDTH/ENCODER+DECODER:BATCHxLENGTH:DTYPE" each, with the numbers of
      layers of both sides, such as 512/2+2:64x2048:bfloat16.
    sample: "WIDTH/ENCODER+DECODER:TEXTSxLENGTHxDRAWS:DTYPE" each.
    peer: folder of a checkout of the peer, or None.
    peer_python: the interpreter that runs it; None for this one.
    peer_texts: of one call of its decoding; its time for all is scaled up.
    peer_settings: of `research.bench.peers.regress_lm`.
    peer_compile: let it compile its updates, as it does by default.
  """

  train: Sequence[str] = ()
  sample: Sequence[str] = ()
  peer: str | None = None
  peer_python: str | None = None
  peer_texts: int = 16
  peer_settings: Sequence[str] = regress_lm.SETTINGS
  peer_compile: bool = True

  def cases(self, plan: Plan, note: Say) -> Iterator[Case]:
    """Yields a case an update and a call that draws.

    Raises:
      InputError: one is not written so, or the peer is not there.
    """
    specs.check_names("peer_settings", self.peer_settings, regress_lm.SETTINGS)
    package = self.peer and pathlib.Path(self.peer) / "regress_lm"
    if package and not package.is_dir():
      raise InputError(
        f"peer={self.peer}: has no folder regress_lm: give a checkout of "
        "google-deepmind/regress-lm"
      )
    train = [specs.regression("train", text) for text in self.train]
    sample = [specs.regression("sample", text) for text in self.sample]
    return self._cases(train, sample, plan.repeats, note)

  def _cases(self, train, sample, repeats: int, note: Say) -> Iterator[Case]:
    timed = []
    if self.peer:
      # All of it before jax takes the device's memory.
      timed = list(self._timed_peer(train, sample, repeats, note))
    else:
      note("peer regress-lm is left out: give --peer=CHECKOUT")
    for op, make, works in (
      ("update", _update_call, train),
      ("draws", _draw_call, sample),
    ):
      for work in works:
        like = lambda row, op=op, work=work: (
          row["work"] == op and row.items() >= work.items()
        )
        yield _case(op, make, work, [row for row in timed if like(row)])

  def _timed_peer(
    self, train, sample, repeats: int, note: Say
  ) -> Iterator[Row]:
    """The rows that the peer prints in a process of its own."""

    def settings(work):
      wide = ("float32", "tf32")
      of = wide if work["dtype"] == "float32" else ("bfloat16",)
      return [work | {"setting": s} for s in of if s in self.peer_settings]

    task = {
      "train": [each for work in train for each in settings(work)],
      "sample": [each for work in sample for each in settings(work)],
      "vocab_size": _VOCAB,
      "repeats": repeats,
      "peer_texts": self.peer_texts,
      "compile": self.peer_compile,
    }
    command = [self.peer_python or sys.executable, "-m", regress_lm.__name__]
    root = pathlib.Path(__file__).resolve().parents[3]
    paths = str(root), os.environ.get("PYTHONPATH")
    process = subprocess.Popen(
      [*command, os.path.abspath(self.peer), json.dumps(task)],
      cwd=root,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
      stdout=subprocess.PIPE,
      text=True,
    )
    with process:
      for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
          yield json.loads(line)
    if process.returncode:
      note(f"peer regress-lm is left out: exit code {process.returncode}")


def _case(op: str, make: Any, work: Row, timed: Sequence[Row]) -> Case:
  """A case of work, with what was timed of the peer."""
  count = work.get("batch", work.get("texts"))
  draws = f" S{work['draws']}" if "draws" in work else ""
  model = make_model(work)
  heads = specs.HEADS, specs.HEADS, work["d_model"] // specs.HEADS
  cudnn = attention.cudnn_runs(*heads, work["dtype"])
  return Case(
    op=op,
    model=f"{work['d_model']}/{work['encoder_layers']}"
    f"+{work['decoder_layers']}",
    shape=f"B{count} L{work['length']}{draws}",
    dtype=work["dtype"],
    which="fwd+bwd" if op == "update" else "fwd",
    phases=_phases(model.config, work),
    ours={
      f"{'cudnn' if cudnn else 'xla'} attention": functools.partial(
        make, model, work
      )
    },
    peers=[
      Peer(name=PEER, ways={_detail(row): functools.partial(_measured, row)})
      for row in timed
    ],
    amounts={"texts": count},
    columns={"params": regression_lm.num_params(model.config)},
  )


def _detail(row: Row) -> str:
  """How the peer ran, and what of its time was scaled up."""
  detail = row["setting"]
  if not row.get("compiled", True):
    detail += ", not compiled"
  if row.get("timed_texts", row.get("texts")) != row.get("texts"):
    detail += f", scaled up from {row['timed_texts']} texts"
  return detail


def _measured(row: Row) -> Measured:
  names = "first_seconds", "params", "peak_bytes", "torch", "not_compiled"
  columns = {f"peer_{name}": row[name] for name in names if name in row}
  return Measured(seconds=row["seconds"], columns=columns)


def _phases(config: RegressionLMConfig, work: Row) -> tuple[Phase, ...]:
  """The products of an update; of draws, the texts and then each token."""
  length = work["length"]
  if "batch" in work:
    return (Phase(work["batch"] * cost.update(config, length), 0.0),)
  encoding = work["texts"] * cost.encoder(config, length)
  token = work["texts"] * work["draws"] * cost.decoder(config, length)
  keys = 2 * config.decoder_layers * config.num_kv_heads * config.head_dim
  item = jnp.dtype(work["dtype"]).itemsize
  read = float(item * work["texts"] * length * keys)
  return Phase(encoding, 0.0), *[Phase(token, read)] * config.target_length


def make_model(work: Row) -> Model:
  """Ours, of the peer's sizes."""
  codec = TargetCodec(format=Ieee())
  d_model = work["d_model"]
  config = RegressionLMConfig(
    vocab_size=_VOCAB,
    target_vocab_size=len(codec.tokens),
    target_length=codec.length,
    d_model=d_model,
    # As many weights as the peer's two matrices have, or some more.
    d_ff=-(-8 * d_model // 3 // 64) * 64,
    num_heads=specs.HEADS,
    num_kv_heads=specs.HEADS,
    head_dim=d_model // specs.HEADS,
    encoder_layers=work["encoder_layers"],
    decoder_layers=work["decoder_layers"],
  )
  compute = Compute(dtype=work["dtype"], unroll=0)
  return Model(config=config, codec=codec, compute=compute)


def _texts(work: Row, count: int) -> Texts:
  draw = np.random.default_rng(0).integers
  length = work["length"]
  tokens = draw(_VOCAB, size=count * length, dtype=np.int32)
  return Texts(tokens, length * np.arange(count + 1), 0)


def _params(model: Model):
  draw = jax.jit(lambda key: regression_lm.init(model.config, key))
  return draw(jax.random.key(0))


def update(
  work: Row,
) -> tuple[Callable, Callable[[jax.Array], state_lib.TrainState], Row]:
  """A step, what makes its state of a key, and a batch on the host.

  Args:
    work: of `specs.regression`.
  """
  model = make_model(work)
  options = Options(optimizer="muon", dtype=work["dtype"], clip_norm=0.0)
  schedule, tx = training.make_optimizer(options)
  step = learn.make_step(model, tx, schedule, options.loss())
  texts = _texts(work, work["batch"])
  tokens, lengths = texts.rows(np.arange(work["batch"]), work["length"])
  targets = model.codec.encode([0.1 + 0.01 * i for i in range(work["batch"])])
  batch = {"tokens": tokens, "lengths": lengths, "targets": targets}

  def create(key):
    params = regression_lm.init(model.config, key)
    return state_lib.create_state(params, tx, key)

  return step, create, batch


def _update_call(model: Model, work: Row) -> Call:
  del model
  mesh = mesh_lib.data_mesh(1)
  step, create, batch = update(work)
  step = state_lib.jit_step(step, mesh)
  batch = mesh_lib.shard_batch(mesh, batch)
  state = mesh_lib.build(mesh, create, jax.random.key(0))

  def updates():
    nonlocal state
    for _ in range(_UPDATES):
      state, metrics = step(state, batch, None)
    return metrics

  return Call(start=updates, count=_UPDATES, columns=_memory)


def _draw_call(model: Model, work: Row) -> Call:
  params = jax.tree.map(lambda leaf: leaf.astype(work["dtype"]), _params(model))
  texts = _texts(work, work["texts"])
  keys = jax.random.split(jax.random.key(0), work["texts"])

  def draws():
    ids = sampling.draw_texts(
      model, params, texts, keys, num_samples=work["draws"]
    )
    return model.codec.values(ids)

  return Call(start=draws, columns=_memory)


def _memory(_: Any) -> Row:
  memory = jax.local_devices()[0].memory_stats() or {}
  return {"peak_bytes": memory.get("peak_bytes_in_use")}
