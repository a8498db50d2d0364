"""The layers of `models.mamba`: Mamba-1, Mamba-2 and attention blocks.

Shapes by axis letter: B batch, T tokens, L layers of a run, D width, E inner
channels, H heads, P channels a head, G groups, N state size, K taps. The
residual stream is float32, the work of a layer has the dtype of the pass.

A layer takes and returns the stream as two arrays (B, T, D), the residual and
what the last layer adds to it, so that the sum is one pass with the next norm.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import layers, placement, transformer
from models.attention import Attend
from models.caches.places import Places
from models.implementations import Implementations
from models.mamba_config import MambaConfig
from ops import sharding
from ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from ops.mamba2_step import Mamba2Weights, mamba2_step
from ops.mamba2_step import api as mamba2_step_api
from ops.quantized import QState, Taps, as_array, like, rounded
from ops.rms_norm import rms_norm
from ops.selective_scan import selective_scan, selective_scan_step
from ops.ssd import ssd, ssd_step

# The residual, and what is to be added to it.
type Stream = tuple[jax.Array, jax.Array]

# Range of the initial step sizes, and their floor (Mamba, section 3.6).
_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 0.1, 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentState:
  """What the Mamba layers of a run remember; one layer's has no axis L.

  Attributes:
    conv: (L, B, K - 1, C) last inputs of the convolution, oldest first, in
      the dtype of the pass.
    ssm: (L, B, E, N) for Mamba-1, (L, B, H, P, N) for Mamba-2; float32, or the
      dtype of the state before it.

  Each may be a `QState`. Both are None in a pass without state.
  """

  conv: jax.Array | QState | None = None
  ssm: jax.Array | QState | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
  """What all layers of one pass share.

  Attributes:
    dtype: of the work of a layer.
    positions: (B, T) int32 of the tokens, for rotary embeddings.
    attend: mixes heads; None where the cache of each run does.
    places: of the tokens in the caches; None in a pass without state.
    segment_ids: (B, T) int32 as `ops.segments` defines them, or None.
    is_step: whether the tokens are few and follow a state.
    implementations: of the ops.
  """

  dtype: jnp.dtype
  positions: jax.Array
  attend: Attend | None
  places: Places | None
  segment_ids: jax.Array | None
  is_step: bool
  implementations: Implementations

  @property
  def norm(self) -> str | None:
    """The implementation of norms; for a few tokens the best that runs."""
    return None if self.is_step else self.implementations.norm

  def add_and_norm(
    self, stream: Stream, norm: layers.RMSNorm
  ) -> tuple[jax.Array, jax.Array]:
    """Adds the stream up; returns its norm in the dtype of the pass, and it."""
    x, y = stream
    normed, x = norm(y, residual=x, dtype=self.dtype, implementation=self.norm)
    return placement.rows(normed), placement.rows(x)

  def project(self, linear, x, sizes, dims):
    """Maps x by `linear` to arrays of so many columns each, which `dims` name.

    By a product each where tokens are many, since kernels would need a copy of
    each slice of a wide one.
    """
    if not self.is_step:
      ys = linear.split(x, sizes, dims)
      return [
        sharding.constrain(y, "batch", "length", dim)
        for y, dim in zip(ys, dims)
      ]
    ends = list(itertools.accumulate(sizes))[:-1]
    return jnp.split(linear(x), ends, axis=-1)

  def convolve(self, parts, conv, state):
    """Convolves the `parts` of the channels with SiLU; outputs and new state.

    For a few tokens in one call, else each by itself. Parts and weight may be
    QTensors.
    """
    options = {
      "activation": "silu",
      "implementation": self.implementations.conv,
    }
    ends = list(itertools.accumulate(part.shape[-1] for part in parts))[:-1]
    cast = lambda v: as_array(v[...]).astype(parts[0].dtype)
    weight, bias = cast(conv.weight), cast(conv.bias)
    if self.is_step:
      x = jnp.concatenate([as_array(part) for part in parts], axis=-1)
      y, state = causal_conv1d_step(x, weight, bias, state, **options)
      return jnp.split(y, ends, axis=-1), state
    weights = zip(jnp.split(weight, ends), jnp.split(bias, ends))
    states = [None] * len(parts)
    if state is not None:
      states = jnp.split(as_array(state), ends, axis=-1)
    ys, states = zip(
      *(
        self._whole(causal_conv1d, own, part, *both, **options)
        for own, part, both in zip(states, parts, weights)
      )
    )
    if state is not None:
      state = like(jnp.concatenate(states, axis=-1), state)
    return ys, state

  def scan(self, whole, step, state, *arrays, **options):
    """Calls `whole` or its `step`; output and new state."""
    options["implementation"] = self.implementations.scan
    options["dt_softplus"] = True
    if self.is_step:
      y, new = step(*arrays, state, **options)
      return y, new if isinstance(new, QState) else like(new, state)
    y, new = self._whole(whole, state, *arrays, **options)
    return y, like(new, state)

  def _whole(self, op, state, *arrays, **options):
    options["segment_ids"] = self.segment_ids
    if state is None:
      return op(*arrays, **options), None
    return op(*arrays, initial_state=state, return_final_state=True, **options)


class _Linear(layers.Linear):
  """Linear without bias, initialised as by PyTorch, which Mamba relies on."""

  def __init__(self, in_features, out_features, *, rngs, scale=1.0):
    bound = scale / math.sqrt(in_features)
    self.kernel = nnx.Param(
      _uniform(rngs, (in_features, out_features), -bound, bound)
    )
    self.bias = None


class _Conv(nnx.Module):
  """Weights of a depthwise convolution: (C, K) and (C,)."""

  def __init__(self, config: MambaConfig, *, rngs):
    shape, bound = (config.conv_channels, config.d_conv), config.d_conv**-0.5
    self.weight = nnx.Param(_uniform(rngs, shape, -bound, bound))
    self.bias = nnx.Param(_uniform(rngs, shape[:1], -bound, bound))


def _uniform(rngs, shape, low, high):
  return jax.random.uniform(rngs.params(), shape, minval=low, maxval=high)


def _initial_dt_bias(rngs, size):
  """The inverse softplus of log-uniform step sizes."""
  log_dt = _uniform(rngs, (size,), math.log(_DT_MIN), math.log(_DT_MAX))
  dt = jnp.maximum(jnp.exp(log_dt), _DT_FLOOR)
  return dt + jnp.log(-jnp.expm1(-dt))


def _decay(A_log):
  """A = -exp(A_log), in float32 whatever the dtype of the pass."""
  return -jnp.exp(A_log[...].astype(jnp.float32))


class GatedRMSNorm(nnx.Module):
  """RMSNorm of y * silu(z) over each of G groups of channels (Mamba-2).

  Attributes:
    scale: (E,).
  """

  def __init__(self, features: int, num_groups: int, *, eps: float):
    """Unit scale."""
    self.num_groups, self.eps = num_groups, eps
    self.scale = nnx.Param(jnp.ones((features,)))

  def __call__(self, y: jax.Array, z: jax.Array, **options) -> jax.Array:
    """Gates and normalises (..., E) in float32, returns the dtype of `y`.

    Takes the options of `ops.rms_norm`.
    """
    options |= {"num_groups": self.num_groups, "eps": self.eps}
    return rms_norm(y, self.scale[...], gate=z, **options)


class Mamba1Mixer(nnx.Module):
  """The selective state space of Mamba (arXiv:2312.00752, section 3.4)."""

  def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
    """Initialises as published: A = -(1..N), D = 1, dt in [1e-3, 0.1]."""
    c = self.config = config
    self.in_proj = _Linear(c.d_model, 2 * c.d_inner, rngs=rngs)
    self.conv = _Conv(c, rngs=rngs)
    self.x_proj = _Linear(c.d_inner, c.rank + 2 * c.d_state, rngs=rngs)
    self.dt_proj = _Linear(c.rank, c.d_inner, rngs=rngs)
    self.dt_bias = nnx.Param(_initial_dt_bias(rngs, c.d_inner))
    A_N = jnp.arange(1, c.d_state + 1, dtype=jnp.float32)[None]
    self.A_log = nnx.Param(
      jnp.log(jnp.broadcast_to(A_N, (c.d_inner, c.d_state)))
    )
    self.D = nnx.Param(jnp.ones((c.d_inner,)))
    scale = c.num_layers**-0.5
    self.out_proj = _Linear(c.d_inner, c.d_model, rngs=rngs, scale=scale)
    self.taps = nnx.Param(Taps())

  def __call__(
    self, x: jax.Array, state: RecurrentState, run: Pass
  ) -> tuple[jax.Array, RecurrentState]:
    """Maps (B, T, D) to (B, T, D) and the state to the next."""
    c = self.config
    taps = self.taps.get_value()
    x, z = run.project(
      self.in_proj, x, (c.d_inner, c.d_inner), ("heads", "heads")
    )
    (x,), conv = run.convolve((rounded(x, taps.conv_x),), self.conv, state.conv)
    dt, B, C = jnp.split(self.x_proj(x), [c.rank, c.rank + c.d_state], axis=-1)
    y, ssm = run.scan(
      selective_scan,
      selective_scan_step,
      state.ssm,
      rounded(x, taps.x),
      rounded(self.dt_proj(dt), taps.dt),
      _decay(self.A_log),
      rounded(B[:, :, None], taps.B),
      rounded(C[:, :, None], taps.C),
      D=self.D[...].astype(jnp.float32),
      z=rounded(z, taps.z),
      dt_bias=self.dt_bias[...].astype(jnp.float32),
    )
    return placement.rows(self.out_proj(y)), RecurrentState(conv=conv, ssm=ssm)


class Mamba2Mixer(nnx.Module):
  """The state-space dual layer of Mamba-2 (arXiv:2405.21060, section 7)."""

  def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
    """Initialises as published: A in -[1, 16], D = 1, dt in [1e-3, 0.1]."""
    c = self.config = config
    features = c.d_inner + c.conv_channels + c.num_heads
    self.in_proj = _Linear(c.d_model, features, rngs=rngs)
    self.conv = _Conv(c, rngs=rngs)
    self.dt_bias = nnx.Param(_initial_dt_bias(rngs, c.num_heads))
    self.A_log = nnx.Param(jnp.log(_uniform(rngs, (c.num_heads,), 1.0, 16.0)))
    self.D = nnx.Param(jnp.ones((c.num_heads,)))
    self.norm = GatedRMSNorm(c.d_inner, c.num_groups, eps=c.norm_eps)
    scale = c.num_layers**-0.5
    self.out_proj = _Linear(c.d_inner, c.d_model, rngs=rngs, scale=scale)
    self.taps = nnx.Param(Taps())

  def __call__(
    self, x: jax.Array, state: RecurrentState, run: Pass
  ) -> tuple[jax.Array, RecurrentState]:
    """Maps (B, T, D) to (B, T, D) and the state to the next."""
    c, shape, taps = self.config, x.shape[:2], self.taps.get_value()
    state_size = c.num_groups * c.d_state
    z, x, BC, dt = run.project(
      self.in_proj,
      x,
      (c.d_inner, c.d_inner, 2 * state_size, c.num_heads),
      ("heads", "heads", None, "heads"),
    )
    x, BC = rounded(x, taps.conv_x), rounded(BC, taps.conv_BC)
    (x, BC), conv = run.convolve((x, BC), self.conv, state.conv)
    B, C = jnp.split(BC, 2, axis=-1)
    y, ssm = run.scan(
      ssd,
      ssd_step,
      state.ssm,
      rounded(x.reshape(*shape, c.num_heads, c.head_dim), taps.x),
      rounded(dt, taps.dt),
      _decay(self.A_log),
      rounded(B.reshape(*shape, c.num_groups, c.d_state), taps.B),
      rounded(C.reshape(*shape, c.num_groups, c.d_state), taps.C),
      D=self.D[...].astype(jnp.float32),
      dt_bias=self.dt_bias[...].astype(jnp.float32),
    )
    y = rounded(y.reshape(*shape, c.d_inner), taps.y)
    y = self.norm(y, rounded(z, taps.z), implementation=run.norm)
    return placement.rows(self.out_proj(y)), RecurrentState(conv=conv, ssm=ssm)


class MambaBlock(nnx.Module):
  """Pre-norm residual block around a mixer."""

  def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
    """Builds the norm and the mixer of the config's kind."""
    mixer = Mamba1Mixer if config.kind == "mamba1" else Mamba2Mixer
    self.norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.mixer = mixer(config, rngs=rngs)

  def __call__(
    self, stream: Stream, states: RecurrentState, index: jax.Array, run: Pass
  ) -> tuple[Stream, RecurrentState]:
    """Maps the stream; updates the state of layer `index` of a run."""
    normed, x = run.add_and_norm(stream, self.norm)
    if states.conv is None:
      y, _ = self.mixer(normed, states, run)
      return (x, y), states
    state = jax.tree.map(
      lambda s: jax.lax.dynamic_index_in_dim(s, index, keepdims=False), states
    )
    y, state = self.mixer(normed, state, run)
    # All is read before anything is written: XLA would else keep the old
    # states by copying those of all layers, in every layer.
    y, state = jax.lax.optimization_barrier((y, state))
    states = jax.tree.map(
      lambda s, new: jax.lax.dynamic_update_index_in_dim(s, new, index, 0),
      states,
      state,
    )
    return (x, y), states


