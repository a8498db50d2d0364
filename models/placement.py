"""Where the parameters of all models lie on a mesh of devices.

A parameter's name says what its dimensions are, and `ops.sharding.RULES` over
which axes those are cut. Each lies cut over all devices ("fsdp" and "tensor"),
and is gathered over "fsdp" for the layer that computes with it; its gradient is
summed and cut in the same step. Nothing here does anything where no mesh is
set.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ops import sharding

Tree = Any

# The end of a parameter's name -> what its last dimensions are, as it is kept.
_DIMS: tuple[tuple[str, sharding.Dims], ...] = (
  (r"(q|k|v|gate|up)_proj\.kernel", ("stored", "heads")),
  (r"(o|down|out)_proj\.kernel", ("heads", "stored")),
  (r"(q|k|v)_proj\.bias", ("heads",)),
  (r"(embed|target_embed)\.table", ("vocab", "stored")),
  (r"lm_head\.kernel", ("stored", "vocab")),
  # Columns of several arrays, whose ends are at no device's end.
  (r"in_proj\.kernel", ("stored_whole", None)),
  (r"x_proj\.kernel", ("heads", None)),
  (r"dt_proj\.kernel", (None, "heads")),
  (r"(up|down|head_in|head_out)\.kernel", ("stored", None)),
)
# Arrays of a `QTensor` that lie as its codes do, also within a `QWeight`.
_CODES = r"(weight\.)?(values|zeros|choices|scales(\.(values|scales|zeros))?)"
_PATTERNS = tuple(
  (re.compile(rf"(^|\.){pattern}(\.value)?(\.(?P<codes>{_CODES}))?$"), dims)
  for pattern, dims in _DIMS
)
# Matrices of several arrays side by side, which `part` gathers one by one.
_PARTED = ("stored_whole", None)
# Results that cost nothing to have again, gathered weights in front of all.
_CHEAP = frozenset(
  {"sharding_constraint", "slice", "convert_element_type", "transpose",
   "reshape", "squeeze", "broadcast_in_dim"}
)  # fmt: skip


def dims_of(path: Sequence[Any]) -> sharding.Dims:
  """What the last dimensions of a leaf are; () for one that is never cut.

  Those of a quantized matrix (D, F) are kept as (F, D), packed along D, and so
  are the scales of its blocks.
  """
  return _dims_of(path)[0]


def _dims_of(path: Sequence[Any]) -> tuple[sharding.Dims, bool]:
  """What the last dimensions of a leaf are, and whether it is quantized."""
  for pattern, dims in _PATTERNS:
    if found := pattern.search(_name(path)):
      quantized = found["codes"] is not None
      flipped = quantized and ".kernel" in found[0]
      return (dims[::-1] if flipped else dims), quantized
  return (), False


def stored_specs(tree: Tree, axes: Mapping[str, int]) -> Tree:
  """How each leaf of a tree of arrays or shapes is kept.

  Args:
    tree: parameters, an optimizer's state of them, or what holds both.
    axes: sizes of a mesh's axes.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: sharding.spec(dims_of(path), leaf.shape, axes), tree
  )


def gathered(block: Tree, dtype: Any) -> Tree:
  """Parameters of one layer as it computes with them.

  Matrices are rounded to `dtype`, that of the layer's work (None leaves them),
  and then gathered, so half the bytes go over the wire. Their gradients come
  back in their own dtype, summed over devices and cut as the parameters are
  kept.
  """
  axes = sharding.sizes()
  if not axes:
    return block

  def one(path, leaf):
    dims, quantized = _dims_of(path)
    if not dims or "stored_whole" in dims:
      return leaf
    used = tuple(None if dim == "stored" else dim for dim in dims)
    if quantized:
      return _laid_out(leaf, used, axes)
    return _moved(leaf, dims, used, dtype, axes)

  return jax.tree_util.tree_map_with_path(one, block)


