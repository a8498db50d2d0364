"""Loops: scan, fori_loop, while_loop, map, cond, and associative scans."""

from research.program_metrics.builder import Builder, NoFit

# Nanoseconds that a turn of a loop takes beside its work.
_TURN = 1500.0


def scan_rnn(b: Builder) -> None:
  """A recurrent network over rows."""
  x = b.take(2)
  turns, width = x.shape
  hidden = b.dim(min(256, 2 * b.scale / width))
  w, u = b.input((width, hidden)), b.input((hidden, hidden))
  b.spend(turns * (_TURN + (width + hidden) * hidden / 4))
  step, last, states = f"step{len(b.lines)}", b.name(), b.name()
  b.line(
    f"def {step}(h, r):\n"
    f"  h = jnp.tanh(r @ {w.name} + h @ {u.name})\n"
    "  return h, h"
  )
  b.line(
    f"{last}, {states} = jax.lax.scan({step}, "
    f"jnp.zeros({hidden}, {x.name}.dtype), {x.name})"
  )
  b.keep(last, (hidden,), x.dtype)
  b.keep(states, (turns, hidden), x.dtype)


_RECURRENCES = (
  ("0.9 * h + r", "h"),
  ("jax.nn.sigmoid(r) * h + (1 - jax.nn.sigmoid(r)) * jnp.tanh(r)", "h"),
  ("jnp.maximum(0.95 * h, r)", "h - r"),
  ("jnp.sin(h + r)", "h * r"),
)


def scan_recurrence(b: Builder) -> None:
  """An elementwise recurrence over the first axis, forwards or backwards."""
  x = b.take(2, 3)
  form, out = b.draws.choice(_RECURRENCES)
  reverse = b.draws.chance(0.3)
  unroll = b.draws.choice((1, 1, 1, 4))
  b.spend(x.shape[0] * _TURN + 8 * x.size)
  step, last, states = f"step{len(b.lines)}", b.name(), b.name()
  b.line(f"def {step}(h, r):\n  h = {form}\n  return h, {out}")
  options = (", reverse=True" if reverse else "") + (
    f", unroll={unroll}" if unroll > 1 else ""
  )
  b.line(
    f"{last}, {states} = jax.lax.scan({step}, "
    f"jnp.zeros_like({x.name}[0]), {x.name}{options})"
  )
  b.keep(last, x.shape[1:], x.dtype)
  b.keep(states, x.shape, x.dtype)


def associative_scan(b: Builder) -> None:
  """A scan in logarithmic depth."""
  x = b.take(1, 2)
  function = b.draws.choice(("jnp.add", "jnp.maximum", "jnp.multiply"))
  b.let(f"jax.lax.associative_scan({function}, {x.name})", x.shape, x.dtype,
        5000 + 12 * x.size)  # fmt: skip


def fori_elementwise(b: Builder) -> None:
  """A fixed number of elementwise steps."""
  x = b.take()
  turns = b.dim(64)
  body = b.draws.choice(
    ("0.5 * (t + 1 / (1 + t * t))", "jnp.sin(t) + 0.1 * i", "t - 0.1 * t ** 3",
     "jnp.tanh(t + 0.01 * i)")
  )  # fmt: skip
  b.let(
    f"jax.lax.fori_loop(0, {turns}, lambda i, t: ({body})"
    f".astype({x.name}.dtype), {x.name})",
    x.shape,
    x.dtype,
    turns * (_TURN + 3 * x.size),
  )


def power_iteration(b: Builder) -> None:
  """A vector, multiplied by a square matrix again and again."""
  side = b.dim(min(512, max(b.scale, 16) ** 0.5))
  m = b.find(lambda v: v.ndim == 2 and v.shape[0] == v.shape[1] and v.is_float)
  m = m or b.input((side, side))
  v = b.mate(m, m.shape[:1])
  turns = b.dim(64)
  b.let(
    f"jax.lax.fori_loop(0, {turns}, lambda i, v: {m.name} @ v / "
    f"jnp.sqrt(1 + jnp.sum(v * v)), {v.name})",
    v.shape,
    m.dtype,
    turns * (_TURN + m.size),
  )


