"""Matrix products, attention, convolutions, and transforms of functions."""

from research.program_metrics.builder import Builder, NoFit, Value

# Multiply-adds a nanosecond of a product, and of a convolution.
_RATE = {"float32": 15.0, "bfloat16": 4.0, "float16": 1.5}


def _product(x: Value, count: float) -> float:
  return 500 + count / _RATE[x.dtype]


def _weight(b: Builder, rows: int) -> Value:
  return b.input((rows, b.dim(min(1024, 2 * b.scale / rows))))


def matmul(b: Builder) -> None:
  """A product with weights, or with another array."""
  x = b.take(1, 2, 3)
  w = b.find(
    lambda v: v.shape[:1] == x.shape[-1:] and v.ndim == 2 and v.dtype == x.dtype
  )
  w = w or _weight(b, x.shape[-1])
  b.let(f"{x.name} @ {w.name}", (*x.shape[:-1], w.shape[1]), x.dtype,
        _product(x, x.size * w.shape[1]))  # fmt: skip


def linear(b: Builder) -> None:
  """Weights, a bias and an activation."""
  x = b.take(2, 3)
  w = _weight(b, x.shape[-1])
  bias = b.input((w.shape[1],))
  act = b.draws.choice(("jax.nn.relu", "jnp.tanh", "jax.nn.gelu"))
  b.let(
    f"{act}({x.name} @ {w.name} + {bias.name})",
    (*x.shape[:-1], w.shape[1]),
    x.dtype,
    _product(x, x.size * w.shape[1]),
  )


def gated_mlp(b: Builder) -> None:
  """Two projections, one a gate, and one back."""
  x = b.take(2)
  width = x.shape[1]
  up = _weight(b, width)
  gate = b.input(up.shape)
  down = b.input((up.shape[1], width))
  hidden = b.name((x.shape[0], up.shape[1]), x.dtype)
  b.line(
    f"{hidden} = jax.nn.silu({x.name} @ {gate.name}) * ({x.name} @ {up.name})"
  )
  b.let(f"{x.name} + {hidden} @ {down.name}", x.shape, x.dtype,
        _product(x, 3 * x.size * up.shape[1]))  # fmt: skip


