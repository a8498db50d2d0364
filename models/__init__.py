"""Flax NNX modules and frozen configs.

NNX runs in tree mode: a module is a plain pytree, so that everything outside
`models` sees `(config, params)` and uses `jax.jit`, `jax.value_and_grad`,
`jax.lax.scan` and optax directly.
"""

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
