"""Cases of decoding: a model with random weights, one token after the other.

The least work of a step is to read the weights and the keys and values of the
context once, and to read and write a recurrent state once. The token table
counts only where it is the head too. Speed does not depend on the weights.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models import language_model
from models.errors import InputError
from models.implementations import Implementations
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from ops import dispatch
from research.bench.case import Call, Case, Peer
from research.bench.peers import mamba_ssm_decode, transformers_decode
from research.cost import decode_step
from research.cost.roofline import Phase

STEPS = ("xla", "mosaic_gpu")
Config = language_model.Config
# The family whose steps read a context that grows.
_WITH_CACHE = "transformer"

# Tokens of the comparison with float32.
_PROMPT = 4


def parse(spec: str) -> tuple[str, Config, int, int]:
  """Name, config, batch and context of "MODEL:BATCH" or "MODEL:BATCHxCONTEXT".

  Raises:
    InputError: it is not written so, or there is no such model.
  """
  name, _, shape = spec.partition(":")
  batch, times, context = shape.partition("x")
  models = _models()
  config = models[name]() if name in models else None
  recurrent = config is not None and config.family != _WITH_CACHE
  numbers = [batch] if recurrent else [batch, context]
  whole = all(number.isdigit() and int(number) > 0 for number in numbers)
  if config is None or not whole or (recurrent and times):
    raise InputError(
      f"decode={spec}: write MODEL:BATCH, such as mamba2_130m:1, or of a "
      "Transformer MODEL:BATCHxCONTEXT, such as llama3_2_1b:1x512, with MODEL "
      f"one of {', '.join(models)}"
    )
  return name, config, int(batch), 0 if recurrent else int(context)


def _models() -> Mapping[str, Callable[[], Config]]:
  """The published sizes, and tiny ones, by name."""
  found = {
    "tiny_mamba1": functools.partial(MambaConfig.tiny, "mamba1"),
    "tiny_mamba2": functools.partial(MambaConfig.tiny, "mamba2"),
    "tiny_transformer": TransformerConfig.tiny,
  }
  for kind in (MambaConfig, TransformerConfig):
    for name, value in vars(kind).items():
      if isinstance(value, classmethod) and name not in ("tiny", "hybrid"):
        if not name.startswith("_"):
          found[name] = getattr(kind, name)
  return found


def case(spec: str, steps: Sequence[str], tokens: int) -> Case:
  """The case of a spec.

  Args:
    spec: see `parse`.
    steps: implementations, of `STEPS`.
    tokens: decoded in one call, from the same context each time.
  """
  name, config, batch, context = parse(spec)
  decoder = _Decoder(config, batch, context, tokens)
  phase = decoder.phase()
  return Case(
    op="decode",
    model=name,
    shape=f"B{batch} C{context}" if context else f"B{batch}",
    dtype="bfloat16",
    which="fwd",
    phases=(phase,),
    ours={step: functools.partial(decoder.call, step) for step in steps},
    peers=[decoder.peer()],
    amounts={"tokens": batch},
    columns={"bytes_moved": phase.bytes} | decoder.columns(),
  )


class _Decoder:
  """A model, and the state that its steps begin with; made when needed."""

  def __init__(self, config: Config, batch: int, context: int, tokens: int):
    self._config, self._batch = config, batch
    self._context, self._tokens = context, tokens

  @functools.cached_property
  def _params(self) -> Any:
    return initial(self._config)

  @functools.cached_property
  def _exact(self) -> jax.Array:
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self._params)
    with jax.default_matmul_precision("highest"):
      return logits(self._config, wide, self._batch, "xla")

  def phase(self) -> Phase:
    """The least work of a step of all rows."""
    c, rows = self._config, self._batch
    if c.family == _WITH_CACHE:
      seen = self._context + (self._tokens + 1) / 2
      bytes_of = functools.partial(
        decode_step.bytes_per_token, c, 1, 1, page_size=1
      )
      weights = float(bytes_of(0))
      cached = rows * (float(bytes_of(seen)) - weights)
      flops = decode_step.flops_per_token(c, 1, 1, seen, page_size=1)
      return Phase(rows * float(flops), weights + cached)
    params = jax.eval_shape(lambda: initial(c))
    state = jax.eval_shape(lambda: begin(c, initial(c), rows, 0, 0))
    size = lambda tree: sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Phase(2.0 * rows * weights, size(params) + 2 * size(state))

  def call(self, step: str) -> Call:
    """Decodes by an implementation of a step.

    Raises:
      UnsupportedError: it does not run here.
    """
    c = self._config
    found = logits(c, self._params, self._batch, step)
    error = jnp.linalg.norm(found - self._exact) / jnp.linalg.norm(self._exact)
    size = self._context + self._tokens
    state = begin(c, self._params, self._batch, self._context, size)
    current = jnp.zeros((self._batch,), jnp.int32)

    def start(current, before):
      nonlocal state
      state, scores = _greedy(
        c, self._params, current, before, tokens=self._tokens, step=step
      )
      return scores

    return Call(
      start=start,
      inputs=lambda: (current, _at(self._context, state)),
      count=self._tokens,
      columns=lambda _: {"error": float(error)},
    )

  def peer(self) -> Peer:
    """The program that decodes such a model best."""
    c, more = self._config, (self._batch, self._tokens)
    if c.family != _WITH_CACHE:
      return Peer(
        name="mamba_ssm",
        missing=mamba_ssm_decode.missing,
        ways={"CUDA graph": functools.partial(mamba_ssm_decode.make, c, *more)},
      )
    return Peer(
      name="transformers",
      missing=transformers_decode.missing,
      ways={
        way: functools.partial(
          transformers_decode.make, c, *more, self._context, way
        )
        for way in transformers_decode.WAYS
      },
    )

  def columns(self) -> dict[str, Any]:
    """What of the state tells its size."""
    state = jax.eval_shape(
      lambda: begin(self._config, initial(self._config), 1, 0, 1)
    )
    wide = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim > 1]
    return {"state_dtype": str(max(wide, key=lambda dtype: dtype.itemsize))}


@functools.partial(jax.jit, static_argnums=0)
def initial(config: Config) -> language_model.Params:
  """Parameters as training begins with, in bfloat16.

  So every layer counts in the error: small random norms would silence them.
  """
  return language_model.init(config, jax.random.key(0), "bfloat16")


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def begin(
  config: Config, params: Any, batch: int, context: int, size: int
) -> language_model.State:
  """A state of `batch` rows that have read `context` tokens of random values.

  Args:
    config: of the model.
    params: of the model, which give the dtype.
    batch: rows.
    context: tokens read.
    size: tokens that a cache has room for.
  """
  state = language_model.init_state(
    config,
    batch,
    cache_size=max(size, 1),
    dtype=params["embed"]["table"].dtype,
  )
  if not context:
    return state
  key = jax.random.key(0)

  def fill(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return jnp.full(leaf.shape, context, leaf.dtype)
    return jax.random.normal(key, leaf.shape, leaf.dtype)

  return jax.tree.map(fill, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _at(context: int, state: language_model.State) -> language_model.State:
  """The state of a Transformer with `context` tokens in its cache again."""

  def counted(leaf):
    integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    return jnp.full_like(leaf, context) if integer and context else leaf

  return jax.tree.map(counted, state)


def _append(config, params, tokens, state, step):
  """Logits and state of one step by an implementation of it."""
  if step != "xla" and config.family != "mamba2":
    raise dispatch.UnsupportedError(f"only Mamba-2 has a step by {step!r}")
  named = Implementations(step=step)
  return language_model.decode(
    config, params, tokens, state, implementations=named
  )


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("tokens", "step"),
  donate_argnums=3,
)
def _greedy(config, params, current, state, *, tokens, step):
  """Decodes `tokens` more of each row: the state, and the last logits."""

  step = functools.partial(_append, config, params, step=step)

  def one(carry, _):
    current, state, _ = carry
    scores, state = step(current[:, None], state)
    scores = scores[:, 0]
    return (jnp.argmax(scores, axis=-1), state, scores), None

  scores, _ = jax.eval_shape(step, current[:, None], state)
  blank = jnp.zeros((scores.shape[0], scores.shape[2]), scores.dtype)
  (_, state, scores), _ = jax.lax.scan(
    one, (current, state, blank), length=tokens
  )
  return state, scores


def logits(config: Config, params: Any, batch: int, step: str) -> jax.Array:
  """Logits after a few tokens that do not depend on those before."""
  state = begin(config, params, batch, 0, _PROMPT)
  decode = jax.jit(
    lambda params, tokens, state: _append(config, params, tokens, state, step),
    donate_argnums=2,
    # Not timed: to look for fast products would take most of a minute.
    compiler_options=(
      {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    ),
  )
  for token in range(_PROMPT):
    tokens = (jnp.arange(batch, dtype=jnp.int32)[:, None] + token) % 50
    found, state = decode(params, tokens, state)
  return found
