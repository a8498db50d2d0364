"""FABNet: Fourier mixing, attention and FFNs of butterflies; and its peers.

An encoder that classifies sequences, by blocks as `FABNetConfig` says. The
residual stream and norms are float32, the work of a block has the dtype of the
pass. Shapes by axis letter: B sequences, L tokens, D width, F width of the
FFN, H heads, K head dimension, V tokens of the vocabulary, C classes.
"""

import dataclasses
import functools
import math
import os
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from models import (
  bidirectional,
  files,
  input_files,
  layers,
  module,
  placement,
  structured,
  weight_files,
)
from models.attention import attend_to_text
from models.errors import InputError, shown
from models.fabnet_config import FABNetConfig
from models.implementations import Implementations
from models.mamba_blocks import Mamba2Mixer
from ops.fourier_mix import fourier_mix

Params = module.Params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_KIND = "frugax-fabnet"
_THETA = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
  """How a pass is computed.

  Attributes:
    dtype: of the work of blocks.
    attention: "xla", "cudnn", or None for the best that runs here.
    fourier: implementation of `ops.fourier_mix`, or None.
    butterfly: of `ops.butterfly_matmul`, or None.
    mamba: implementations of the ops of Mamba-2.
    dropout: share of embeddings, of what mixers add (transforms but for), of
      the FFN's middle and of what it adds that is dropped in training.
  """

  dtype: str = "float32"
  attention: str | None = None
  fourier: str | None = None
  butterfly: str | None = None
  mamba: Implementations = Implementations()
  dropout: float = 0.0


