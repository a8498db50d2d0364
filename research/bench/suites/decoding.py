"""Cases of decoding: a model with random weights, one token after the other.

Timed is `research.decoding.loop` with the likeliest tokens, as texts are drawn.

The least work of a step is to read the weights and the keys and values of the
context once, and to read and write a recurrent state once, in the bits that
they are kept in. The token table counts only where it is the head too. Speed
does not depend on the weights.
"""

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models import language_model
from models.attamba_config import AttambaConfig
from models.caches.paged import PageBudget
from models.errors import InputError
from models.implementations import Implementations
from models.mamba_config import MambaConfig
from models.quantized import KERNELS, has_weights, quantize_params
from models.state_format import StateFormat
from models.transformer_config import TransformerConfig
from ops import dispatch
from ops.quantized import formats
from research.bench import specs
from research.bench.case import Call, Case, Peer
from research.bench.peers import mamba_ssm_decode, transformers_decode
from research.cost import decode_step, recurrent_step
from research.cost.roofline import Phase
from research.cost.sizes import nbytes
from research.decoding import loop, plain
from research.decoding.sampling import Sampling

Config = language_model.Config

# Weights whose format is asked for; that of other kernels is int8, since their
# depth is small or no multiple of a group.
_WIDE = r".*\.(in|out|q|k|v|o|gate|up|down)_proj\.kernel|lm_head\.kernel"
# Tokens of the comparison with float32, and slots for them; with pages there
# are as many of these as the kernel wants.
_PROMPT, _SLOTS, _SLOTS_OF_PAGES = 4, 64, 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """What is decoded.

  Attributes:
    name: of the model.
    config: of the model.
    batch: rows.
    context: tokens that a Transformer's cache holds; 0 of a recurrent model.
    tokens: of one call, which begins at the same context every time.
    state_format: of recurrent states.
    weights_format: "WEIGHTS" or "WEIGHTS/INPUTS", formats of what products
      read, such as int4:128/int8; None for bfloat16.
    keep_pages: share of the pages of a Transformer's cache that a step reads;
      None for all slots, without pages.
  """

  name: str
  config: Config
  batch: int
  context: int
  tokens: int = 64
  state_format: StateFormat = StateFormat(ssm="float32")
  weights_format: str | None = None
  keep_pages: float | None = None


def parse(spec: str, **options: Any) -> Decoding:
  """What "MODEL:BATCH" or "MODEL:BATCHxCONTEXT" asks for.

  Args:
    spec: the context is of Transformers alone.
    **options: more of `Decoding`.

  Raises:
    InputError: it is not written so, or there is no such model.
  """
  name, config, batch, context = specs.decoded(spec)
  if options.get("keep_pages") is not None and not context:
    raise InputError(f"keep_pages: {spec} has no cache: leave it out")
  return Decoding(
    name=name, config=config, batch=batch, context=context, **options
  )


def check_formats(weights_format: str | None) -> None:
  """Checks what `Decoding.weights_format` may be.

  Raises:
    InputError: it names no format, or one that is for scales.
  """
  for form in (weights_format or "int8").split("/"):
    try:
      found = formats.get(form)
    except ValueError as error:
      raise InputError(f"weights_format={weights_format}: {error}") from None
    if not found.is_signed:
      raise InputError(
        f"weights_format={weights_format}: {form} is for scales and has no "
        "negative level: name another, such as int4"
      )


def case(what: Decoding, steps: Sequence[str]) -> Case:
  """The case of one model, by implementations of `specs.STEPS`."""
  runner, phase = _Runner(what), _phase(what)
  return Case(
    op="decode",
    model=what.name,
    shape=_shape(what),
    dtype="bfloat16",
    which="fwd",
    phases=(phase,),
    ours={step: functools.partial(runner.call, step) for step in steps},
    peers=_peers(what),
    amounts={"tokens": what.batch},
    columns={"bytes_moved": phase.bytes} | formats_of(what),
  )


def formats_of(what: Decoding) -> dict[str, Any]:
  """Columns: formats, and bytes of weights and of the state of all rows."""
  recurrent = own_state_format(what)
  make = functools.partial(initial, what.config, what.weights_format)
  size = what.context + what.tokens
  return {
    "state_format": "bfloat16" if recurrent is None else str(recurrent),
    "weights_format": what.weights_format or "bfloat16",
    "weights_bytes": nbytes(jax.eval_shape(make)),
    "state_bytes": nbytes(jax.eval_shape(lambda: begin(what, 0, size))),
  }