def gram(b: Builder) -> None:
  """Products of all pairs of rows, or of columns."""
  x = b.take(2)
  rows, columns = x.shape
  if b.draws.chance(0.5):
    form, side = "{0} @ {0}.T / {1}", rows
  else:
    form, side = "{0}.T @ {0} / {1}", columns
  b.let(form.format(x.name, x.size // side), (side, side), x.dtype,
        _product(x, x.size * side))  # fmt: skip


# Form of `einsum`, and how many axes it takes of the two factors' letters.
_EINSUMS = (
  "bij,bjk->bik",
  "bij,bkj->bik",
  "bij,bik->bjk",
  "bij,jk->bik",
  "bij,bij->bi",
  "bij,bj->bi",
  "ij,jk->ki",
  "ij,ij->i",
  "ij,j->i",
  "ij,kj->ik",
  "ij,ik->ijk",
  "bhid,bhjd->bhij",
)


def einsum(b: Builder) -> None:
  """A contraction by letters."""
  x = b.take(2, 3, 4)
  form = b.draws.choice([f for f in _EINSUMS if len(f.split(",")[0]) == x.ndim])
  left, right = form.split("->")[0].split(",")
  sizes = dict(zip(left, x.shape))
  for letter in right:
    if letter not in sizes:
      sizes[letter] = b.dim(min(512, b.scale))
  y = b.mate(x, [sizes[letter] for letter in right])
  count = 1
  for size in sizes.values():
    count *= size
  b.let(
    f'jnp.einsum("{form}", {x.name}, {y.name})',
    [sizes[letter] for letter in form.split("->")[1]],
    x.dtype,
    _product(x, count),
  )


def distances(b: Builder) -> None:
  """Squared distances of all rows to some points, by broadcasting."""
  x = b.take(2)
  points = b.input((b.dim(64), x.shape[1]))
  b.let(
    f"jnp.sum(({x.name}[:, None] - {points.name}[None]) ** 2, axis=-1)",
    (x.shape[0], points.shape[0]),
    x.dtype,
    x.size * points.shape[0],
  )


def attention(b: Builder) -> None:
  """Softmax attention of one or several heads, causal or not."""
  x = b.take(2, fits=lambda v: v.shape[0] <= 1024)
  length, width = x.shape
  heads = b.draws.choice([h for h in (1, 1, 2, 4, 8) if width % h == 0])
  size = width // heads
  if heads * length * length > 4 * max(b.scale, 64):
    raise NoFit
  b.spend(
    _product(x, 2 * x.size * length + 3 * x.size * width)
    + 5 * heads * length * length
  )
  names = []
  for _ in range(3):
    w, name = b.input((width, width)), b.name((length, heads, size))
    split = f".reshape({length}, {heads}, {size})"
    b.line(f"{name} = ({x.name} @ {w.name}){split}")
    names.append(name)
  q, k, v = names
  s, p = (b.name((heads, length, length)) for _ in range(2))
  b.line(f'{s} = jnp.einsum("qhd,khd->hqk", {q}, {k}) * {size**-0.5:.4f}')
  if b.draws.chance(0.5):
    b.line(f"mask = jnp.tril(jnp.ones(({length}, {length}), bool))")
    b.line(f"{s} = jnp.where(mask, {s}, -1e4)")
  b.line(f"{p} = jax.nn.softmax({s}, axis=-1)")
  b.let(f'jnp.einsum("hqk,khd->qhd", {p}, {v}).reshape({length}, {width})',
        x.shape, x.dtype)  # fmt: skip


def dot_product_attention(b: Builder) -> None:
  """The library's attention, of which CPUs have none in float16."""
  x = b.take(4, fits=lambda v: v.shape[1] <= 512 and v.dtype != "float16")
  batch, length, heads, size = x.shape
  k, v = b.mate(x), b.mate(x)
  causal = b.draws.chance(0.5)
  cost = _product(x, 2 * x.size * length)
  b.let(
    f"jax.nn.dot_product_attention({x.name}, {k.name}, {v.name}, "
    f"is_causal={causal})",
    x.shape,
    x.dtype,
    cost + 6 * batch * heads * length * length,
  )


def conv1d(b: Builder) -> None:
  """A convolution over (batch, length, channels)."""
  x = b.take(3)
  batch, length, channels = x.shape
  kernel = b.draws.choice((1, 3, 4, 5, 7))
  stride = b.draws.choice((1, 1, 2))
  depthwise = b.draws.chance(0.3)
  filters = channels if depthwise else b.dim(256)
  w = b.input((kernel, 1 if depthwise else channels, filters))
  groups = f", feature_group_count={channels}" if depthwise else ""
  out = -(-length // stride)
  macs = batch * out * w.size
  b.let(
    f"jax.lax.conv_general_dilated({x.name}, {w.name}, ({stride},), "
    f'"SAME", dimension_numbers=("NWC", "WIO", "NWC"){groups})',
    (batch, out, filters),
    x.dtype,
    2000 + macs * (3 if depthwise else 0.3),
  )


def conv2d(b: Builder) -> None:
  """A convolution over (batch, height, width, channels)."""
  x = b.take(4)
  batch, height, width, channels = x.shape
  kernel = b.draws.choice((1, 3, 3, 5))
  stride = b.draws.choice((1, 1, 2))
  depthwise = b.draws.chance(0.25)
  filters = channels if depthwise else b.dim(128)
  w = b.input((kernel, kernel, 1 if depthwise else channels, filters))
  groups = f", feature_group_count={channels}" if depthwise else ""
  out = (-(-height // stride), -(-width // stride))
  macs = batch * out[0] * out[1] * w.size
  b.let(
    f"jax.lax.conv_general_dilated({x.name}, {w.name}, ({stride}, {stride}), "
    f'"SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"){groups})',
    (batch, *out, filters),
    x.dtype,
    2000 + macs * (3 if depthwise else 0.3),
  )


def pool(b: Builder) -> None:
  """The largest of, or the sum over, windows of one axis or two."""
  x = b.take(2, 3, 4)
  size = b.draws.choice((2, 3))
  window, stride = [1] * x.ndim, [1] * x.ndim
  for axis in (0,) if x.ndim == 2 else (1, 2)[: x.ndim - 2]:
    window[axis], stride[axis] = size, 2
  start, function = b.draws.choice(
    (("-jnp.inf", "jax.lax.max"), ("0.0", "jax.lax.add"))
  )
  b.let(
    f"jax.lax.reduce_window({x.name}, {start}, "
    f'{function}, {tuple(window)}, {tuple(stride)}, "SAME")',
    [-(-n // s) for n, s in zip(x.shape, stride)],
    x.dtype,
    5 * x.size * size,
  )


def fourier(b: Builder) -> None:
  """Power of the frequencies of the last axis."""
  x = b.take(1, 2, fits=lambda v: v.dtype == "float32" and v.shape[-1] >= 4)
  shape = (*x.shape[:-1], x.shape[-1] // 2 + 1)
  b.let(f"jnp.abs(jnp.fft.rfft({x.name})) ** 2", shape, x.dtype,
        2000 + 12 * x.size)  # fmt: skip


# Functions of one row of n numbers, and whether they give a row or a number.
_ROWS = (
  ("lambda r: jnp.cumsum(r)[::-1] * 0.1", True),
  ("lambda r: jnp.sort(r) - jnp.mean(r)", True),
  ("lambda r: jnp.tanh(r) / (1 + jnp.max(jnp.abs(r)))", True),
  ("lambda r: jnp.dot(r, jnp.flip(r))", False),
  ("lambda r: jnp.max(r) - jnp.min(r)", False),
  ("lambda r: jnp.sum(jnp.where(r > 0, r, jnp.exp(r)))", False),
)


def vmap(b: Builder) -> None:
  """A function of rows, for all of them."""
  x = b.take(2)
  form, keeps = b.draws.choice(_ROWS)
  b.let(
    f"jax.vmap({form})({x.name})",
    x.shape if keeps else x.shape[:1],
    x.dtype,
    (6 * x.shape[1].bit_length() if "sort" in form else 6) * x.size,
  )


def vmap_window(b: Builder) -> None:
  """Windows of rows, each with a start of its own."""
  x = b.take(2)
  size = b.draws.integer(1, x.shape[1])
  i = b.input((x.shape[0],), "int32", x.shape[1] - size + 1)
  b.let(
    "jax.vmap(lambda r, s: jax.lax.dynamic_slice(r, (s,), "
    f"({size},)))({x.name}, {i.name})",
    (x.shape[0], size),
    x.dtype,
    6 * x.shape[0] * size,
  )


# Functions of an array t and weights w.
_LOSSES = (
  "jnp.sum(jnp.tanh(t @ w) ** 2)",
  "jnp.mean(jax.nn.softplus(t @ w))",
  "jnp.sum(jax.nn.logsumexp(t @ w, axis=-1))",
)


def grad(b: Builder) -> None:
  """The gradient of a small loss."""
  x = b.take(2)
  w = _weight(b, x.shape[1])
  form = b.draws.choice(_LOSSES).replace("w", w.name)
  count = x.size * w.shape[1]
  b.let(f"jax.grad(lambda t: {form})({x.name})", x.shape, x.dtype,
        _product(x, 2 * count) + 5 * x.shape[0] * w.shape[1])  # fmt: skip


def jvp(b: Builder) -> None:
  """A directional derivative."""
  x = b.take(1, 2)
  v = b.mate(x)
  form = b.draws.choice(
    ("jnp.tanh(t) * t", "jax.nn.softmax(t, axis=-1)",
     "t / (1 + jnp.sum(t * t))")
  )  # fmt: skip
  b.let(f"jax.jvp(lambda t: {form}, ({x.name},), ({v.name},))[1]", x.shape,
        x.dtype, 6 * x.size)  # fmt: skip