class Dropper:
  """Drops the same share of several arrays, each by a key of its own."""

  def __init__(self, rate: float, key: jax.Array | None):
    """Drops nothing where there is no key, or the rate is 0."""
    self._rate, self._key, self._calls = rate, key if rate else None, 0

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps an array of any shape."""
    if self._key is None:
      return x
    self._calls += 1
    key = jax.random.fold_in(self._key, self._calls)
    kept = jax.random.bernoulli(key, 1 - self._rate, x.shape)
    return jnp.where(kept, x / (1 - self._rate), 0).astype(x.dtype)


class Ffn(nnx.Module):
  """Two matrices with GELU between them."""

  def __init__(self, config: FABNetConfig, kind: str, *, rngs: nnx.Rngs):
    """Builds both, of the kind of matrix."""
    make = _matrices(config, kind, rngs)
    self.up = make(config.d_model, config.d_ff)
    self.down = make(config.d_ff, config.d_model)

  def __call__(
    self, x: jax.Array, compute: Compute, drop: Dropper
  ) -> jax.Array:
    """Maps (B, L, D)."""
    middle = drop(jax.nn.gelu(_apply(self.up, x, compute)))
    return drop(_apply(self.down, middle, compute))


def _apply(matrix, x, compute):
  if isinstance(matrix, structured.Butterfly):
    return matrix(x, implementation=compute.butterfly)
  return matrix(x)


def _matrices(config, kind, rngs):
  make, taken = structured.KINDS[kind]
  options = {
    "tied": config.tied_butterflies,
    "rank": config.rank,
    "blocks": config.blocks,
  }
  own = {name: options[name] for name in taken}
  return functools.partial(make, rngs=rngs, **own)


class Fourier(nnx.Module):
  """Mixes by the real part of the 2-D Fourier transform; has no parameters."""

  def __init__(self, config: FABNetConfig, *, rngs: nnx.Rngs):
    """Draws nothing."""
    del rngs
    self.config = config

  def __call__(
    self, x: jax.Array, mask: jax.Array, compute: Compute, drop: Dropper
  ) -> jax.Array:
    """Maps (B, L, D)."""
    del drop
    if self.config.mask_padding:
      x = jnp.where(mask[..., None], x, 0)
    y = fourier_mix(x, implementation=compute.fourier)
    if self.config.fourier_norm:
      y = y / math.sqrt(math.prod(x.shape[1:]))
    return y


class Attention(nnx.Module):
  """Softmax attention of all tokens to all."""

  def __init__(self, config: FABNetConfig, *, rngs: nnx.Rngs):
    """Builds four projections."""
    self.config, d = config, config.d_model
    make = _matrices(config, config.projections, rngs)
    self.q_proj, self.k_proj, self.v_proj = make(d, d), make(d, d), make(d, d)
    self.o_proj = make(d, d)

  def __call__(
    self, x: jax.Array, mask: jax.Array, compute: Compute, drop: Dropper
  ) -> jax.Array:
    """Maps (B, L, D)."""
    c, length = self.config, x.shape[1]
    q, k, v = (
      _apply(proj, x, compute).reshape(*x.shape[:2], c.num_heads, c.head_dim)
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    if c.positions == "rotary":
      positions = jnp.broadcast_to(jnp.arange(length)[None], x.shape[:2])
      frequencies = layers.rope_frequencies(c.head_dim, _THETA)
      q = layers.apply_rope(q, positions, frequencies)
      k = layers.apply_rope(k, positions, frequencies)
    lengths = mask.sum(-1) if c.mask_padding else jnp.full(len(x), length)
    mixed = attend_to_text(q, k, v, lengths, implementation=compute.attention)
    return drop(_apply(self.o_proj, mixed.reshape(x.shape), compute))


class Mamba(nnx.Module):
  """Mamba-2 in both directions, added up."""

  def __init__(self, config: FABNetConfig, *, rngs: nnx.Rngs):
    """Builds a mixer a direction."""
    self.config = config
    self.forward_mixer = Mamba2Mixer(config.mamba, rngs=rngs)
    self.backward_mixer = Mamba2Mixer(config.mamba, rngs=rngs)

  def __call__(
    self, x: jax.Array, mask: jax.Array, compute: Compute, drop: Dropper
  ) -> jax.Array:
    """Maps (B, L, D)."""
    mask = mask if self.config.mask_padding else jnp.ones_like(mask)
    return drop(
      bidirectional.mix_both(
        self.forward_mixer, self.backward_mixer, x, mask, compute.mamba
      )
    )


_MIXERS = {"fourier": Fourier, "attention": Attention, "mamba": Mamba}


class Block(nnx.Module):
  """Pre-norm: a mixer, then the FFN."""

  def __init__(self, config: FABNetConfig, kind: str, *, rngs: nnx.Rngs):
    """Builds a block of a kind of mixer."""
    norm = functools.partial(
      structured.LayerNorm, config.d_model, eps=config.norm_eps
    )
    self.mixer_norm, self.ffn_norm = norm(), norm()
    self.mixer = _MIXERS[kind](config, rngs=rngs)
    self.ffn = Ffn(config, config.ffn_of(kind), rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    compute: Compute,
    key: jax.Array | None,
  ) -> jax.Array:
    """Maps the residual stream (B, L, D)."""
    drop = Dropper(compute.dropout, key)
    normed = self.mixer_norm(x).astype(compute.dtype)
    x = x + self.mixer(normed, mask, compute, drop).astype(x.dtype)
    normed = self.ffn_norm(x).astype(compute.dtype)
    return x + self.ffn(normed, compute, drop).astype(x.dtype)


class FABNet(module.Model):
  """Embeds, mixes by blocks, pools, classifies.

  Attributes:
    positions: (L, D), or None where they are not learned.
    cls: (D,), or None where the mean is taken.
    fourier, mamba, attention: stacks of blocks of a kind, or None.
  """

  def __init__(self, config: FABNetConfig, *, rngs: nnx.Rngs):
    """Random weights."""
    c = self.config = config
    normal = jax.nn.initializers.normal(0.02)
    self.embed = layers.Embedding(c.vocab_size, c.d_model, rngs=rngs)
    draw = lambda *shape: nnx.Param(normal(rngs.params(), shape))
    learned = c.positions == "learned"
    self.positions = draw(c.max_length, c.d_model) if learned else None
    self.cls = draw(c.d_model) if c.pool == "cls" else None
    stacks = dict.fromkeys(_MIXERS)
    for kind, count in c.runs:
      keys = jax.random.split(rngs.params(), count)
      stacks[kind] = jax.vmap(
        lambda key, kind=kind: Block(c, kind, rngs=nnx.Rngs(params=key))
      )(keys)
    self.fourier, self.mamba, self.attention = (
      stacks[kind] for kind in ("fourier", "mamba", "attention")
    )
    self.final_norm = structured.LayerNorm(c.d_model, eps=c.norm_eps)
    width = c.d_model * (4 if c.pairs else 1)
    self.head_in = structured.Dense(width, c.d_ff, rngs=rngs)
    self.head_out = structured.Dense(c.d_ff, c.num_classes, rngs=rngs)

  def hidden(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    compute: Compute,
    key: jax.Array | None,
  ) -> jax.Array:
    """Maps tokens (B, L) and their mask to float32 states (B, L, D)."""
    x = self.embed(tokens)
    if self.cls is not None:
      first = jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1]))
      x = jnp.concatenate([first, x[:, :-1]], axis=1)
    if self.positions is not None:
      x = x + self.positions[...][None, : x.shape[1]]
    layer = placement.layer(
      lambda x, block, key: placement.rows(block(x, mask, compute, key)),
      dtype=compute.dtype,
      remat=False,
    )
    keys = [None] * (len(self.config.runs) + 1)
    if key is not None:
      keys = jax.random.split(key, len(keys))
    x = Dropper(compute.dropout, keys[-1])(x)
    for run_key, (kind, count) in zip(keys, self.config.runs):
      block_keys = None if run_key is None else jax.random.split(run_key, count)
      x, _ = jax.lax.scan(
        lambda x, both: (layer(x, *both), None),
        x,
        (getattr(self, kind), block_keys),
        # Blocks are laid out flat, because a scan copies what each keeps for
        # its gradient, and stacks are shallow.
        unroll=min(count, 4),
      )
    return self.final_norm(x)

  def pooled(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps states (B, L, D) to one a sequence, (B, D)."""
    if self.config.pool == "cls":
      return x[:, 0]
    if not self.config.mask_padding:
      return x.mean(1)
    kept = jnp.where(mask[..., None], x, 0).sum(1)
    return kept / jnp.maximum(mask.sum(1, keepdims=True), 1).astype(x.dtype)


