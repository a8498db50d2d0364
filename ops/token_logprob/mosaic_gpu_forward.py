"""The forward kernel of `token_logprob`: log normalizers of logits."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from ops.token_logprob import mosaic_gpu_tiles as tiles
from ops.token_logprob.mosaic_gpu_tiles import ROW, TOKENS, WORKERS

LOG2E, LN2 = float(np.log2(np.e)), float(np.log(2))
# Bytes of shared memory beside those of the walk.
SCRATCH = 4 * WORKERS * TOKENS


def normalizers(
  hidden_TE, weight_VE, *, vocab, scale, config, interpret
) -> jax.Array:
  """Returns logsumexp(scale * hidden_TE @ weight_VE[:vocab]^T) in parts.

  Each warpgroup keeps the highest logit so far and the sum of exponentials for
  its rows in registers, as attention does.

  Args:
    hidden_TE: (T, E) bfloat16, T a multiple of `tiles.TOKENS`.
    weight_VE: (V, E) bfloat16, V a multiple of `tiles.COLUMNS`.
    vocab: Rows of weight_VE that count.
    scale: Positive.
    config: A `tiles.Walk`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (parts, T) float32, to be joined by another logsumexp; minus infinity where
    a part has no columns.
  """
  # Exponentials have base 2 on this hardware, so logits do.
  scale = scale * LOG2E

  def work(rows, part, operands, out_ref, scratch):
    del operands
    constant = lambda value: plgpu.layout_cast(
      jnp.full(config.shape[:1], value, jnp.float32), ROW
    )
    start = constant(jnp.finfo(jnp.float32).min), constant(0.0)

    def step(first, logits, carry, last):
      highest, total = carry
      if last:
        inside = tiles.column_ids(first, logits) < vocab
        logits = jnp.where(inside, logits, -jnp.inf)
      higher = jnp.maximum(highest, logits.max(axis=1) * scale)
      shares = jnp.exp2(logits * scale - tiles.along_rows(higher, logits))
      total = total * jnp.exp2(highest - higher) + shares.sum(axis=1)
      return higher, total

    def finish(carry):
      highest, total = carry
      result = scratch["result"]
      result[...] = highest * LN2 + jnp.log(total)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(result, out_ref.at[part, rows])
      plgpu.wait_smem_to_gmem(0)

    return start, step, finish

  return tiles.walk(
    work,
    hidden_TE,
    weight_VE,
    columns=vocab,
    config=config,
    out_type=jax.ShapeDtypeStruct(
      (config.parts, hidden_TE.shape[0]), jnp.float32
    ),
    scratch={"result": plgpu.SMEM((WORKERS, *config.shape[:1]), jnp.float32)},
    name="token_logprob_fwd",
    interpret=interpret,
  )