def part(columns: jax.Array, dim: str | None, dtype: Any) -> jax.Array:
  """Columns (D, F) of a matrix of several arrays, as they are computed with.

  Args:
    columns: (D, F), of one of the arrays; one that is quantized is not rounded
      again.
    dim: what the columns are.
    dtype: that they are rounded to.
  """
  axes = sharding.sizes()
  if not axes:
    return columns
  if isinstance(columns, jax.Array):
    return _moved(columns, _PARTED, (None, dim), dtype, axes)

  def one(path, leaf):
    # A quantized matrix has its columns first.
    if re.fullmatch(_CODES, _name(path)):
      return _laid_out(leaf, (dim, None), axes)
    return leaf

  return jax.tree_util.tree_map_with_path(one, columns)


def _name(path: Sequence[Any]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".")


def _laid_out(leaf, dims, axes):
  """An array of a quantized matrix, laid out by `dims` as it is."""
  if leaf.ndim != len(dims):
    return leaf
  where = sharding.spec(dims, leaf.shape, axes)
  return jax.lax.with_sharding_constraint(leaf, where)


def _moved(leaf, dims, used_dims, dtype, axes):
  """A leaf of `dims` laid out by `used_dims`."""
  if not isinstance(leaf, jax.Array) or leaf.ndim != len(dims):
    return leaf
  kept = sharding.spec(dims, leaf.shape, axes)
  used = sharding.spec(used_dims, leaf.shape, axes)
  if not any(kept) and not any(used):
    return leaf
  wanted = jnp.dtype(dtype) if dtype and leaf.ndim == 2 else leaf.dtype
  return _gather(kept, used, wanted, leaf.dtype, leaf)


def layer(
  function: Callable[..., Any],
  *,
  dtype: Any,
  remat: bool,
  scanned: bool = True,
) -> Callable[..., Any]:
  """`function(carry, block, ...)` of a layer whose `block` is gathered first.

  Args:
    function: of the layer.
    dtype: of its work.
    remat: compute all of it again in the backward pass. Gathered weights are
      gathered again in any case, or the whole model would be on every device.
    scanned: whether a scan goes over the layers; else they are laid out flat.
  """

  def run(carry, block, *rest):
    return function(carry, gathered(block, dtype), *rest)

  again = functools.partial(jax.checkpoint, prevent_cse=not scanned)
  if remat:
    return again(run)
  if sharding.sizes().keys() & {sharding.FSDP, sharding.TENSOR}:
    return again(run, policy=_worth_keeping)
  return run


def rows(x: jax.Array) -> jax.Array:
  """A residual stream (B, T, D), or of other middle axes, cut by rows."""
  return _by_rows(x, None)


def widths(x: jax.Array) -> jax.Array:
  """Widths (B, T, F), or of other middle axes, cut by them, too."""
  return _by_rows(x, "heads")


def heads(x: jax.Array) -> jax.Array:
  """Heads (B, T, H, K), or of other middle axes, cut by them, too."""
  return _by_rows(x, "heads", None)


def _by_rows(x, *last):
  """Cuts the first axis by rows, the last ones as they say.

  A single one between them is tokens; of several none is cut, since rows may
  have rollouts or targets of their own.
  """
  between = x.ndim - 1 - len(last)
  if between < 1:
    return x
  middle = ("length",) if between == 1 else (None,) * between
  return sharding.constrain(x, "batch", *middle, *last)


def _worth_keeping(primitive, *_, **__) -> bool:
  return primitive.name not in _CHEAP


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(
  kept: PartitionSpec, used: PartitionSpec, dtype, own, w: jax.Array
) -> jax.Array:
  del own
  rounded = jax.lax.with_sharding_constraint(w.astype(dtype), kept)
  return jax.lax.with_sharding_constraint(rounded, used)


def _forward(kept, used, dtype, own, w):
  return _gather(kept, used, dtype, own, w), None


def _backward(kept, used, dtype, own, _, gradient):
  del used, dtype
  return (jax.lax.with_sharding_constraint(gradient.astype(own), kept),)


_gather.defvjp(_forward, _backward)
