"""How fast regression LMs train and draw, against the device and a peer.

The least work of an update is its matrix products, of a call that draws those
of the encoder, and then for each token of the numbers to read the keys and
values of the texts once, or its products. Weights are random: speed does not
depend on them. The peer is google-deepmind/regress-lm (`research.bench.
regress_lm`), of equal layers, width, heads, vocabularies and lengths; its MLPs
have two matrices of 4 D, ours three of 8/3 D.
"""

import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
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
from research.bench import ceilings, profiling
from research.bench.peers import regress_lm
from research.core import mesh as mesh_lib
from research.core import state as state_lib
from research.cost.roofline import Phase
from research.regression_lm import learn, sampling, training
from research.regression_lm.likelihood import Model
from research.regression_lm.options import Options
from research.regression_lm.token_batches import Texts

OURS, PEER = "frugax", "regress-lm"
DTYPES = ("bfloat16", "float32")
Row = dict[str, Any]
Say = Callable[[str], None]

# Those of T5, the peer's vocabulary of texts; and its fixed number of heads.
_VOCAB, _HEADS = 32100, 8
_UPDATES, _KERNELS = 4, 25
_SIZE = r"(?P<d_model>\d+)/(?P<encoder_layers>\d+)\+(?P<decoder_layers>\d+)"
_TRAIN = rf"{_SIZE}:(?P<batch>\d+)x(?P<length>\d+):(?P<dtype>\w+)"
_SAMPLE = (
  rf"{_SIZE}:(?P<texts>\d+)x(?P<length>\d+)x(?P<draws>\d+):(?P<dtype>\w+)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to time.

  Attributes:
    train: "WIDTH/ENCODER+DECODER:BATCHxLENGTH:DTYPE" each, with the numbers of
      layers of both sides, such as 512/2+2:64x2048:bfloat16.
    sample: "WIDTH/ENCODER+DECODER:TEXTSxLENGTHxDRAWS:DTYPE" each.
    repeats: measurements of a row.
    peer: folder of a checkout of the peer, or None.
    peer_python: the interpreter that runs it; None for this one.
    peer_texts: of one call of its decoding; its time for all is scaled up.
    peer_settings: of `research.bench.peers.regress_lm`.
    peer_compile: let it compile its updates, as it does by default.
    profile: name the kernels that ours goes to.
  """

  train: Sequence[str] = ()
  sample: Sequence[str] = ()
  repeats: int = 5
  peer: str | None = None
  peer_python: str | None = None
  peer_texts: int = 16
  peer_settings: Sequence[str] = regress_lm.SETTINGS
  peer_compile: bool = True
  profile: bool = False

  def check(self) -> tuple[list[Row], list[Row]]:
    """The work of `train` and `sample`.

    Raises:
      InputError: one is not written so, or the peer is not there.
    """
    for setting in self.peer_settings:
      if setting not in regress_lm.SETTINGS:
        raise InputError(
          f"peer_settings={setting}: take some of {regress_lm.SETTINGS}"
        )
    package = self.peer and pathlib.Path(self.peer) / "regress_lm"
    if package and not package.is_dir():
      raise InputError(
        f"peer={self.peer}: has no folder regress_lm: give a checkout of "
        "google-deepmind/regress-lm"
      )
    return (
      [_parse("train", _TRAIN, text) for text in self.train],
      [_parse("sample", _SAMPLE, text) for text in self.sample],
    )


def _parse(name: str, pattern: str, text: str) -> Row:
  found = re.fullmatch(pattern, text)
  work = found and {
    key: value if key == "dtype" else int(value)
    for key, value in found.groupdict().items()
  }
  if (
    not work
    or 0 in work.values()
    or work["dtype"] not in DTYPES
    or work["d_model"] % (2 * _HEADS)
  ):
    shape = "BATCHxLENGTH" if name == "train" else "TEXTSxLENGTHxDRAWS"
    raise InputError(
      f"{name}={text}: write WIDTH/ENCODER+DECODER:{shape}:DTYPE, such as "
      f"512/2+2:{'64x2048' if name == 'train' else '512x2048x64'}:bfloat16, "
      f"with WIDTH a multiple of {2 * _HEADS}"
    )
  return work


def run(plan: Plan, say: Say) -> Iterator[Row]:
  """Yields a row for everything that is timed, the peer's first.

  Args:
    plan: what to time.
    say: prints a line.

  Raises:
    InputError: the plan does not do.
  """
  train, sample = plan.check()
  if plan.peer:
    # All of it before jax, in whoever keeps rows, takes the device's memory.
    rows = _peer_rows(plan, train, sample, say)
    yield from [_told(row, say) for row in rows]
  else:
    say("peer regress-lm is left out: give --peer=CHECKOUT")
  for work in train:
    yield _told(_update_row(plan, work), say)
  for work in sample:
    yield _told(_draw_row(plan, work), say)


def _told(row: Row, say: Say) -> Row:
  line = f"{row['work']} {row['model']} {row['shape']} {row['system']}, "
  line += f"{row['setting']}: {1e3 * row['seconds']:,.2f} ms, "
  line += f"{row['examples_per_second']:,.1f} texts/s"
  if "share" in row:
    line += f", {row['share']:.1%} of what the device can"
  say(line)
  return row


def _named(work: Row) -> Row:
  size = f"{work['d_model']}/{work['encoder_layers']}+{work['decoder_layers']}"
  count = work.get("batch", work.get("texts"))
  draws = f" S{work['draws']}" if "draws" in work else ""
  return {"model": size, "shape": f"B{count} L{work['length']}{draws}"}


def _peer_rows(plan: Plan, train, sample, say: Say) -> Iterator[Row]:
  def settings(work):
    wide = ("float32", "tf32")
    of = wide if work["dtype"] == "float32" else ("bfloat16",)
    return [work | {"setting": s} for s in of if s in plan.peer_settings]

  task = {
    "train": [each for work in train for each in settings(work)],
    "sample": [each for work in sample for each in settings(work)],
    "vocab_size": _VOCAB,
    "repeats": plan.repeats,
    "peer_texts": plan.peer_texts,
    "compile": plan.peer_compile,
  }
  command = [plan.peer_python or sys.executable, "-m", regress_lm.__name__]
  root = pathlib.Path(__file__).resolve().parents[2]
  paths = str(root), os.environ.get("PYTHONPATH")
  done = subprocess.Popen(
    [*command, os.path.abspath(plan.peer), json.dumps(task)],
    cwd=root,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    stdout=subprocess.PIPE,
    text=True,
  )
  with done:
    for line in done.stdout:
      if not line.startswith("{"):
        continue
      found = json.loads(line)
      count = found.get("batch", found.get("texts"))
      yield {
        **_named(found),
        **found,
        "system": PEER,
        "examples_per_second": count / found["seconds"],
      }
  if done.returncode:
    say(f"peer regress-lm, the rest, is left out: exit code {done.returncode}")


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
    num_heads=_HEADS,
    num_kv_heads=_HEADS,
    head_dim=d_model // _HEADS,
    encoder_layers=work["encoder_layers"],
    decoder_layers=work["decoder_layers"],
  )
  compute = Compute(dtype=work["dtype"], unroll=0)
  return Model(config=config, codec=codec, compute=compute)


def encoder_flops(config: RegressionLMConfig, length: int) -> float:
  """Products of a forward pass over a text, the decoder's keys included."""
  c = config
  heads = 2 * c.num_heads + 2 * c.num_kv_heads
  layer = 2.0 * c.d_model * c.head_dim * heads + 6.0 * c.d_model * c.d_ff
  layer += 4.0 * length * c.num_heads * c.head_dim
  keys = 4.0 * c.d_model * c.num_kv_heads * c.head_dim
  return length * (c.encoder_layers * layer + c.decoder_layers * keys)


def decoder_flops(config: RegressionLMConfig, length: int) -> float:
  """Products of one token of the numbers, given a text of `length`."""
  c = config
  heads = 4 * c.num_heads + 2 * c.num_kv_heads
  layer = 2.0 * c.d_model * c.head_dim * heads + 6.0 * c.d_model * c.d_ff
  layer += 4.0 * c.num_heads * c.head_dim * (length + c.target_length / 2)
  return c.decoder_layers * layer + 2.0 * c.d_model * c.target_vocab_size


def _texts(work: Row, count: int) -> Texts:
  draw = np.random.default_rng(0).integers
  length = work["length"]
  tokens = draw(_VOCAB, size=count * length, dtype=np.int32)
  return Texts(tokens, length * np.arange(count + 1), 0)


def _params(model: Model):
  draw = jax.jit(lambda key: regression_lm.init(model.config, key))
  return draw(jax.random.key(0))


def _seconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
  """Seconds of the first call, and the median of others."""
  times = []
  for _ in range(repeats + 2):
    began = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - began)
  return times[0], statistics.median(times[2:])


