"""Random JAX programs: a pure function of a seed and an index.

A program is a few statements, each by an operator that takes earlier values
or new inputs, so that what is written always fits. Some programs are the
gradient of such a function. The source is all that is needed to run one.
"""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Mapping

import numpy as np

from research.program_metrics import (
  elementwise,
  loops,
  products,
  reshaping,
)
from research.program_metrics.builder import Builder, Draws, NoFit

# Raise it when programs of the same seed become others.
VERSION = 1
Write = Callable[[Builder], None]


@dataclasses.dataclass(frozen=True)
class Operator:
  """How a kind of statement is written.

  Attributes:
    write: adds it to a program, or raises NoFit.
    weight: how often it is chosen.
    has_gradient: whether reverse mode can go through it.
  """

  write: Write
  weight: float = 1.0
  has_gradient: bool = True


@dataclasses.dataclass(frozen=True)
class Input:
  """An argument of `f`; whole numbers lie in [0, bound)."""

  shape: tuple[int, ...]
  dtype: str
  bound: int | None = None


@dataclasses.dataclass(frozen=True)
class Program:
  """A program.

  Attributes:
    index: of it.
    source: Python text with `inputs` and `f`.
    typed: the same with the shapes of each statement's arrays as comments.
    inputs: arguments by name, in order.
    operators: names of the operators of its statements, in order; "gradient"
      is the last where `f` is the gradient of what they compute.
    outputs: (shape, dtype) of what `f` gives.
  """

  index: int
  source: str
  typed: str
  inputs: Mapping[str, Input]
  operators: tuple[str, ...]
  outputs: tuple[tuple[tuple[int, ...], str], ...]


def _family(write, names, weight: float, **more) -> dict[str, Operator]:
  return {
    name: Operator(functools.partial(write, name=name), weight, **more)
    for name in names
  }


def _each(module, names: str, weight: float, **more) -> dict[str, Operator]:
  return {
    name: Operator(getattr(module, name), weight, **more)
    for name in names.split()
  }


OPERATORS: dict[str, Operator] = {
  **_family(elementwise.unary, elementwise.UNARY, 0.4),
  **_family(elementwise.binary, elementwise.BINARY, 0.9),
  **_family(elementwise.reduce, elementwise.REDUCE, 0.6),
  **_family(elementwise.cumulative, ("cumsum", "cumprod", "cummax"), 0.6),
  # XLA compiles its gradient for a quarter of a minute.
  **_family(elementwise.cumulative, ("cumlogsumexp",), 0.6, has_gradient=False),
  **_family(elementwise.normalise, elementwise.NORMALISE, 0.9),
  **_each(elementwise, "layer_norm rms_norm quantize cast rotary", 1.0),
  **_each(elementwise, "argmax integers random_bits", 0.5),
  **_each(
    reshaping,
    "transpose reshape window concatenate stack pad roll flip repeat outer "
    "triangle",
    0.6,
  ),
  **_each(
    reshaping,
    "sort argsort top_k gather pick_along embed scatter segment_sum one_hot "
    "search dynamic_slice",
    1.2,
  ),
  **_each(products, "matmul linear einsum", 3.0),
  **_each(
    products,
    "gated_mlp gram distances attention dot_product_attention conv1d conv2d "
    "pool fourier vmap vmap_window grad jvp",
    1.6,
  ),
  **_each(
    loops,
    "scan_rnn scan_recurrence associative_scan fori_elementwise "
    "power_iteration newton_schulz conjugate_gradient map_rows cond horizon",
    1.2,
  ),
  "while_loop": Operator(loops.while_loop, 1.2, has_gradient=False),
}
GRADIENT = "gradient"
# Nanoseconds by the operators' own rough count.
_CHEAPEST, _DEAREST = 2e5, 6e7


def program(seed: int, index: int) -> Program:
  """Writes a program.

  Args:
    seed: of the data set.
    index: of the program, from 0.
  """
  attempt = 0
  while True:
    draws = Draws(f"program {VERSION} {seed} {index} {attempt}")
    try:
      return _write(draws, index)
    except NoFit:
      attempt += 1