def step_run(
  blocks: MambaBlock, stream: Stream, states: RecurrentState, run: Pass
) -> tuple[Stream, RecurrentState] | None:
  """One token through the stacked Mamba-2 layers of a run, by `mamba2_step`.

  Returns:
    The stream and the states, or None for what goes layer by layer.
  """
  x, y = stream
  mixer = getattr(blocks, "mixer", None)
  if not (run.is_step and x.shape[1] == 1 and isinstance(mixer, Mamba2Mixer)):
    return None
  weights = Mamba2Weights(
    norm=blocks.norm.scale[...],
    in_proj=mixer.in_proj.stored(),
    conv_weight=mixer.conv.weight[...],
    conv_bias=mixer.conv.bias[...],
    dt_bias=mixer.dt_bias[...],
    A_log=mixer.A_log[...],
    D=mixer.D[...],
    gated_norm=mixer.norm.scale[...],
    out_proj=mixer.out_proj.stored(),
    taps=mixer.taps.get_value().of_activations,
  )
  x = x + y.astype(x.dtype)
  arrays = x[:, 0], weights, states.conv, states.ssm
  name = mamba2_step_api.resolve(
    *arrays, implementation=run.implementations.step
  )
  if name == "xla":
    return None
  x, conv, ssm = mamba2_step(
    *arrays, eps=mixer.config.norm_eps, implementation=name
  )
  stream = x[:, None], jnp.zeros_like(y)
  return stream, RecurrentState(conv=conv, ssm=ssm)