def _finished(plan: Plan, spec: Row, once, **columns: Any) -> Row:
  """The row of ours; `once` starts what is profiled."""
  limits, source = ceilings.find(spec["dtype"])
  floor = limits.floor(columns.pop("phases"))
  count = spec.get("batch", spec.get("texts"))
  heads = _HEADS, _HEADS, spec["d_model"] // _HEADS
  kernel = attention.cudnn_runs(*heads, spec["dtype"])
  row = {
    **_named(spec),
    **spec,
    "system": OURS,
    "attention": "cudnn" if kernel else "xla",
    "setting": "tf32" if spec["dtype"] == "float32" else spec["dtype"],
    **columns,
    "examples_per_second": count / columns["seconds"],
    "floor_seconds": floor,
    "share": floor / columns["seconds"],
    "peak": source,
  }
  memory = jax.local_devices()[0].memory_stats() or {}
  row["peak_bytes"] = memory.get("peak_bytes_in_use")
  if plan.profile:
    kernels = profiling.kernels(once)
    row["busy_ms"] = sum(kernel.ms for kernel in kernels)
    row["kernels"] = [dataclasses.asdict(k) for k in kernels[:_KERNELS]]
  return row


def _update_row(plan: Plan, work: Row) -> Row:
  model, mesh = make_model(work), mesh_lib.data_mesh(1)
  options = Options(optimizer="muon", dtype=work["dtype"], clip_norm=0.0)
  schedule, tx = training.make_optimizer(options)
  step = state_lib.jit_step(
    learn.make_step(model, tx, schedule, mesh, options.loss()), mesh
  )
  texts = _texts(work, work["batch"])
  tokens, lengths = texts.rows(np.arange(work["batch"]), work["length"])
  targets = model.codec.encode([0.1 + 0.01 * i for i in range(work["batch"])])
  batch = mesh_lib.shard_batch(
    mesh, {"tokens": tokens, "lengths": lengths, "targets": targets}
  )
  params = _params(model)
  state = state_lib.create_state(params, tx, jax.random.key(0))

  def updates(count=_UPDATES):
    nonlocal state
    for _ in range(count):
      state, metrics = step(state, batch, None)
    return metrics

  first, seconds = _seconds(updates, plan.repeats)
  config, length = model.config, work["length"]
  flops = encoder_flops(config, length)
  flops += config.target_length * decoder_flops(config, length)
  flops *= 3 * work["batch"]
  return _finished(
    plan,
    work,
    lambda: updates(1),
    work="update",
    seconds=seconds / _UPDATES,
    first_seconds=first,
    phases=(Phase(flops, 0.0),),
    flops=flops,
    params=regression_lm.num_params(config),
  )


def _draw_row(plan: Plan, work: Row) -> Row:
  model = make_model(work)
  params = jax.tree.map(lambda leaf: leaf.astype(work["dtype"]), _params(model))
  texts = _texts(work, work["texts"])
  keys = jax.random.split(jax.random.key(0), work["texts"])

  def draws():
    ids = sampling.draw_texts(
      model, params, texts, keys, num_samples=work["draws"]
    )
    return model.codec.values(ids)

  first, seconds = _seconds(draws, plan.repeats)
  config, length = model.config, work["length"]
  encoding = work["texts"] * encoder_flops(config, length)
  rows = work["texts"] * work["draws"]
  token = rows * decoder_flops(config, length)
  item = jnp.dtype(work["dtype"]).itemsize
  keys_of = 2 * config.decoder_layers * config.num_kv_heads * config.head_dim
  read = float(item * work["texts"] * length * keys_of)
  phases = (
    Phase(encoding, 0.0),
    *[Phase(token, read)] * config.target_length,
  )
  return _finished(
    plan,
    work,
    draws,
    work="draws",
    seconds=seconds,
    first_seconds=first,
    phases=phases,
    flops=encoding + config.target_length * token,
    bytes=config.target_length * read,
    params=regression_lm.num_params(config),
  )