def newton_schulz(b: Builder) -> None:
  """Steps of an iteration towards an orthogonal matrix, written out."""
  x = b.take(2, fits=lambda v: max(v.shape) <= 512)
  steps = b.draws.integer(1, 5)
  rows, columns = x.shape
  b.spend(steps * (3000 + 2 * rows * rows * columns / 4))
  name = b.name()
  b.line(f"{name} = {x.name} / (1 + jnp.sqrt(jnp.sum({x.name} ** 2)))")
  b.line(
    f"for _ in range({steps}):\n"
    f"  {name} = 1.5 * {name} - 0.5 * ({name} @ {name}.T) @ {name}"
  )
  b.keep(name, x.shape, x.dtype)


def conjugate_gradient(b: Builder) -> None:
  """Steps of the method of conjugate gradients on a small system."""
  x = b.take(2, fits=lambda v: v.dtype == "float32")
  rows, side = x.shape
  y = b.mate(x, (side,))
  turns = b.dim(32)
  b.spend(turns * (3 * _TURN + 2 * x.size))
  step, name = f"step{len(b.lines)}", b.name()
  b.line(
    f"def {step}(i, s):\n"
    "  t, r, p = s\n"
    f"  q = {x.name}.T @ ({x.name} @ p) / {rows} + p\n"
    "  rate = jnp.dot(r, r) / (jnp.dot(p, q) + 1e-6)\n"
    "  n = r - rate * q\n"
    "  return t + rate * p, n, n + jnp.dot(n, n) / (jnp.dot(r, r) + 1e-6) * p"
  )
  b.line(
    f"{name} = jax.lax.fori_loop(0, {turns}, {step}, "
    f"({y.name}, {y.name}, {y.name}))[0]"
  )
  b.keep(name, y.shape, x.dtype)


def while_loop(b: Builder) -> None:
  """Steps until a counter has run out."""
  x = b.take(1, 2, 3)
  turns = b.dim(64)
  body = b.draws.choice(
    ("0.9 * s[1] + 0.1", "jnp.cos(s[1])", "s[1] / (1 + jnp.abs(s[1]))")
  )
  b.let(
    f"jax.lax.while_loop(lambda s: s[0] < {turns}, "
    f"lambda s: (s[0] + 1, {body}), (0, {x.name}))[1]",
    x.shape,
    x.dtype,
    turns * (_TURN + 2 * x.size),
  )


def map_rows(b: Builder) -> None:
  """A function of rows, one after the other."""
  x = b.take(2, 3)
  form, keeps = b.draws.choice(
    (("jnp.tanh(r) * 0.5", True), ("r - jnp.mean(r)", True),
     ("jnp.sum(r * r)", False))
  )  # fmt: skip
  b.let(
    f"jax.lax.map(lambda r: {form}, {x.name})",
    x.shape if keeps else x.shape[:1],
    x.dtype,
    x.shape[0] * _TURN + 3 * x.size,
  )


def cond(b: Builder) -> None:
  """One of two branches, by the sign of a sum."""
  x = b.take(1, 2, 3)
  left, right = b.draws.choice(
    (("jnp.exp(-t * t)", "t * 0.5"), ("jnp.sort(t, axis=0)", "t + 1"),
     ("jnp.cumsum(t, axis=0)", "jnp.tanh(t)"))
  )  # fmt: skip
  cost = 60 if "sort" in left else 12
  b.let(
    f"jax.lax.cond(jnp.sum({x.name}) > 0, lambda t: {left}, "
    f"lambda t: {right}, {x.name})",
    x.shape,
    x.dtype,
    2000 + cost * x.size,
  )


def horizon(b: Builder) -> None:
  """A plain Python loop: a filter that is applied several times."""
  x = b.take(1, 2, fits=lambda v: v.shape[-1] > 4)
  turns = b.draws.integer(2, 6)
  if x.size < 4:
    raise NoFit
  b.spend(turns * (1000 + 3 * x.size))
  name = b.name()
  b.line(f"{name} = {x.name}")
  b.line(
    f"for k in range({turns}):\n"
    f"  {name} = {name} + 0.25 * (jnp.roll({name}, 2 ** k, axis=-1) - {name})"
  )
  b.keep(name, x.shape, x.dtype)
