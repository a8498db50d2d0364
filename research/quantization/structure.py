"""Which parts of a layer belong to each other, by the names that layers have.

Every layer is a nested dict whose kernels read the residual stream through a
norm, read something inside of the layer, or write to the residual stream.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models import language_model
from models.module import Params

Path = tuple[str, ...]

# Kernels that read the residual stream, by the norm between.
READERS: dict[Path, tuple[Path, ...]] = {
  ("norm",): (("mixer", "in_proj"),),
  ("attn_norm",): (
    ("attn", "q_proj"),
    ("attn", "k_proj"),
    ("attn", "v_proj"),
  ),
  ("mlp_norm",): (("mlp", "gate_proj"), ("mlp", "up_proj")),
}
# Kernels that write to it.
WRITERS: tuple[Path, ...] = (
  ("mixer", "out_proj"),
  ("attn", "o_proj"),
  ("mlp", "down_proj"),
)

# Norms between such a kernel and the stream.
BEHIND: tuple[Path, ...] = (("post_attn_norm",), ("post_mlp_norm",))


def at(tree: Any, path: Sequence[str | int]) -> Any:
  """The node of nested dicts at a path."""
  for key in path:
    tree = tree[key]
  return tree


def put(tree: Any, path: Sequence[str | int], value: Any) -> Any:
  """The same nested dicts with another node at a path."""
  if not path:
    return value
  first, *rest = path
  return {**tree, first: put(tree.get(first, {}), rest, value)}


def kernels(params: dict[str, Any], path: tuple = ()) -> list[tuple]:
  """Paths of the modules of nested dicts that have a kernel."""
  if "kernel" in params:
    return [path]
  return [
    found
    for key, node in params.items()
    if isinstance(node, dict)
    for found in kernels(node, (*path, key))
  ]


def has(params: dict[str, Any], path: Path) -> bool:
  """Whether nested dicts have a node at a path."""
  for key in path:
    if not isinstance(params, dict) or params.get(key) is None:
      return False
    params = params[key]
  return True


def readers(layer: dict[str, Any]) -> list[tuple[Path, list[Path]]]:
  """Norms of a layer, each with the kernels that read it."""
  return [
    (norm, [kernel for kernel in kernels if has(layer, kernel)])
    for norm, kernels in READERS.items()
    if has(layer, norm)
  ]


def writers(layer: dict[str, Any]) -> list[Path]:
  """Kernels of a layer that write to the residual stream."""
  return [kernel for kernel in WRITERS if has(layer, kernel)]


def update(
  tree: dict[str, Any], path: Path, change: Callable[[Any], Any]
) -> dict[str, Any]:
  """The same nested dicts with a node changed."""
  return put(tree, path, change(at(tree, path)))


def map_stacks(
  config: language_model.Config,
  params: Params,
  change: Callable[[dict[str, Any]], dict[str, Any]],
) -> Params:
  """Changes every stack of layers of a model."""
  for stack in dict.fromkeys(
    layer.stack for layer in language_model.layers_of(config)
  ):
    params = update(params, stack, change)
  return params


def unstacked(
  config: language_model.Config, params: Params
) -> list[dict[str, Any]]:
  """The parameters of every layer."""
  return [
    jax.tree.map(lambda a, i=layer.index: a[i], at(params, layer.stack))
    for layer in language_model.layers_of(config)
  ]


def stacked(
  params: Params, stacks: dict[tuple, list[dict[str, Any]]]
) -> Params:
  """The same model with the layers of stacks, by path, as listed."""
  for path, own in stacks.items():
    whole = jax.tree.map(lambda *parts: jnp.stack(parts), *own)
    params = put(params, path, whole)
  return params


def with_layers(
  config: language_model.Config, params: Params, layers: list[dict[str, Any]]
) -> Params:
  """The same model with other layers, in stacks as its config has them."""
  stacks: dict[tuple, list] = {}
  for layer, own in zip(language_model.layers_of(config), layers, strict=True):
    stacks.setdefault(layer.stack, []).append(own)
  return stacked(params | {"layers": {}}, stacks)


def each_layer(
  config: language_model.Config,
  params: Params,
  change: Callable[[int, dict[str, Any]], dict[str, Any]],
) -> Params:
  """Calls `change(number, parameters)` of every layer."""
  layers = unstacked(config, params)
  layers = [change(number, own) for number, own in enumerate(layers)]
  return with_layers(config, params, layers)