def _write(draws: Draws, index: int) -> Program:
  dtype = draws.weighted(("float32", "bfloat16", "float16"), (8, 1.5, 0.5))
  scale = draws.log_uniform(2**7, 2**20)
  count = draws.integer(1, 8)
  is_gradient = draws.chance(0.15)
  budget = draws.log_uniform(_CHEAPEST, _DEAREST)
  budget *= 0.3 if is_gradient else 1
  b = Builder(draws, dtype, scale, budget)
  b.values.append(b.input(b.shape(draws.weighted((1, 2, 3, 4), (2, 5, 3, 2)))))
  names = [
    name
    for name, operator in OPERATORS.items()
    if operator.has_gradient or not is_gradient
  ]
  weights = [OPERATORS[name].weight for name in names]
  operators = []
  for _ in range(8 * count):
    name = draws.weighted(names, weights)
    state = b.snapshot()
    try:
      OPERATORS[name].write(b)
    except NoFit:
      b.restore(state)
      continue
    operators.append(name)
    if len(operators) == count:
      break
  outputs = [v for v in b.values if v.name not in b.used and v not in b.inputs]
  # An input that no statement uses is removed.
  first = b.values[0]
  if first.name not in b.used:
    del b.inputs[first]
  if is_gradient:
    outputs = [v for v in outputs if v.is_float]
    operators.append(GRADIENT)
    if not any(v.is_float for v in b.inputs):
      raise NoFit
  if not outputs:
    raise NoFit
  inputs = {
    value.name: Input(value.shape, value.dtype, bound)
    for value, bound in b.inputs.items()
  }
  write = _gradient if is_gradient else _plain
  head = _HEAD + _inputs(inputs)
  source = head + write(b, b.lines, outputs)
  typed = head + write(b, b.typed_lines(), outputs)
  if is_gradient:
    outputs = [v for v in b.inputs if v.is_float]
  return Program(
    index=index,
    source=source,
    typed=typed,
    inputs=inputs,
    operators=tuple(operators),
    outputs=tuple((v.shape, v.dtype) for v in outputs),
  )


_HEAD = "import jax\nimport jax.numpy as jnp\n\n"


def _inputs(inputs: Mapping[str, Input]) -> str:
  """A dictionary, one argument a line."""
  lines = []
  for name, made in inputs.items():
    bound = "" if made.bound is None else f", {made.bound}"
    lines.append(f'  "{name}": ({made.shape}, "{made.dtype}"{bound}),')
  return "inputs = {\n" + "\n".join(lines) + "\n}\n\n\n"


def _function(name: str, arguments, lines, results) -> str:
  body = "\n".join([*lines, f"return {', '.join(results)}"])
  return f"def {name}({', '.join(arguments)}):\n{textwrap.indent(body, '  ')}\n"


def _plain(b: Builder, lines, outputs) -> str:
  return _function(
    "f", [v.name for v in b.inputs], lines, [v.name for v in outputs]
  )


def _gradient(b: Builder, lines, outputs) -> str:
  """The gradient to all float inputs."""
  arguments = [v.name for v in b.inputs]
  means = [f"jnp.mean({v.name}.astype(jnp.float32))" for v in outputs]
  loss = _function("loss", arguments, lines, [" + ".join(means)])
  floats = [i for i, v in enumerate(b.inputs) if v.is_float]
  where = tuple(floats) if len(floats) > 1 else floats[0]
  call = f"jax.grad(loss, argnums={where})({', '.join(arguments)})"
  return f"{loss}\n\n{_function('f', arguments, [], [call])}"


def arguments(made: Program, seed: int = 0) -> list[np.ndarray]:
  """Arrays to call `f` with: standard normal floats, uniform integers.

  Floats are float32; casting them to the input's dtype is left to the caller,
  as numpy knows no bfloat16.
  """
  generator = np.random.default_rng((seed, made.index))
  return [
    generator.standard_normal(item.shape, np.float32)
    if item.bound is None
    else generator.integers(0, item.bound, item.shape, np.int32)
    for item in made.inputs.values()
  ]
