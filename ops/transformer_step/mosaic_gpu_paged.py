"""The second kernel of a layer that reads the best pages of its caches alone.

It is that of `paged_sparse_attention`, which finds the caches of all layers and
their summaries where they lie.
"""

import jax
import numpy as np

from ops.paged_sparse_attention import mosaic_gpu as paged


def unfit(keys, values, pages) -> str | None:
  """Returns None if the kernel takes these shapes and dtypes, else why not."""
  one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  keys, values = one(keys), one(values)
  q = jax.ShapeDtypeStruct((keys.shape[0], *keys.shape[2:]), keys.dtype)
  return paged.unfit(q, keys, values, jax.tree.map(one, pages.summary))


def attend(
  layer, q, caches, lengths, pages, *, shared, interpret
) -> tuple[jax.Array, ...]:
  """Returns the mixed heads, (rows, H K) bfloat16; of rows past B anything.

  Behind them come both parts of the summary of each row's last page, (B, 1, N,
  K).

  Args:
    layer: (1,) int32.
    q: Rotated queries, eight a key/value head, (rows, heads, K) bfloat16, as
      `mosaic_gpu_qkv` makes them.
    caches: References to keys and values, (L, B, S, N, K), with the new ones.
    lengths: (B,) int32, slots that are filled, the new ones among them.
    pages: `KeptPages` of all layers.
    shared: G, queries of a key/value head.
    interpret: False, or the parameters of the interpreter.
  """
  # The interpreter may wait forever for the blocks of a large cluster.
  config = paged.Config(splits=2, stages=4, tiles=2) if interpret else None
  mixed, *last = paged.attend_in_layer(
    layer, q, *caches, pages.summary, lengths, pages.num_pages,
    max_pages=pages.max_pages,
    # The queries are scaled for exponentials to base 2.
    scale=np.log(2), shared=shared, summarize=True, interpret=interpret,
    config=config,
  )  # fmt: skip
  return mixed.reshape(len(q), -1), *last
