"""`transformer_step`: its weights, checks and choice of the implementation."""

import dataclasses
import importlib
import types
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ops import dispatch
from ops.paged_sparse_attention import KeptPages, PageSummary
from ops.quantized import QTensor, QWeight, Taps

IMPLEMENTATIONS: Mapping[str, dispatch.Supports] = types.MappingProxyType(
  {
    "mosaic_gpu": dispatch.on_one_device(
      dispatch.kernel("ops.transformer_step.mosaic_gpu", dispatch.needs_wgmma)
    ),
    "xla": dispatch.always,
    "mosaic_gpu_whole": dispatch.on_one_device(
      dispatch.kernel(
        "ops.transformer_step.mosaic_gpu_whole", dispatch.needs_wgmma
      )
    ),
  }
)

# Bytes of a layer's matrices from which on kernels of their own are faster. On
# an H200 one kernel took .49 instead of .66 ms with layers of 7 MB, .72 instead
# of .96 with 122 MB, and 4.5 instead of 4.0 with 436 MB.
_ONE_KERNEL = 256e6

Matrix = jax.Array | QTensor | QWeight
Cache = jax.Array | QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerWeights:
  """The weights of L layers, stacked; H query and N key/value heads of K.

  A matrix is an array, a `QTensor` of axis -2 or a `QWeight`.

  Attributes:
    attn_norm: (L, D), scale of the norm in front of attention.
    q_proj: (L, D, H K).
    k_proj: (L, D, N K).
    v_proj: (L, D, N K).
    o_proj: (L, H K, D).
    mlp_norm: (L, D), scale of the norm in front of the MLP.
    gate_proj: (L, D, F).
    up_proj: (L, D, F).
    down_proj: (L, F, D).
    q_bias: (L, H K) or None, as both others.
    k_bias: (L, N K).
    v_bias: (L, N K).
    q_norm: (L, K), scale of the norm of every query, or None for no such norm.
    k_norm: (L, K), alike, of keys.
    taps: Quantizers of keys and values, which a cache keeps so.
  """

  attn_norm: jax.Array
  q_proj: Matrix
  k_proj: Matrix
  v_proj: Matrix
  o_proj: Matrix
  mlp_norm: jax.Array
  gate_proj: Matrix
  up_proj: Matrix
  down_proj: Matrix
  q_bias: jax.Array | None = None
  k_bias: jax.Array | None = None
  v_bias: jax.Array | None = None
  q_norm: jax.Array | None = None
  k_norm: jax.Array | None = None
  taps: Taps = Taps()


def transformer_step(
  x: jax.Array,
  weights: TransformerWeights,
  keys: Cache,
  values: Cache,
  lengths: jax.Array,
  frequencies: jax.Array,
  *,
  eps: float,
  pages: KeptPages | None = None,
  implementation: str | None = None,
) -> (
  tuple[jax.Array, Cache, Cache] | tuple[jax.Array, Cache, Cache, PageSummary]
):
  """Takes the next tokens of each row through a stack of Transformer layers.

  Pre-norm layers with grouped queries (https://arxiv.org/abs/2305.13245),
  rotary positions (https://arxiv.org/abs/2104.09864, halves paired) and gated
  MLPs (https://arxiv.org/abs/2002.05202), each of them

    q, k, v = proj(rmsnorm(x));  q, k rotated to slot lengths + t
    x = x + o_proj(softmax(q [keys, k]^T / sqrt(K)) [values, v])
    x = x + down_proj(silu(gate_proj(y)) * up_proj(y)),  y = rmsnorm(x)

  A token sees the first `lengths` slots of its row, the tokens in front of it
  and itself. The equivalent plain JAX is a `lax.scan` over layers of nine
  products and one attention, and a scatter into the caches behind it.

  Args:
    x: Residual stream, (B, T, D), of few tokens; sums stay in its dtype.
    weights: Of L layers. Products and caches have the dtype that `keys` stand
      for, bfloat16 or float32; sums, norms and scores are float32.
    keys: Rotated keys, (L, B, S, N, K), an array or a `QTensor` of axis -1.
    values: (L, B, S, N, K), alike.
    lengths: (B,) int32, slots that are filled; the new tokens take the next
      ones. What lies past S is dropped, and a row without a slot for its token
      gets an x that means nothing.
    frequencies: (J,) float32, J = K / 2, radians per position.
    eps: Of all norms.
    pages: Reads some pages of the caches alone, as `paged_sparse_attention`
      chooses them, whose budgets may change from call to call. Takes one token,
      and caches that are arrays.
    implementation: `"mosaic_gpu"` (Hopper; one token of up to 64 rows, in
      bfloat16, heads of 64 or 128, weights in bfloat16 or symmetric integers of
      8 or 4 bits), `"mosaic_gpu_whole"` (likewise, one kernel for all layers of
      one row, weights in bfloat16), `"xla"`, or None for the fastest that runs:
      one kernel where layers are small. But pages are left to XLA:
      `"mosaic_gpu"` takes them by name.

  Returns:
    x, and keys and values with the new ones, written in the place of the old
    ones where the caller donates these; with `pages` also its summary with that
    of the new tokens' pages, alike. On a GPU nothing of the size of a
    matrix or of a layer's cache is copied, but that for more than four rows B T
    a layer's matrices are, one by one. Memory beyond the results is of the
    order of B T (F + H S). Only `"xla"` has gradients.

  Raises:
    ValueError: Shapes do not fit each other, or `implementation` does not run.
  """
  arrays = x, weights, keys, values, lengths, frequencies
  check(*arrays)
  options = {}
  if pages is not None:
    options = {"pages": _checked(pages, x, keys)}
  if implementation is None and pages is not None:
    # A step with the present kernel of pages ran on no GPU yet.
    implementation = "xla"
  if implementation is None and _bytes_of_a_layer(weights) < _ONE_KERNEL:
    runs = IMPLEMENTATIONS["mosaic_gpu_whole"](*arrays, **options) is None
    implementation = "mosaic_gpu_whole" if runs else None
  name = dispatch.resolve(
    "transformer_step", IMPLEMENTATIONS, implementation, *arrays, **options
  )
  module = importlib.import_module(f"ops.transformer_step.{name}")
  return module.forward(*arrays, eps=eps, **options)


