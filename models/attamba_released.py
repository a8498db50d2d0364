"""What the released code of Attamba computes in place of state spaces.

It hands the place within a chunk to ops that want the number of the chunk
(abdelfattah-lab/attamba, commit 3b3b30c). These mix tokens of one number within
blocks of 64 tokens, and those of a block's last number from block to block. So
a token mixes with those P, 2 P, ... tokens in front of it instead of with its
chunk, and the convolution sees the token alone. That rows and texts mix too,
because they are laid out as one, is not repeated here.

Shapes by axis letter: B batch, L tokens, H heads, P channels a head, G groups,
N state size, Q = 64 tokens of a block.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from models.mamba_blocks import Pass
from ops.quantized import as_array

BLOCK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedPass(Pass):
  """A pass of the released code; `segment_ids` are places within chunks."""

  def convolve(self, parts, conv, state):
    """The last tap of the convolution with SiLU."""
    ends = [part.shape[-1] for part in parts]
    at = [sum(ends[:i]) for i in range(len(ends))]
    weight = as_array(conv.weight[...])[:, -1]
    bias = as_array(conv.bias[...])
    cut = lambda v, i, x: v[at[i] : at[i] + ends[i]].astype(x.dtype)[None, None]
    found = [
      jax.nn.silu(x * cut(weight, i, x) + cut(bias, i, x))
      for i, x in enumerate(parts)
    ]
    return found, state

  def scan(self, whole, step, state, x, dt, A, B, C, *, D, dt_bias):
    """The scan of the released code, without a state."""
    del whole, step
    y = scan(x, dt, A, B, C, self.segment_ids, D=D, dt_bias=dt_bias)
    return y, state


def scan(
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  numbers: jax.Array,
  *,
  D: jax.Array,
  dt_bias: jax.Array,
) -> jax.Array:
  """`ops.ssd` as mamba_ssm computes it for `seq_idx` that do not rise.

  Args:
    x: (B, L, H, P).
    dt: (B, L, H), before bias and softplus.
    A: (H,).
    B: (B, L, G, N).
    C: (B, L, G, N).
    numbers: (B, L) int32, what is given for `seq_idx`.
    D: (H,).
    dt_bias: (H,).

  Returns:
    (B, L, H, P) in x's dtype.
  """
  b, length, h, _ = x.shape
  f32 = lambda v: v.astype(jnp.float32)
  dt = jax.nn.softplus(f32(dt) + f32(dt_bias)[None, None])
  spread = lambda v: jnp.repeat(f32(v), h // v.shape[2], axis=2)

  def blocks(v, fill=0):
    pad = [(0, 0), (0, -length % BLOCK)] + [(0, 0)] * (v.ndim - 2)
    v = jnp.pad(v, pad, constant_values=fill)
    return v.reshape(b, -1, BLOCK, *v.shape[2:])

  # Padding has steps of size 0 and a number of its own.
  numbers, dtx = blocks(numbers, -1), blocks(f32(x) * dt[..., None])
  B, C = blocks(spread(B)), blocks(spread(C))
  total = jnp.cumsum(blocks(dt * f32(A)[None, None]), axis=2)
  same = numbers[:, :, :, None] == numbers[:, :, None]
  causal = jnp.tril(jnp.ones((BLOCK, BLOCK), bool))[None, None]
  between = total[:, :, :, None] - total[:, :, None]
  seen = (same & causal)[..., None]
  decay = jnp.where(seen, jnp.exp(jnp.where(seen, between, 0)), 0)
  scores = jnp.einsum("bcqhn,bckhn->bcqkh", C, B) * decay
  y = jnp.einsum("bcqkh,bckhp->bcqhp", scores, dtx)

  last = numbers[:, :, -1]
  kept = jnp.exp(total[:, :, -1:] - total)
  kept = jnp.where((numbers == last[..., None])[..., None], kept, 0)
  made = jnp.einsum("bckhn,bckhp,bckh->bchpn", B, dtx, kept)
  before = jnp.pad(last[:, :-1], [(0, 0), (1, 0)], constant_values=-2)

  def step(state, block):
    made, decay, goes_on = block
    after = jnp.where(goes_on[:, None, None, None], state, 0)
    return decay[..., None, None] * after + made, state

  each = made, jnp.exp(total[:, :, -1]), last == before
  each = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), each)
  _, states = lax.scan(step, jnp.zeros_like(made[:, 0]), each)
  reach = jnp.where(
    (numbers == before[..., None])[..., None], jnp.exp(total), 0
  )
  y = y + jnp.einsum(
    "bcqhn,bchpn,bcqh->bcqhp", C, jnp.moveaxis(states, 0, 1), reach
  )
  y = y.reshape(b, -1, *y.shape[3:])[:, :length]
  return (y + f32(D)[None, None, :, None] * f32(x)).astype(x.dtype)