init, bind = FABNet.init, FABNet.bind
abstract_params, num_params = FABNet.abstract_params, FABNet.num_params


def hidden(
  config: FABNetConfig,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  compute: Compute = Compute(),  # noqa: B008 (frozen)
  key: jax.Array | None = None,
) -> jax.Array:
  """States of the tokens, as `logits` takes them: float32 (B, L, D)."""
  _check(config, tokens)
  mask = _mask(config, tokens, lengths)
  return bind(config, params).hidden(tokens, mask, compute, key)


def logits(
  config: FABNetConfig,
  params: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  compute: Compute = Compute(),  # noqa: B008 (frozen)
  key: jax.Array | None = None,
) -> jax.Array:
  """Scores of the classes.

  Args:
    config: of the model.
    params: of the model.
    tokens: (B, L) int32, or (B, 2, L) pairs of sequences.
    lengths: (B,) or (B, 2) int32, tokens before the padding.
    compute: how.
    key: of dropout; None drops nothing.

  Returns:
    float32 (B, C).
  """
  _check(config, tokens)
  model = bind(config, params)
  flat = tokens.reshape(-1, tokens.shape[-1])
  mask = _mask(config, flat, lengths.reshape(-1))
  x = model.pooled(model.hidden(flat, mask, compute, key), mask)
  if config.pairs:
    first, second = jnp.moveaxis(x.reshape(-1, 2, x.shape[-1]), 1, 0)
    x = [first, second, first * second, first - second]
    x = jnp.concatenate(x, axis=-1)
  return model.head_out(jax.nn.relu(model.head_in(x)))


def _mask(config, tokens, lengths):
  """What of the states (B, L) is no padding; a token in front shifts them."""
  lengths = lengths + (config.pool == "cls")
  return jnp.arange(tokens.shape[1])[None] < lengths[:, None]


def _check(config, tokens):
  if tokens.shape[-1] > config.max_length:
    raise InputError(
      f"sequences of {tokens.shape[-1]} tokens are longer than the model's "
      f"max_length={config.max_length}"
    )


def save(
  directory: str | os.PathLike[str], config: FABNetConfig, params: Params
) -> None:
  """Writes `config.json` and `model.safetensors` to a new folder.

  Raises:
    FileExistsError: it exists and holds something.
  """
  with files.whole_folder(directory) as draft:
    weight_files.write(draft / WEIGHTS, params)
    described = {"kind": _KIND, "model": dataclasses.asdict(config)}
    files.write_json(draft / CONFIG, described)


def load(directory: str | os.PathLike[str]) -> tuple[FABNetConfig, Params]:
  """Reads what `save` wrote.

  Raises:
    InputError: a file is missing, damaged or of another kind.
  """
  directory = pathlib.Path(directory).expanduser()
  path = directory / CONFIG
  described = input_files.read_json(path)
  if described.get("kind") != _KIND:
    raise InputError(
      f"{path}: kind is {shown(described.get('kind'))}, not {_KIND!r}: give a "
      "folder that train_lra.py wrote"
    )
  with input_files.errors_of_config(path):
    config = FABNetConfig(**described["model"])
  return config, weight_files.read(directory / WEIGHTS, abstract_params(config))