def _bytes_of_a_layer(weights) -> float:
  matrices = [m for name, m in vars(weights).items() if name.endswith("_proj")]
  return sum(
    leaf.size // leaf.shape[0] * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(matrices)
  )


def _checked(pages, x, keys) -> KeptPages:
  """The pages within what there is; raises ValueError unless they fit."""
  if x.shape[1] != 1 or isinstance(keys, QTensor):
    raise ValueError(
      f"transformer_step: pages take one token, x is {x.shape}, and caches that"
      " are not quantized"
    )
  layers, b, s, n, k = keys.shape
  count = pages.summary.first.shape[2]
  if not count or s % count:
    raise ValueError(f"transformer_step: {s} slots are no {count} equal pages")
  wanted = (layers, b, count, n, k)
  found = {
    "summary.first": (pages.summary.first.shape, wanted),
    "summary.second": (pages.summary.second.shape, wanted),
    "num_pages": (pages.num_pages.shape, (layers, b, n)),
  }
  for name, (shape, expected) in found.items():
    if shape != expected:
      raise ValueError(
        f"transformer_step: pages.{name} is {shape}, but keys {keys.shape} need"
        f" {expected}"
      )
  wanted = jnp.maximum(jnp.asarray(pages.num_pages, jnp.int32), 2)
  return KeptPages(pages.summary, wanted, min(pages.max_pages, count))


def check(x, weights, keys, values, lengths, frequencies) -> None:
  """Raises ValueError unless all shapes fit each other."""
  if x.ndim != 3 or keys.ndim != 5 or values.shape != keys.shape:
    raise ValueError(
      f"transformer_step: x {x.shape}, keys {keys.shape} and values"
      f" {values.shape} are not (B, T, D) and twice (L, B, S, N, K)"
    )
  b, _, d = x.shape
  layers, _, _, n, k = keys.shape
  f, hk = weights.gate_proj.shape[-1], weights.q_proj.shape[-1]
  if k % 2 or hk % (n * k):
    raise ValueError(
      f"transformer_step: q_proj {weights.q_proj.shape} gives no whole number"
      f" of queries to each of {n} heads of an even {k}"
    )
  if keys.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f"transformer_step: keys are {keys.dtype}, not bfloat16 or float32"
    )
  wanted = {
    "attn_norm": (d,),
    "q_proj": (d, hk),
    "k_proj": (d, n * k),
    "v_proj": (d, n * k),
    "o_proj": (hk, d),
    "mlp_norm": (d,),
    "gate_proj": (d, f),
    "up_proj": (d, f),
    "down_proj": (f, d),
    "q_bias": (hk,),
    "k_bias": (n * k,),
    "v_bias": (n * k,),
    "q_norm": (k,),
    "k_norm": (k,),
  }
  found = {name: getattr(weights, name) for name in wanted}
  wanted = {name: (layers, *shape) for name, shape in wanted.items()}
  found |= {"keys": keys, "lengths": lengths, "frequencies": frequencies}
  wanted |= {
    "keys": (layers, b, *keys.shape[2:]),
    "lengths": (b,),
    "frequencies": (k // 2,),
  }
  for name, shape in wanted.items():
    if found[name] is not None and found[name].shape != shape:
      raise ValueError(
        f"transformer_step: {name} is {found[name].shape}, but x {x.shape} and"
        f" keys {keys.shape} need {shape}"
      )
