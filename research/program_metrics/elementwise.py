"""Operators that leave a shape as it is, and reductions."""

from research.program_metrics.builder import Builder, NoFit

# Name -> the expression and nanoseconds an element.
UNARY = {
  "affine": ("{} * 0.7 + 0.1", 0.3),
  "square": ("{0} * {0} - 0.5", 0.3),
  "polynomial": ("({0} * 0.25 - 0.5) * {0} * {0} + 0.75", 0.5),
  "relu": ("jax.nn.relu({})", 0.3),
  "clip": ("jnp.clip({}, -1, 1)", 0.3),
  "abs": ("jnp.abs({}) - 0.5", 0.3),
  "sign": ("jnp.sign({}) * 0.5", 0.5),
  "tanh": ("jnp.tanh({})", 2.0),
  "sigmoid": ("jax.nn.sigmoid({})", 1.5),
  "silu": ("jax.nn.silu({})", 1.5),
  "gelu": ("jax.nn.gelu({})", 3.0),
  "softplus": ("jax.nn.softplus({})", 4.0),
  "exp": ("jnp.exp(-jnp.abs({}))", 1.5),
  "log": ("jnp.log1p(jnp.abs({}))", 3.0),
  "sqrt": ("jnp.sqrt(jnp.abs({}) + 1)", 1.0),
  "rsqrt": ("jax.lax.rsqrt({0} * {0} + 1)", 1.0),
  "sin": ("jnp.sin({})", 3.0),
  "cos": ("jnp.cos(3 * {})", 3.0),
  "erf": ("jax.lax.erf({})", 3.0),
  "round": ("jnp.round({} * 16) / 16", 0.6),
}
BINARY = {
  "add": ("{} + {}", 0.5),
  "subtract": ("{} - 0.5 * {}", 0.5),
  "multiply": ("{} * {}", 0.5),
  "maximum": ("jnp.maximum({}, {})", 0.5),
  "divide": ("{} / (1 + jnp.abs({}))", 0.8),
  "where": ("jnp.where({0} > {1}, {0}, 0.5 * {1})", 0.8),
  "hypot": ("jnp.sqrt({0} * {0} + {1} * {1} + 1)", 1.0),
}
REDUCE = {
  "sum": ("jnp.sum({}, axis={})", 0.7),
  "mean": ("jnp.mean({}, axis={})", 0.7),
  "max": ("jnp.max({}, axis={})", 0.7),
  "min": ("jnp.min({}, axis={})", 0.7),
  "var": ("jnp.var({}, axis={})", 1.5),
  "logsumexp": ("jax.nn.logsumexp({}, axis={})", 3.0),
  "norm": ("jnp.sqrt(jnp.sum({0} * {0}, axis={1}) + 1)", 0.9),
}
CUMULATIVE = {
  "cumsum": "jnp.cumsum({}, axis={})",
  "cumprod": "jnp.cumprod({}, axis={})",
  "cummax": "jax.lax.cummax({}, axis={})",
  "cumlogsumexp": "jax.lax.cumlogsumexp({}, axis={})",
}
NORMALISE = {
  "softmax": ("jax.nn.softmax({}, axis={})", 3.0),
  "log_softmax": ("jax.nn.log_softmax({}, axis={})", 3.0),
  "standardize": ("jax.nn.standardize({}, axis={})", 2.0),
}


def unary(b: Builder, name: str) -> None:
  """A function of each element."""
  form, cost = UNARY[name]
  x = b.take()
  b.let(form.format(x.name), x.shape, x.dtype, cost * x.size)


def binary(b: Builder, name: str) -> None:
  """A function of two arrays, of one shape or broadcast."""
  form, cost = BINARY[name]
  x = b.take()
  y = b.mate(x, x.shape if b.draws.chance(0.6) else x.shape[-1:])
  b.let(form.format(x.name, y.name), x.shape, x.dtype, cost * x.size)


def reduce(b: Builder, name: str) -> None:
  """A reduction over one axis, or over all but the last."""
  form, cost = REDUCE[name]
  x = b.take(2, 3, 4)
  if b.draws.chance(0.75):
    axis = b.draws.integer(0, x.ndim - 1)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
  else:
    axis, shape = tuple(range(x.ndim - 1)), x.shape[-1:]
  b.let(form.format(x.name, axis), shape, x.dtype, cost * x.size)


def argmax(b: Builder) -> None:
  """Indices of the largest elements, and what they say of another array."""
  x = b.take(2, 3)
  axis = b.draws.integer(0, x.ndim - 1)
  shape = x.shape[:axis] + x.shape[axis + 1 :]
  b.let(f"jnp.argmax({x.name}, axis={axis})", shape, "int32", 2 * x.size)


