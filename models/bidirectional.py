"""Encoder blocks in which every token sees the whole text.

Padding stands at the end of a row and is seen by nobody: a row's states are
those that it has alone. Shapes by axis letter: B batch, L text tokens, D width,
H query heads, N key/value heads, K head dimension, M random features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import layers
from models.attention import Attend, attend_to_text
from models.implementations import Implementations
from models.mamba_blocks import Mamba2Mixer, Pass, RecurrentState
from models.regression_lm_config import RegressionLMConfig

# Denominators of linear attention are sums of positive numbers, which may
# underflow where a query and all keys point to other features.
_LEAST = 1e-30


def full_attend(mask: jax.Array, implementation: str | None = None) -> Attend:
  """Softmax attention to the tokens of `mask` (B, L), which begin a row."""
  lengths = mask.sum(-1)

  def attend(q, k, v, _):
    mixed = attend_to_text(q, k, v, lengths, implementation=implementation)
    return mixed, None

  return attend


def linear_attend(
  mask: jax.Array, features: Callable[[jax.Array, bool], jax.Array]
) -> Attend:
  """Attention with weights phi(q).phi(k) (Katharopoulos et al. 2020, eq. 5).

  It costs L * M * K a head instead of L * L * K. Sums are float32.

  Args:
    mask: (B, L) bool, the tokens that are seen.
    features: phi, `(x (B, L, heads, K) float32, is_query) -> (..., M)`.
  """

  def attend(q, k, v, _):
    repeats = q.shape[2] // k.shape[2]
    seen = mask[:, :, None, None]
    phi_q = features(q.astype(jnp.float32), True)
    # A maximum over keys must not come from padding.
    phi_k = features(jnp.where(seen, k, 0).astype(jnp.float32), False)
    phi_k = jnp.where(seen, phi_k, 0.0)
    v32 = jnp.where(seen, v, 0).astype(jnp.float32)
    phi_q = phi_q.reshape(*phi_q.shape[:2], -1, repeats, phi_q.shape[-1])
    summed = jnp.einsum("blnm,blnk->bnmk", phi_k, v32)
    normalizer = jnp.einsum("blnrm,bnm->blnr", phi_q, phi_k.sum(1))
    mixed = jnp.einsum("blnrm,bnmk->blnrk", phi_q, summed)
    mixed = mixed / jnp.maximum(normalizer, _LEAST)[..., None]
    return mixed.reshape(q.shape).astype(q.dtype), None

  return attend


def elu_features(x: jax.Array, is_query: bool) -> jax.Array:
  """elu(x) + 1 of x (..., K), positive (Katharopoulos et al. 2020, eq. 7)."""
  del is_query
  return jax.nn.elu(x) + 1.0


def favor_features(
  head_dim: int, num_features: int, seed: int = 0
) -> Callable[[jax.Array, bool], jax.Array]:
  """Positive orthogonal random features of the softmax kernel (FAVOR+).

  phi(x) = exp(w.x - |x|^2 / 2) / sqrt(M) for x = q or k over K^(1/4), so that
  E[phi(q).phi(k)] = exp(q.k / sqrt(K)) (Choromanski et al. 2021, eq. 5 and
  section 2.4). A shift by the largest exponent, one a query and one for all
  keys of a head, keeps it finite; it cancels in attention.

  Args:
    head_dim: K.
    num_features: M.
    seed: of the directions w, which are fixed and no parameters.
  """
  directions = orthogonal_gaussian(num_features, head_dim, seed)

  def features(x, is_query):
    x = x * head_dim**-0.25
    exponent = jnp.einsum("blnk,mk->blnm", x, jnp.asarray(directions))
    exponent = exponent - jnp.sum(jnp.square(x), -1, keepdims=True) / 2
    axes = (-1,) if is_query else (1, 3)
    shift = jax.lax.stop_gradient(jnp.max(exponent, axes, keepdims=True))
    return jnp.exp(exponent - shift) * num_features**-0.5

  return features


def orthogonal_gaussian(rows: int, columns: int, seed: int) -> np.ndarray:
  """(rows, columns) float32: orthogonal in blocks, lengths as of Gaussians."""
  generator = np.random.default_rng(seed)
  blocks = []
  for _ in range(-(-rows // columns)):
    normal = generator.standard_normal((columns, columns))
    basis, upper = np.linalg.qr(normal)
    # Without the signs the directions would not be uniform on the sphere.
    blocks.append((basis * np.sign(np.diag(upper))).T)
  lengths = np.linalg.norm(generator.standard_normal((rows, columns)), axis=1)
  return (np.concatenate(blocks)[:rows] * lengths[:, None]).astype(np.float32)


class MambaBlock(nnx.Module):
  """A Mamba-2 mixer in each direction, then the gated MLP, pre-norm."""

  def __init__(self, config: RegressionLMConfig, *, rngs: nnx.Rngs):
    """Builds both mixers; they share a norm."""
    self.mixer_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.forward_mixer = Mamba2Mixer(config.mamba, rngs=rngs)
    self.backward_mixer = Mamba2Mixer(config.mamba, rngs=rngs)
    self.mlp_norm = layers.RMSNorm(config.d_model, eps=config.norm_eps)
    self.mlp = layers.GatedMlp(
      config.attention.d_model, config.attention.d_ff, rngs=rngs
    )

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    hooks: layers.MlpHooks,
    implementations: Implementations,
    on_mixed: Callable[[jax.Array], jax.Array],
  ) -> jax.Array:
    """Maps (B, L, D); `on_mixed` is applied to what the mixers add."""
    mixed = mix_both(
      self.forward_mixer,
      self.backward_mixer,
      self.mixer_norm(x),
      mask,
      implementations,
    )
    x = x + on_mixed(mixed)
    return x + self.mlp(self.mlp_norm(x), hooks)


def mix_both(
  forward_mixer: Mamba2Mixer,
  backward_mixer: Mamba2Mixer,
  x: jax.Array,
  mask: jax.Array,
  implementations: Implementations,
) -> jax.Array:
  """What two mixers make of a text and of the reversed one, added up.

  Args:
    forward_mixer: reads the text from its first token.
    backward_mixer: reads it from its last one.
    x: (B, L, D).
    mask: (B, L) bool, the tokens that are seen, which begin a row.
    implementations: of the ops.
  """
  ids = jnp.where(mask, 0, -1).astype(jnp.int32)
  mixed = _mix(forward_mixer, x, ids, implementations)
  # Padding comes first in the reversed text and leaves the state at zero.
  back = _mix(backward_mixer, x[:, ::-1], ids[:, ::-1], implementations)
  return mixed + back[:, ::-1]


def _mix(mixer, x, segment_ids, implementations):
  run = Pass(
    dtype=x.dtype,
    positions=segment_ids,
    attend=None,
    places=None,
    segment_ids=segment_ids,
    is_step=False,
    implementations=implementations,
  )
  return mixer(x, RecurrentState(), run)[0]
