"""Hugging Face tensor names, and the tree of `models.transformer` from them.

Every reader of this package offers its file under Hugging Face names and
layouts (kernels as (out, in)), so one function builds the parameters and one
place knows the names. `build` and `take_apart` serve every family; the names of
Mamba are in `models.convert.mamba`.
"""

import dataclasses
from collections.abc import (
  Callable,
  Container,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from models.convert import quantized
from models.errors import InputError
from models.transformer_config import TransformerConfig

_LAYER = "model.layers.{}."
_TEMPLATES = {
  "embed.table": "model.embed_tokens.weight",
  "layers.attn_norm.scale": _LAYER + "input_layernorm.weight",
  "layers.attn.q_proj.kernel": _LAYER + "self_attn.q_proj.weight",
  "layers.attn.q_proj.bias": _LAYER + "self_attn.q_proj.bias",
  "layers.attn.k_proj.kernel": _LAYER + "self_attn.k_proj.weight",
  "layers.attn.k_proj.bias": _LAYER + "self_attn.k_proj.bias",
  "layers.attn.v_proj.kernel": _LAYER + "self_attn.v_proj.weight",
  "layers.attn.v_proj.bias": _LAYER + "self_attn.v_proj.bias",
  "layers.attn.o_proj.kernel": _LAYER + "self_attn.o_proj.weight",
  "layers.attn.q_norm.scale": _LAYER + "self_attn.q_norm.weight",
  "layers.attn.k_norm.scale": _LAYER + "self_attn.k_norm.weight",
  "layers.mlp_norm.scale": _LAYER + "post_attention_layernorm.weight",
  "layers.mlp.gate_proj.kernel": _LAYER + "mlp.gate_proj.weight",
  "layers.mlp.up_proj.kernel": _LAYER + "mlp.up_proj.weight",
  "layers.mlp.down_proj.kernel": _LAYER + "mlp.down_proj.weight",
  "final_norm.scale": "model.norm.weight",
  "lm_head.kernel": "lm_head.weight",
}
# Where there are norms behind attention and MLP, names mean other norms.
_POST_NORMS = {
  "layers.post_attn_norm.scale": _LAYER + "post_attention_layernorm.weight",
  "layers.mlp_norm.scale": _LAYER + "pre_feedforward_layernorm.weight",
  "layers.post_mlp_norm.scale": _LAYER + "post_feedforward_layernorm.weight",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSource:
  """Tensors of a checkpoint, read one at a time.

  Attributes:
    names: Hugging Face names of all tensors it holds.
    read: maps such a name to its array, or to a node as `models.convert.
      quantized` has them, in the Hugging Face layout.
    label: maps such a name to "file: tensor 'own name'", for messages.
    shape: maps such a name to its shape, where that is cheaper than `read`.
  """

  names: frozenset[str]
  read: Callable[[str], np.ndarray | quantized.NODES]
  label: Callable[[str], str]
  shape: Callable[[str], tuple[int, ...]] | None = None

  def without(self, names: Iterable[str]) -> "TensorSource":
    """The same source but for `names`."""
    return dataclasses.replace(self, names=self.names - frozenset(names))

  def renamed(self, rename: Callable[[str], str]) -> "TensorSource":
    """The same tensors by other names; messages keep to their own."""
    own = {rename(name): name for name in self.names}
    return TensorSource(
      names=frozenset(own),
      read=lambda name: self.read(own[name]),
      label=lambda name: self.label(own.get(name, name)),
      shape=self.shape and (lambda name: self.shape(own[name])),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  """One parameter array and the tensors it is made of.

  Attributes:
    path: keys from the root of the tree.
    shape: of the parameter, with the leading layer axis where it has one.
    names: Hugging Face names; one a layer, or just one.
    stacked: whether axis 0 counts layers.
    transposed: whether the tensors are (out, in) and the parameter (in, out).
    channelwise: whether the tensors have an axis of one in their middle, as
      depthwise convolutions do.
    keeps_dtype: whether a wider dtype of the tensors is kept, whatever is
      asked for.
    optional: whether it may be absent, as `Taps` are, which have no shape.
    offset: what the parameter is above the tensors: 1 where norms scale by 1 +
      weight. It is then float32, since a narrow sum would lose the weight.
  """

  path: tuple[str | int, ...]
  shape: tuple[int, ...]
  names: tuple[str, ...]
  stacked: bool
  transposed: bool
  channelwise: bool = False
  keeps_dtype: bool = False
  optional: bool = False
  offset: float = 0.0

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of each tensor in the Hugging Face layout."""
    shape = self.quantized_shape
    return (shape[0], 1, *shape[1:]) if self.channelwise else shape

  @property
  def quantized_shape(self) -> tuple[int, ...]:
    """The same of a tensor in few bits, which has no axis of one."""
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape


def leaves_of_runs(
  tree: Any,
  runs: Sequence[Any],
  names: Mapping[str, str],
  layer_name: Callable[[str], str],
  keeps_dtype: Container[str],
) -> Iterator[Leaf]:
  """The leaves of a model whose layers are runs with state spaces.

  Args:
    tree: of abstract parameters, "layers" a list of stacks.
    runs: of each stack, with `start` and `stop`.
    names: Hugging Face names by dotted path, of what is not in layers.
    layer_name: maps a dotted path in a layer to a name, {} for its number.
    keeps_dtype: last parts of paths whose files may have a wider dtype.
  """
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = tuple(key.key for key in keys)
    stacked = path[0] == "layers"
    if stacked:
      run, name = runs[path[1]], layer_name(".".join(path[2:]))
      own = tuple(name.format(i) for i in range(run.start, run.stop))
    else:
      own = (names[".".join(path)],)
    yield Leaf(
      path=path,
      shape=leaf.shape,
      names=own,
      stacked=stacked,
      transposed=path[-1] == "kernel",
      channelwise=path[-2:] == ("conv", "weight"),
      keeps_dtype=path[-1] in keeps_dtype,
    )


def leaves(config: TransformerConfig) -> Iterator[Leaf]:
  """Yields every parameter array that `config` calls for, and `Taps`."""
  tree = transformer.abstract_params(config)
  yield taps_leaf(("layers", "attn"), _LAYER + "attn.taps", config.num_layers)
  if not config.post_norms:
    yield from leaves_of(tree, _TEMPLATES, config.num_layers)
    return
  for leaf in leaves_of(tree, _TEMPLATES | _POST_NORMS, config.num_layers):
    offset = 1.0 if leaf.path[-1] == "scale" else 0.0
    yield dataclasses.replace(leaf, offset=offset)


def taps_leaf(
  path: tuple[str | int, ...], template: str, stop: int, start: int = 0
) -> Leaf:
  """The `Taps` of stacked layers, which may be absent.

  Args:
    path: of the module that has them.
    template: of their names, {} for the number of the layer.
    stop: number behind the last layer.
    start: number of the first.
  """
  return Leaf(
    path=(*path, "taps"),
    shape=(),
    names=tuple(template.format(i) for i in range(start, stop)),
    stacked=True,
    transposed=False,
    optional=True,
  )


def leaves_of(
  tree: Any, templates: Mapping[str, str], num_layers: int
) -> Iterator[Leaf]:
  """Yields the arrays of a tree whose "layers" are stacked.

  Args:
    tree: nested dicts of anything with a shape.
    templates: dotted path of an array to its tensor's name, with {} where the
      number of the layer stands.
    num_layers: of the stack.
  """
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = tuple(key.key for key in keys)
    template = templates[".".join(path)]
    stacked = path[0] == "layers"
    count = num_layers if stacked else 1
    yield Leaf(
      path=path,
      shape=leaf.shape,
      names=tuple(template.format(i) for i in range(count)),
      stacked=stacked,
      transposed=path[-1] == "kernel",
    )


def build(
  wanted: Iterable[Leaf], source: TensorSource, dtype: jnp.dtype, family: str
) -> dict[str, Any]:
  """Builds a parameter tree; holds one parameter array at a time on host.

  Args:
    wanted: every parameter array of the model.
    source: the tensors.
    dtype: of the parameters.
    family: what a checkpoint should be of, for messages.

  Raises:
    InputError: a tensor is missing, unknown or of a wrong shape.
  """
  wanted = [
    leaf
    for leaf in wanted
    if not leaf.optional or source.names.intersection(leaf.names)
  ]
  expected = {name for leaf in wanted for name in leaf.names}
  for name in sorted(expected - source.names):
    raise InputError(
      f"{source.label(name)} is missing; the file does not fit its config: "
      "get it again, or correct the config"
    )
  for name in sorted(source.names - expected):
    raise InputError(
      f"{source.label(name)} is unknown to this decoder; it is of another "
      f"family or has adapters: use a plain {family} checkpoint"
    )
  params = {}
  for leaf in wanted:
    node = params
    for key in leaf.path[:-1]:
      node = node.setdefault(key, {})
    whole = _stack(leaf, source, np.dtype(dtype))
    node[leaf.path[-1]] = jax.tree.map(jnp.asarray, whole)
  return params


def _is_finite(tensor: np.ndarray | quantized.NODES) -> bool:
  return all(
    leaf.dtype.kind in "iu" or np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(tensor)
  )


def _stack(
  leaf: Leaf, source: TensorSource, dtype: np.dtype
) -> np.ndarray | quantized.NODES:
  out, rows = None, []
  for i, name in enumerate(leaf.names):
    tensor = source.read(name)
    few = isinstance(tensor, quantized.NODES)
    shape = leaf.quantized_shape if few else leaf.tensor_shape
    if not leaf.optional and tensor.shape != shape:
      raise InputError(
        f"{source.label(name)} has shape {tensor.shape} where the config "
        f"asks for {shape}: correct the config or get the file again"
      )
    if not _is_finite(tensor):
      raise InputError(
        f"{source.label(name)} has numbers that are NaN or infinite: get the "
        "file again"
      )
    if few:
      rows.append(tensor.T if leaf.transposed else tensor)
      continue
    if leaf.offset:
      tensor = tensor.astype(np.float32) + np.float32(leaf.offset)
      dtype = tensor.dtype
    if out is None:
      if leaf.keeps_dtype:
        dtype = jnp.promote_types(dtype, tensor.dtype)
      out = np.empty(leaf.shape, dtype)
    row = out[i] if leaf.stacked else out
    tensor = tensor.T if leaf.transposed else tensor
    row[...] = tensor.reshape(row.shape) if leaf.channelwise else tensor
  if not rows:
    return out
  if out is not None or not quantized.alike(rows):
    raise InputError(
      f"{source.label(leaf.names[0])} and the same of other layers differ in "
      "their number format: quantize all layers alike"
    )
  whole = quantized.stack(rows, dtype)
  return whole if leaf.stacked else whole[0]


def with_own_head(
  config: Any, source: TensorSource, head: str, table: str
) -> tuple[Any, TensorSource]:
  """Unties a config whose file has a head of its own.

  Exporters write a tied head a second time; such a one is not read. Where it
  differs from the table, the file counts, as transformers has it.

  Args:
    config: of the model.
    source: its tensors.
    head: name of the head.
    table: name of the token table.
  """
  if not config.tie_embeddings or head not in source.names:
    return config, source
  if table in source.names and not np.array_equal(
    source.read(head), source.read(table)
  ):
    return dataclasses.replace(config, tie_embeddings=False), source
  return config, source.without([head])


def take_apart(
  wanted: Iterable[Leaf], params: dict[str, Any]
) -> dict[str, np.ndarray | quantized.NODES]:
  """The inverse of `build`."""
  tensors = {}
  for leaf in wanted:
    node = params
    for key in leaf.path[:-1]:
      node = node[key]
    if leaf.optional and leaf.path[-1] not in node:
      continue
    node = node[leaf.path[-1]]
    whole = jax.tree.map(np.asarray, node)
    for i, name in enumerate(leaf.names):
      tensor = whole[i] if leaf.stacked else whole
      tensor = tensor.T if leaf.transposed else tensor
      if leaf.offset:
        tensor = tensor.astype(np.float32) - np.float32(leaf.offset)
      if not isinstance(tensor, quantized.NODES):
        tensor = np.ascontiguousarray(tensor.reshape(leaf.tensor_shape))
      tensors[name] = tensor
  return tensors


def half_split_rows(tensor: np.ndarray, num_heads: int) -> np.ndarray:
  """Reorders query or key rows from interleaved RoPE to half-split RoPE.

  llama.cpp and llama2.c rotate neighbouring rows (2i, 2i + 1) of a head,
  Hugging Face rows (i, i + K/2).

  Args:
    tensor: (num_heads * K, ...), rows in interleaved order.
    num_heads: heads along axis 0.
  """
  # All sizes are told, since none can be found where a tensor is empty.
  half = len(tensor) // num_heads // 2
  pairs = tensor.reshape(num_heads, half, 2, *tensor.shape[1:])
  return pairs.swapaxes(1, 2).reshape(tensor.shape)
