"""The backward kernel of `token_logprob`: gradients of a block of logits."""

import itertools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from ops.token_logprob import mosaic_gpu_tiles as tiles
from ops.token_logprob.mosaic_gpu_tiles import ROW, WORKERS

LOG2E = float(np.log2(np.e))
# Rows and columns that are stored at a time, and stores under way.
_PIECE, _SLOTS = 64, 2
# Bytes of shared memory beside those of the walk.
SCRATCH = 2 * WORKERS * _SLOTS * _PIECE**2


def logit_gradients(
  hidden_TE, weight_CE, vectors, targets, *, scale, config, interpret
) -> jax.Array:
  """Returns the gradients of unscaled logits of a block of the vocabulary.

    dlogits = slope * softmax + dlogprob * onehot(target)

  Args:
    hidden_TE: (T, E) bfloat16, T a multiple of `tiles.TOKENS`.
    weight_CE: (C, E) bfloat16, the block's rows of the weights, C a multiple of
      `tiles.COLUMNS`.
    vectors: (3, T) float32: log normalizers, slope = dnormalizer - dlogprob,
      and dlogprob; the last two times `scale`.
    targets: (T,) int32, columns in the block, or outside of it.
    scale: Positive.
    config: A `tiles.Walk`.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (T, C) bfloat16, finite also where weight_CE only pads.
  """
  scale = scale * LOG2E

  def work(rows, part, operands, out_ref, scratch):
    del part
    vectors_ref, targets_ref = operands
    by_row = lambda ref: plgpu.load(ref.at[rows], layout=ROW, optimized=False)
    normalizer, slope, dlogprob = (by_row(vectors_ref.at[i]) for i in range(3))
    normalizer *= LOG2E
    target = by_row(targets_ref)
    height, span = config.shape
    pieces = itertools.product(range(0, height, _PIECE), range(0, span, _PIECE))
    pieces = list(enumerate(pieces))

    def step(first, logits, carry, last):
      del last
      # A share is at most one, whatever a row that only pads would give.
      exponents = logits * scale - tiles.along_rows(normalizer, logits)
      shares = jnp.exp2(jnp.minimum(exponents, 0.0))
      hit = tiles.column_ids(first, logits) == tiles.along_rows(target, logits)
      gradients = tiles.along_rows(slope, logits) * shares
      gradients += jnp.where(hit, tiles.along_rows(dlogprob, logits), 0.0)
      gradients = gradients.astype(hidden_TE.dtype)
      for i, (row, column) in pieces:
        piece = scratch["pieces"].at[i % _SLOTS]
        plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
        piece[...] = gradients[row : row + _PIECE, column : column + _PIECE]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
          piece,
          out_ref.at[
            pl.ds(rows.start + row, _PIECE), pl.ds(first + column, _PIECE)
          ],
        )
      return carry

    return (), step, lambda carry: plgpu.wait_smem_to_gmem(0)

  return tiles.walk(
    work,
    hidden_TE,
    weight_CE,
    vectors,
    targets,
    columns=weight_CE.shape[0],
    config=config,
    out_type=jax.ShapeDtypeStruct(
      (hidden_TE.shape[0], weight_CE.shape[0]), hidden_TE.dtype
    ),
    scratch={"pieces": tiles.tile(WORKERS, _SLOTS, _PIECE, _PIECE)},
    name="token_logprob_bwd",
    interpret=interpret,
  )
