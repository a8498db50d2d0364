"""Operators that move elements, and gather or scatter them by index."""

from research.program_metrics.builder import Builder, NoFit, Value


def _axis(b: Builder, x: Value) -> int:
  return b.draws.integer(0, x.ndim - 1)


def _with(x: Value, axis: int, size: int) -> tuple[int, ...]:
  return x.shape[:axis] + (size,) + x.shape[axis + 1 :]


def transpose(b: Builder) -> None:
  """Swaps two axes."""
  x = b.take(2, 3, 4)
  first = b.draws.integer(0, x.ndim - 2)
  axes = list(range(x.ndim))
  axes[first], axes[-1] = axes[-1], axes[first]
  b.let(
    f"jnp.transpose({x.name}, {tuple(axes)}) * 0.5",
    [x.shape[a] for a in axes],
    x.dtype,
    2 * x.size,
  )


def reshape(b: Builder) -> None:
  """Joins two axes, or cuts one in two."""
  x = b.take(1, 2, 3, 4)
  if x.ndim > 1 and (x.ndim == 4 or b.draws.chance(0.5)):
    place = b.draws.integer(0, x.ndim - 2)
    joined = x.shape[place] * x.shape[place + 1]
    shape = x.shape[:place] + (joined,) + x.shape[place + 2 :]
  else:
    place = _axis(b, x)
    size = x.shape[place]
    parts = [n for n in range(2, min(size, 65)) if size % n == 0]
    if not parts:
      raise NoFit
    part = b.draws.choice(parts)
    shape = x.shape[:place] + (size // part, part) + x.shape[place + 1 :]
  b.let(f"jnp.reshape({x.name}, {shape})", shape, x.dtype)


def window(b: Builder) -> None:
  """A part of an axis."""
  x = b.take()
  axis = _axis(b, x)
  size = b.draws.integer(1, x.shape[axis])
  start = b.draws.integer(0, x.shape[axis] - size)
  step = b.draws.choice((1, 1, 2))
  b.let(
    f"jax.lax.slice_in_dim({x.name}, {start}, {start + size}, {step}, "
    f"axis={axis}) + 1",
    _with(x, axis, -(-size // step)),
    x.dtype,
    x.size,
  )


def concatenate(b: Builder) -> None:
  """Two arrays, one behind the other."""
  x = b.take()
  axis = _axis(b, x)
  y = b.mate(x)
  b.let(
    f"jnp.concatenate([{x.name}, {y.name}], axis={axis})",
    _with(x, axis, 2 * x.shape[axis]),
    x.dtype,
    2 * x.size,
  )


def stack(b: Builder) -> None:
  """Two arrays on a new axis."""
  x = b.take(1, 2)
  y = b.mate(x)
  b.let(f"jnp.stack([{x.name}, {y.name}])", (2, *x.shape), x.dtype,
        2 * x.size)  # fmt: skip


def pad(b: Builder) -> None:
  """Zeros around an axis."""
  x = b.take()
  axis = _axis(b, x)
  before, after = b.draws.integer(0, 4), b.draws.integer(1, 4)
  widths = [(0, 0)] * x.ndim
  widths[axis] = (before, after)
  b.let(
    f"jnp.pad({x.name}, {tuple(widths) if x.ndim > 1 else widths[0]})",
    _with(x, axis, x.shape[axis] + before + after),
    x.dtype,
    x.size,
  )


def roll(b: Builder) -> None:
  """Differences to a shifted copy."""
  x = b.take()
  axis = _axis(b, x)
  shift = b.draws.integer(1, 7)
  b.let(f"{x.name} - jnp.roll({x.name}, {shift}, axis={axis})", x.shape,
        x.dtype, 2 * x.size)  # fmt: skip


def flip(b: Builder) -> None:
  """Sums with the reversed array."""
  x = b.take()
  b.let(f"{x.name} + jnp.flip({x.name}, axis={_axis(b, x)})", x.shape,
        x.dtype, 2 * x.size)  # fmt: skip


def repeat(b: Builder) -> None:
  """Elements along an axis several times."""
  x = b.take(1, 2, 3)
  axis, times = _axis(b, x), b.draws.integer(2, 4)
  b.let(
    f"jnp.repeat({x.name}, {times}, axis={axis})",
    _with(x, axis, times * x.shape[axis]),
    x.dtype,
    2 * times * x.size,
  )


def outer(b: Builder) -> None:
  """All pairs of two vectors."""
  x, y = b.take(1), b.take(1)
  form = b.draws.choice(
    ("{0}[:, None] * {1}[None, :]", "jnp.tanh({0}[:, None] - {1}[None, :])",
     "jnp.maximum({0}[:, None], {1}[None, :])")
  )  # fmt: skip
  b.let(form.format(x.name, y.name), (x.size, y.size), x.dtype,
        2 * x.size * y.size)  # fmt: skip


def triangle(b: Builder) -> None:
  """The lower or upper triangle."""
  x = b.take(2, 3)
  name = b.draws.choice(("tril", "triu"))
  b.let(f"jnp.{name}({x.name}, {b.draws.integer(-1, 2)})", x.shape, x.dtype,
        x.size)  # fmt: skip


def sort(b: Builder) -> None:
  """Sorted along an axis."""
  x = b.take(1, 2, 3)
  axis = _axis(b, x)
  cost = 6 * x.size * (1 + x.shape[axis].bit_length())
  b.let(f"jnp.sort({x.name}, axis={axis})", x.shape, x.dtype, cost)


def argsort(b: Builder) -> None:
  """The order along an axis."""
  x = b.take(1, 2)
  axis = _axis(b, x)
  cost = 9 * x.size * (1 + x.shape[axis].bit_length())
  b.let(f"jnp.argsort({x.name}, axis={axis})", x.shape, "int32", cost)


def top_k(b: Builder) -> None:
  """The largest of the last axis, and where they are."""
  x = b.take(1, 2, 3, fits=lambda v: v.shape[-1] >= 4)
  k = b.dim(x.shape[-1] // 2, 1)
  b.spend(8 * x.size * (1 + x.shape[-1].bit_length()))
  values, places = b.name(), b.name()
  b.line(f"{values}, {places} = jax.lax.top_k({x.name}, {k})")
  shape = (*x.shape[:-1], k)
  b.keep(values, shape, x.dtype)
  b.keep(places, shape, "int32")


def _indices(b: Builder, count: int, bound: int) -> Value:
  return b.input((count,), "int32", bound)


def gather(b: Builder) -> None:
  """Rows by their index."""
  x = b.take(1, 2, 3)
  axis = b.draws.choice((0, 0, x.ndim - 1))
  count = b.dim(2 * x.shape[axis], 1)
  i = _indices(b, count, x.shape[axis])
  shape = _with(x, axis, count)
  b.let(f"jnp.take({x.name}, {i.name}, axis={axis})", shape, x.dtype,
        3 * x.size * count / x.shape[axis])  # fmt: skip


def pick_along(b: Builder) -> None:
  """One element of each row."""
  x = b.take(2)
  i = _indices(b, x.shape[0], x.shape[1])
  b.let(
    f"jnp.take_along_axis({x.name}, {i.name}[:, None], axis=1)[:, 0]",
    x.shape[:1],
    x.dtype,
    20 * x.shape[0],
  )


def embed(b: Builder) -> None:
  """Rows of a table of weights."""
  width, rows = b.dim(256), b.dim(max(b.scale / 8, 2))
  if width * rows > b.scale:
    raise NoFit
  table = b.input((rows, width))
  i = b.find(lambda v: v.dtype == "int32" and v.ndim == 1)
  i = i or _indices(b, b.dim(max(b.scale / width, 2)), rows)
  b.let(f"{table.name}[{i.name} % {rows}]", (*i.shape, width), b.dtype,
        4 * i.size * width)  # fmt: skip


def scatter(b: Builder) -> None:
  """Adds rows to rows that indices name, or takes the larger."""
  x = b.take(1, 2)
  count = b.dim(2 * x.shape[0], 1)
  i = _indices(b, count, x.shape[0])
  y = b.mate(x, (count, *x.shape[1:]))
  kind = b.draws.choice(("add", "add", "max", "set"))
  b.let(f"{x.name}.at[{i.name}].{kind}({y.name})", x.shape, x.dtype,
        20 * y.size + x.size)  # fmt: skip


def segment_sum(b: Builder) -> None:
  """Sums of rows by their segment."""
  x = b.take(1, 2)
  segments = b.dim(x.shape[0], 1)
  i = _indices(b, x.shape[0], segments)
  b.let(
    f"jax.ops.segment_sum({x.name}, {i.name}, num_segments={segments})",
    (segments, *x.shape[1:]),
    x.dtype,
    20 * x.size,
  )


def one_hot(b: Builder) -> None:
  """Indices as rows with a single one."""
  i = b.find(lambda v: v.dtype == "int32" and v.ndim == 1)
  classes = b.dim(256)
  i = i or _indices(b, b.dim(max(b.scale / classes, 2)), classes)
  b.let(
    f"jax.nn.one_hot({i.name}, {classes}, dtype=jnp.{b.dtype})",
    (*i.shape, classes),
    cost=i.size * classes,
  )


def search(b: Builder) -> None:
  """Where numbers would stand in a sorted vector."""
  x, y = b.take(1), b.take(1)
  cost = 8 * x.size * x.size.bit_length() + 30 * y.size * x.size.bit_length()
  b.let(f"jnp.searchsorted(jnp.sort({x.name}), {y.name})", y.shape, "int32",
        cost)  # fmt: skip


def dynamic_slice(b: Builder) -> None:
  """A window whose start is computed."""
  x = b.take(1, 2)
  size = b.draws.integer(1, x.shape[0])
  start = b.name()
  b.line(f"{start} = jnp.argmax({x.name}.ravel()) % {x.shape[0]}")
  b.let(
    f"jax.lax.dynamic_slice_in_dim({x.name}, {start}, {size})",
    (size, *x.shape[1:]),
    x.dtype,
    3 * x.size,
  )