class AttentionBlock(nnx.Module):
  """The Transformer's attention, and its SwiGLU where d_ff > 0."""

  def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
    """Builds both; what writes to the residual is scaled by 1/sqrt(layers)."""
    c = config.attention_block
    self.attn_norm = layers.RMSNorm(c.d_model, eps=c.norm_eps)
    self.attn = transformer.Attention(c, rngs=rngs)
    self.attn.o_proj.rescale(config.num_layers**-0.5)
    self.mlp_norm = (
      layers.RMSNorm(c.d_model, eps=c.norm_eps) if c.d_ff else None
    )
    self.mlp = layers.GatedMlp(c.d_model, c.d_ff, rngs=rngs) if c.d_ff else None
    if c.d_ff:
      self.mlp.down_proj.rescale(config.num_layers**-0.5)

  def __call__(
    self, stream: Stream, layer_cache: Any, run: Pass
  ) -> tuple[Stream, Any]:
    """Maps the stream; the second result is that of `attend`."""
    normed, x = run.add_and_norm(stream, self.attn_norm)
    y, new = self.attn(normed, run.positions, run.attend, layer_cache)
    if self.mlp is None:
      return (x, y), new
    normed, x = run.add_and_norm((x, y), self.mlp_norm)
    return (x, self.mlp(normed)), new