def own_state_format(what: Decoding) -> StateFormat | None:
  """The format of the state, or None of a model with a cache."""
  return None if what.config.keeps_context else what.state_format


def _shape(what: Decoding) -> str:
  shape = f"B{what.batch}" + f" C{what.context}" * bool(what.context)
  return shape if what.keep_pages is None else f"{shape} keep {what.keep_pages}"


class _Runner:
  """Calls of one case, and the weights that they share; made when needed."""

  def __init__(self, what: Decoding):
    self._what = what

  @functools.cached_property
  def _params(self) -> language_model.Params:
    return initial(self._what.config, self._what.weights_format)

  @functools.cached_property
  def _exact(self) -> jax.Array:
    floats = initial(self._what.config)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), floats)
    exact = dataclasses.replace(
      self._what, state_format=StateFormat(ssm="float32")
    )
    with jax.default_matmul_precision("highest"):
      return logits(exact, wide, "xla")

  def call(self, step: str) -> Call:
    """Decodes by an implementation of a step.

    Raises:
      UnsupportedError: it does not run here.
    """
    what = self._what
    found = logits(what, self._params, step)
    error = jnp.linalg.norm(found - self._exact) / jnp.linalg.norm(self._exact)
    method = plain.Plain(
      config=what.config,
      sampling=Sampling(temperature=0.0),
      implementations=_implementations(what, step),
    )
    batch = _batch(what)

    def start(before: loop.Batch) -> loop.Found:
      nonlocal batch
      batch, drawn = loop.advance(
        method, self._params, before, steps=what.tokens
      )
      return drawn

    return Call(
      start=start,
      inputs=lambda: (_rewound(what, batch),),
      count=what.tokens,
      columns=lambda _: {"error": float(error)},
    )


def _phase(what: Decoding) -> Phase:
  """The least work of a step of all rows, mean over a call."""
  make = functools.partial(initial, what.config, what.weights_format)
  return _PHASES[type(what.config)](what, jax.eval_shape(make))


def _mamba_ssm(what: Decoding) -> list[Peer]:
  sizes = what.config, what.batch, what.tokens
  make = functools.partial(mamba_ssm_decode.make, *sizes)
  missing = mamba_ssm_decode.missing
  return [Peer(name="mamba_ssm", missing=missing, ways={"CUDA graph": make})]


def _transformers(what: Decoding) -> list[Peer]:
  sizes = what.config, what.batch, what.tokens
  make = functools.partial(transformers_decode.make, *sizes, what.context)
  ways = {transformers_decode.WAY: make}
  missing = transformers_decode.missing
  return [Peer(name="transformers", missing=missing, ways=ways)]


def _transformer_phase(what: Decoding, params: language_model.Params) -> Phase:
  """By the keys of the context, of which a step writes those of one token."""
  c, rows = what.config, what.batch
  seen = what.context + (what.tokens + 1) / 2
  flops = decode_step.flops_per_token(c, 1, 1, seen, page_size=1)
  weights, whole = (
    float(decode_step.bytes_per_token(c, 1, 1, context, page_size=1))
    for context in (0, seen)
  )
  cache = rows * (whole - weights)
  if what.keep_pages is not None:
    # Two numbers of each channel of a page are read, too.
    cache *= what.keep_pages + 1 / PageBudget(keep=1.0).page_size
  if what.weights_format:
    weights = recurrent_step.least_work(params, (), rows).bytes
  return Phase(rows * float(flops), weights + cache)


def _recurrent_phase(what: Decoding, params: language_model.Params) -> Phase:
  state = jax.eval_shape(lambda: begin(what, 0, 1))
  return recurrent_step.least_work(params, state, what.batch)


def _chunked_phase(what: Decoding, params: language_model.Params) -> Phase:
  """By the state, of which a step writes few of the keys that it reads."""
  size = what.context + what.tokens
  state = jax.eval_shape(lambda: begin(what, 0, size))
  alone = recurrent_step.least_work(params, (), what.batch)
  return dataclasses.replace(alone, bytes=alone.bytes + nbytes(state))