def cumulative(b: Builder, name: str) -> None:
  """A running sum or its like."""
  x = b.take()
  axis = b.draws.integer(0, x.ndim - 1)
  cost = 30 if name == "cumlogsumexp" else 12
  b.let(CUMULATIVE[name].format(x.name, axis), x.shape, x.dtype,
        cost * x.size)  # fmt: skip


def normalise(b: Builder, name: str) -> None:
  """Numbers along an axis, brought to a scale."""
  form, cost = NORMALISE[name]
  x = b.take(2, 3, 4)
  axis = b.draws.choice((-1, -1, 0))
  b.let(form.format(x.name, axis), x.shape, x.dtype, cost * x.size)


def layer_norm(b: Builder) -> None:
  """Layer norm, written out."""
  x = b.take(2, 3)
  gain, bias = b.input(x.shape[-1:]), b.input(x.shape[-1:])
  mean = b.name(x.shape, x.dtype)
  scale = b.name((*x.shape[:-1], 1), x.dtype)
  b.line(f"{mean} = {x.name} - jnp.mean({x.name}, axis=-1, keepdims=True)")
  b.line(
    f"{scale} = jax.lax.rsqrt("
    f"jnp.mean({mean} * {mean}, axis=-1, keepdims=True) + 1e-3)"
  )
  b.let(f"{mean} * {scale} * {gain.name} + {bias.name}", x.shape, x.dtype,
        2 * x.size)  # fmt: skip


def rms_norm(b: Builder) -> None:
  """RMS norm, written out."""
  x = b.take(2, 3)
  gain = b.input(x.shape[-1:])
  scale = b.name((*x.shape[:-1], 1), x.dtype)
  b.line(
    f"{scale} = jax.lax.rsqrt("
    f"jnp.mean({x.name} * {x.name}, axis=-1, keepdims=True) + 1e-3)"
  )
  b.let(f"{x.name} * {scale} * {gain.name}", x.shape, x.dtype, 1.5 * x.size)


def quantize(b: Builder) -> None:
  """Rounds to 8 bits and back, one scale a row."""
  x = b.take(2, 3)
  scale = b.name((*x.shape[:-1], 1), x.dtype)
  b.line(f"{scale} = jnp.max(jnp.abs({x.name}), axis=-1, keepdims=True) + 1e-3")
  q = b.name(x.shape, "int8")
  b.line(f"{q} = jnp.round({x.name} / {scale} * 127).astype(jnp.int8)")
  b.let(f"{q}.astype({scale}.dtype) * ({scale} / 127)", x.shape, x.dtype,
        2 * x.size)  # fmt: skip


def cast(b: Builder) -> None:
  """Work in another precision."""
  x = b.take()
  other = "bfloat16" if x.dtype == "float32" else "float32"
  name = b.name(x.shape, other)
  b.line(f"{name} = {x.name}.astype(jnp.{other})")
  b.let(f"({name} * {name} + 1).astype(jnp.{x.dtype})", x.shape, x.dtype,
        2 * x.size)  # fmt: skip


def integers(b: Builder) -> None:
  """Bits of whole numbers, mixed."""
  x = b.find(lambda v: v.dtype == "int32")
  if x is None:
    x = b.input(b.shape(b.draws.choice((1, 2))), "int32", 1 << 30)
  form = b.draws.choice(
    ("({0} ^ ({0} >> 3)) & 1023", "{0} * 5 % 257", "jnp.abs({0} - 77) // 3")
  )
  b.let(form.format(x.name), x.shape, "int32", 2 * x.size)


def random_bits(b: Builder) -> None:
  """Dropout with bits of a fixed key."""
  x = b.take()
  keep = b.draws.choice((0.5, 0.8, 0.9))
  mask = b.name()
  b.line(f"{mask} = jax.random.bernoulli(jax.random.key(0), {keep}, {x.shape})")
  b.let(f"jnp.where({mask}, {x.name} / {keep}, 0)", x.shape, x.dtype,
        20 * x.size)  # fmt: skip


def rotary(b: Builder) -> None:
  """Rotates pairs of channels by an angle that grows with the position."""
  x = b.take(2, fits=lambda v: v.shape[1] % 2 == 0)
  rows, half = x.shape[0], x.shape[1] // 2
  if x.dtype != "float32":
    raise NoFit
  angle, left, right = (b.name((rows, half)) for _ in range(3))
  b.line(
    f"{angle} = jnp.arange({rows})[:, None] * 0.01 ** "
    f"(jnp.arange({half}) / {half})"
  )
  b.line(f"{left}, {right} = {x.name}[:, :{half}], {x.name}[:, {half}:]")
  b.let(
    f"jnp.concatenate([{left} * jnp.cos({angle}) - {right} * jnp.sin({angle}),"
    f" {left} * jnp.sin({angle}) + {right} * jnp.cos({angle})], axis=1)",
    x.shape,
    cost=12 * x.size,
  )