# The least work of a step of each type, and the programs that decode it best.
_PHASES = types.MappingProxyType(
  {
    TransformerConfig: _transformer_phase,
    MambaConfig: _recurrent_phase,
    AttambaConfig: _chunked_phase,
  }
)
_PEERS = types.MappingProxyType(
  {TransformerConfig: _transformers, MambaConfig: _mamba_ssm}
)


def _peers(what: Decoding) -> list[Peer]:
  """The programs that decode such a model best; none for Attamba."""
  return _PEERS.get(type(what.config), lambda _: [])(what)


@functools.partial(jax.jit, static_argnums=(0, 1))
def initial(
  config: Config, weights_format: str | None = None
) -> language_model.Params:
  """Parameters as training begins with, in bfloat16 or the format of weights.

  So every layer counts in the error: small random norms would silence them.

  Raises:
    InputError: there is no such format, or its groups do not fit the weights.
  """
  params = language_model.init(config, jax.random.key(0), "bfloat16")
  if weights_format is None:
    return params
  weights, _, inputs = weights_format.partition("/")
  for form, where in ((weights, _WIDE), ("int8", KERNELS)):
    if has_weights(params, where):
      params = quantize_params(params, form, where, input=inputs or None)
  return quantize_params(params, weights, r"embed\.table")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def begin(
  what: Decoding, context: int, size: int, dtype: str = "bfloat16"
) -> language_model.State:
  """The state of rows that have read `context` tokens of random values.

  Args:
    what: is decoded.
    context: tokens read.
    size: tokens that a cache has room for.
    dtype: of activations.
  """
  state = language_model.init_state(
    what.config,
    what.batch,
    cache_size=size,
    dtype=jnp.dtype(dtype),
    state_format=own_state_format(what),
  )
  key = jax.random.key(0)

  def filled(leaf):
    if not context:
      return leaf
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.full(leaf.shape, context, leaf.dtype)
    return jax.random.normal(key, leaf.shape, leaf.dtype)

  state = jax.tree.map(filled, state)
  if what.keep_pages is None:
    return state
  budget = PageBudget(keep=what.keep_pages)
  return language_model.with_pages(what.config, state, budget)


def _batch(what: Decoding) -> loop.Batch:
  """Rows that have read their context, and drew token 0 behind it."""
  return loop.Batch(
    state=plain.State(
      model=begin(what, what.context, what.context + what.tokens),
      tokens=jnp.zeros((what.batch,), jnp.int32),
      keys=jax.random.key(0),
      count=jnp.zeros((), jnp.int32),
    ),
    done=jnp.zeros((what.batch,), bool),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _rewound(what: Decoding, batch: loop.Batch) -> loop.Batch:
  """The batch of a Transformer with the context alone in its cache again."""

  def counted(leaf):
    integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    rewinds = integer and what.context
    return jnp.full_like(leaf, what.context) if rewinds else leaf

  state = dataclasses.replace(
    batch.state,
    model=jax.tree.map(counted, batch.state.model),
    tokens=jnp.zeros_like(batch.state.tokens),
  )
  return dataclasses.replace(batch, state=state)


def _implementations(what: Decoding, step: str) -> Implementations:
  """Those of one step.

  Raises:
    UnsupportedError: the model has no such step.
  """
  if step != "xla" and not what.config.has_token_kernel:
    raise dispatch.UnsupportedError(f"{what.name} has no step by {step!r}")
  return Implementations(
    step=step, head="mosaic_gpu" if step == "mosaic_gpu" else None
  )


def logits(
  what: Decoding, params: language_model.Params, step: str
) -> jax.Array:
  """Logits after a few tokens that do not depend on those before."""
  dtype = jnp.dtype(params["embed"]["table"].dtype)
  slots = _SLOTS if what.keep_pages is None else _SLOTS_OF_PAGES
  state = begin(what, 0, slots, dtype.name)
  append = functools.partial(
    language_model.decode,
    what.config,
    implementations=_implementations(what, step),
  )
  on_gpu = jax.default_backend() == "gpu"
  decode = jax.jit(
    append,
    donate_argnums=2,
    # Not timed: to look for fast products would take most of a minute.
    compiler_options={"xla_gpu_autotune_level": 0} if on_gpu else None,
  )
  for token in range(_PROMPT):
    tokens = (jnp.arange(what.batch, dtype=jnp.int32)[:, None] + token) % 50
    found, state = decode(params, tokens, state)
  return found
