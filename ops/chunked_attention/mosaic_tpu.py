"""`chunked_attention` as TPU kernels, forward and backward.

Attention in tiles (https://arxiv.org/abs/2205.14135). A tile of queries meets
the tiles of tokens in its window first and then those of chunk keys that it
sees, of which `spans` tells the first and the last, and which need no mask.
Tiles are (keys, queries): what a query keeps of its softmax then lies along a
row, as memory has it, and only its sums are transposed, at the end.

Backward, one kernel gives the gradients of queries by the same walk, and one
those of keys and values: of tokens, which meet the queries behind them that
reach them, and of chunks, which meet all that see them. Shares are made again
from the log-sum-exps. Nothing of the order of S M is kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ops import dispatch
from ops.chunked_attention import spans

_LANES = 128
_MOST_CHANNELS = 256
# Finite, so that a query that sees no key of its first tile is no NaN.
_UNSEEN = -1e30
# The slot of keys that pad chunks: no query comes that late.
_NEVER = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels are launched.

  Attributes:
    size: Queries of a tile, and keys: a multiple of 128.
    interpret: What `pallas_call` takes, to run on a CPU in tests.
  """

  size: int = 2 * _LANES
  interpret: Any = False


def configure(length: int) -> Config:
  """Returns the Config for S tokens; pure."""
  return Config(size=_LANES if length <= _LANES else 2 * _LANES)


def supports(
  q=None, k=None, v=None, ends=None, *, window=0, top=None, scale=None
) -> str | None:
  """None where the kernels run, else the reason; see `ops/dispatch.py`."""
  del k, v, ends, window, scale
  reason = dispatch.needs_tpu()
  if reason is not None or q is None:
    return reason
  return unfit(q, top)


def unfit(q: jax.Array, top: int | None) -> str | None:
  """Returns why these arrays do not fit the kernels, or None."""
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"takes bfloat16 or float32, not {q.dtype}"
  if q.shape[3] % 8 or q.shape[3] > _MOST_CHANNELS:
    return (
      f"takes heads of a multiple of 8 channels, at most {_MOST_CHANNELS}, not"
      f" {q.shape[3]}"
    )
  if top is not None:
    return "takes all chunks, not those of the highest scores"
  return None if q.size else "takes at least one token"


def forward(
  q, k, v, chunk_k, chunk_v, ends, seen_from, starts, *,
  window, top=None, scale, config=None,
) -> jax.Array:  # fmt: skip
  """Implements `chunked_attention`; arguments as in `ops`, all of them given.

  But for `starts`, which may be None, and chunks, of which there may be none.
  Heads are moved in front of tokens, and where tokens and chunks do not fill
  tiles, zeros stand behind them, which costs copies. `config` is by default
  that of `configure`.
  """
  if reason := unfit(q, top):
    raise ValueError(f"chunked_attention: the Mosaic TPU kernel {reason}")
  b, s, _, d = q.shape
  m = ends.shape[1]
  config = config or configure(s)
  more, beyond = -s % config.size, -m % config.size if m else config.size
  if not m:
    chunk_k = chunk_v = jnp.zeros((b, 0, *k.shape[2:]), k.dtype)
  if starts is None:
    starts = jnp.zeros((b, s), jnp.int32)
  heads = lambda x, count: jnp.pad(
    jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, count), (0, 0)]
  )
  line = lambda x, count, value: jnp.pad(
    x, [(0, 0), (0, count)], constant_values=value
  )
  out = _attend(
    window,
    float(scale),
    config,
    heads(q, more),
    heads(k, more),
    heads(v, more),
    heads(chunk_k, beyond),
    heads(chunk_v, beyond),
    line(ends, beyond, _NEVER),
    line(seen_from, beyond, _NEVER),
    # Behind the last token nothing is seen by others, and of others nothing.
    line(starts, more, s),
  )
  return jnp.swapaxes(out, 1, 2)[:, :s]


def _dot(a, b, over: tuple[int, int] = (1, 0)):
  """Multiplies matrices, summing axis `over[0]` of a and `over[1]` of b."""
  # The product of bfloat16 numbers is exact: higher precision is not defined.
  exact = a.dtype == jnp.bfloat16
  return lax.dot_general(
    a,
    b,
    (((over[0],), (over[1],)), ((), ())),
    precision=lax.Precision.DEFAULT if exact else None,
    preferred_element_type=jnp.float32,
  )


def _column(line):
  """A line (1, J) of integers from lanes to sublanes: (J, 1)."""
  wide = jnp.broadcast_to(line, (_LANES, line.shape[1]))
  return jnp.transpose(wide)[:, :1]


def _slots(tile, shape, axis):
  """Slots of the tokens of a tile along an axis."""
  return tile * shape[axis] + lax.broadcasted_iota(jnp.int32, shape, axis)


def _near_mask(key_tile, query_tile, starts, window):
  """Which pairs (keys, queries) of two tiles of tokens see each other."""
  shape = starts.shape[1], starts.shape[1]
  key, query = _slots(key_tile, shape, 0), _slots(query_tile, shape, 1)
  return (key <= query) & (query - key <= window) & (key >= starts)


def _far_mask(seen_from, ends, query_tile, starts):
  """The same of a tile of chunk keys and one of queries; lines (1, size)."""
  shape = seen_from.shape[1], starts.shape[1]
  query = _slots(query_tile, shape, 1)
  return (_column(seen_from) <= query) & (_column(ends) >= starts)


def _span(span, row, tile, count):
  """Four scalars of `spans.spans`, which lie in a row."""
  at = 4 * (row * count + tile)
  return [span[at + i] for i in range(4)]


def _is_bare(place, span):
  return (place >= span[1]) & (place < span[2])


def _meet(span, near, window, refs, add):
  """Calls `add(keys, values, mask)` for the tile of this step, if there is one.

  The grid is (rows, heads, tiles of queries, near + tiles of chunk keys).
  """
  k, v, chunk_k, chunk_v, seen_from, ends, starts = refs
  tile, step = pl.program_id(2), pl.program_id(3)
  own = _span(span, pl.program_id(0), tile, pl.num_programs(2))
  key_tile = tile - (near - 1) + step

  @pl.when((step < near) & (key_tile >= 0))
  def _():
    add(k[0, 0], v[0, 0], _near_mask(key_tile, tile, starts[0], window))

  place = own[0] + step - near
  inside = (step >= near) & (place < own[3])
  bare = _is_bare(place, own)

  @pl.when(inside & bare)
  def _():
    add(chunk_k[0, 0], chunk_v[0, 0], None)

  @pl.when(inside & ~bare)
  def _():
    mask = _far_mask(seen_from[0], ends[0], tile, starts[0])
    add(chunk_k[0, 0], chunk_v[0, 0], mask)


def _forward_kernel(
  span, q, k, v, chunk_k, chunk_v, seen_from, ends, starts, out, log,
  sums, most, total, *, near, window, scale,
):  # fmt: skip
  step = pl.program_id(3)

  @pl.when(step == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)
    most[...] = jnp.full_like(most, _UNSEEN)
    total[...] = jnp.zeros_like(total)

  def add(keys, values, mask):
    scores = scale * _dot(keys, q[0, 0], (1, 1))
    if mask is not None:
      scores = jnp.where(mask, scores, _UNSEEN)
    before = most[...]
    now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
    # What a query added before it saw a key is forgotten with the first one.
    decay, shares = jnp.exp(before - now), jnp.exp(scores - now)
    most[...] = now
    total[...] = total[...] * decay + jnp.sum(shares, axis=0, keepdims=True)
    sums[...] = sums[...] * decay + _dot(
      values, shares.astype(values.dtype), (0, 0)
    )

  refs = k, v, chunk_k, chunk_v, seen_from, ends, starts
  _meet(span, near, window, refs, add)

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    out[0, 0] = jnp.transpose(sums[...] / total[...]).astype(out.dtype)
    log[0, 0] = most[...] + jnp.log(total[...])


def _weights(keys, values, mask, q, dout, log, dot, scale):
  """Shares and gradients of scores, (keys, queries) of a tile."""
  scores = scale * _dot(keys, q, (1, 1))
  shares = jnp.exp(scores - log)
  if mask is not None:
    shares = jnp.where(mask, shares, 0.0)
  dshares = _dot(values, dout, (1, 1))
  return shares, scale * shares * (dshares - dot)


def _queries_kernel(
  span, q, k, v, chunk_k, chunk_v, seen_from, ends, starts, log, dot, dout,
  dq, sums, *, near, window, scale,
):  # fmt: skip
  step = pl.program_id(3)

  @pl.when(step == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)

  def add(keys, values, mask):
    _, dscores = _weights(
      keys, values, mask, q[0, 0], dout[0, 0], log[0, 0], dot[0, 0], scale
    )
    sums[...] += _dot(dscores.astype(keys.dtype), keys, (0, 0))

  refs = k, v, chunk_k, chunk_v, seen_from, ends, starts
  _meet(span, near, window, refs, add)

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    dq[0, 0] = sums[...].astype(dq.dtype)


def _keys_kernel(
  span, q, k, v, seen_from, ends, starts, log, dot, dout, dk, dv, k_sums,
  v_sums, *, count, window, scale,
):  # fmt: skip
  """Of tokens where there is a window, else of chunks.

  The grid is (rows, heads, tiles of keys, tiles of queries that may see them).
  """
  tile, step = pl.program_id(2), pl.program_id(3)

  @pl.when(step == 0)
  def _():
    k_sums[...] = jnp.zeros_like(k_sums)
    v_sums[...] = jnp.zeros_like(v_sums)

  def add(mask):
    shares, dscores = _weights(
      k[0, 0], v[0, 0], mask, q[0, 0], dout[0, 0], log[0, 0], dot[0, 0], scale
    )
    dtype = q.dtype
    v_sums[...] += _dot(shares.astype(dtype), dout[0, 0])
    k_sums[...] += _dot(dscores.astype(dtype), q[0, 0])

  if window is not None:

    @pl.when(tile + step < count)
    def _():
      add(_near_mask(tile, tile + step, starts[0], window))

  else:
    own = _span(span, pl.program_id(0), tile, pl.num_programs(2))
    place = own[0] + step
    inside, bare = place < own[3], _is_bare(place, own)

    @pl.when(inside & bare)
    def _():
      add(None)

    @pl.when(inside & ~bare)
    def _():
      add(_far_mask(seen_from[0], ends[0], place, starts[0]))

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    dk[0, 0] = k_sums[...].astype(dk.dtype)
    dv[0, 0] = v_sums[...].astype(dv.dtype)


def _call(kernel, name, config, grid, span, inputs, outputs, scratch):
  """Calls a kernel.

  Args:
    kernel: Its body.
    name: Of it.
    config: A Config.
    grid: Of tiles.
    span: (.,) int32, for the kernel and the places of blocks.
    inputs: Pairs of an array and a place: of a tile by the indices of the grid
      and `span`. Arrays are (B, H, S, D), (B, H, 1, S) or (B, 1, S).
    outputs: The same of shapes.
    scratch: Shapes of float32 memory.
  """

  def spec(x, place):
    block = [1] * len(x.shape)
    axis = len(x.shape) - (2 if len(x.shape) == 4 and x.shape[2] > 1 else 1)
    block[axis] = config.size
    if axis == 2 and len(x.shape) == 4:
      block[3] = x.shape[3]
    return pl.BlockSpec(tuple(block), place)

  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=[spec(*pair) for pair in inputs],
      out_specs=[spec(*pair) for pair in outputs],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[shape for shape, _ in outputs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
    ),
    interpret=config.interpret,
    name=name,
  )(span, *[x for x, _ in inputs])


class _Layout:
  """Where blocks lie: rows and heads, tiles of queries or of keys, steps."""

  def __init__(self, config, window, arrays):
    q, k, _, chunk_k, _, self.ends, self.seen_from, self.starts = arrays
    self.size = config.size
    self.rows, self.heads, length, self.channels = q.shape
    self.group = self.heads // k.shape[1]
    self.tiles = length // self.size
    self.far_tiles = chunk_k.shape[2] // self.size
    self.near = min(-(-window // self.size) + 1, self.tiles)
    bounds = spans.bounds(
      self.seen_from, self.ends, self.starts, self.size, self.size, length
    )
    across = [x.swapaxes(1, 2) for x in bounds]
    of = lambda bounds: spans.spans(*bounds, masked_first=True).reshape(-1)
    self.span, self.span_of_keys = of(bounds), of(across)

  def key_head(self, head):
    return lax.div(head, jnp.int32(self.group))

  def of_queries(self):
    """Places by (row, head, tile of queries, step) and the span."""

    def near(b, h, i, j, span):
      j = jnp.minimum(j, self.near - 1)
      return b, self.key_head(h), jnp.maximum(i - (self.near - 1) + j, 0), 0

    def far_tile(b, i, j, span):
      # Beyond the last one the same block comes again, which costs nothing.
      begin, *_, end = _span(span, b, i, self.tiles)
      j = jnp.maximum(j - self.near, 0)
      return jnp.maximum(jnp.minimum(begin + j, end - 1), 0)

    far = lambda b, h, i, j, span: (
      b, self.key_head(h), far_tile(b, i, j, span), 0,
    )  # fmt: skip
    return {
      "own": lambda b, h, i, j, span: (b, h, i, 0),
      "line": lambda b, h, i, j, span: (b, h, 0, i),
      "starts": lambda b, h, i, j, span: (b, 0, i),
      "near": near,
      "far": far,
      "of chunks": lambda b, h, i, j, span: (b, 0, far_tile(b, i, j, span)),
    }

  def of_keys(self, tokens):
    """Places by (row, head, tile of keys, step) and the span."""

    def query_tile(b, i, j, span):
      if tokens:
        return jnp.minimum(i + j, self.tiles - 1)
      begin, *_, end = _span(span, b, i, self.far_tiles)
      return jnp.maximum(jnp.minimum(begin + j, end - 1), 0)

    return {
      "own": lambda b, h, i, j, span: (b, self.key_head(h), i, 0),
      "found": lambda b, h, i, j, span: (b, h, i, 0),
      # Tokens need no line of chunks: any block of it stands in its place.
      "of chunks": lambda b, h, i, j, span: (b, 0, 0 if tokens else i),
      "queries": lambda b, h, i, j, span: (b, h, query_tile(b, i, j, span), 0),
      "line": lambda b, h, i, j, span: (b, h, 0, query_tile(b, i, j, span)),
      "starts": lambda b, h, i, j, span: (b, 0, query_tile(b, i, j, span)),
    }

  def inputs(self, at, arrays):
    """What both walks along queries read first, and where, by `of_queries`."""
    names = ["own", "near", "near", "far", "far"]
    found = [(x, at[name]) for x, name in zip(arrays, names)]
    seen_from, ends, starts = self.lines("seen_from", "ends", "starts")
    of = at["of chunks"]
    return [*found, (seen_from, of), (ends, of), (starts, at["starts"])]

  def lines(self, *names):
    """Arrays (B, 1, .) of int32 by name."""
    return [getattr(self, name)[:, None] for name in names]


def _run(window, scale, config, arrays):
  q = arrays[0]
  layout = _Layout(config, window, arrays)
  at = layout.of_queries()
  shape = (layout.rows, layout.heads, 1, q.shape[2])
  return _call(
    functools.partial(
      _forward_kernel, near=layout.near, window=window, scale=scale
    ),
    "chunked_attention_fwd",
    config,
    (*q.shape[:2], layout.tiles, layout.near + layout.far_tiles),
    layout.span,
    layout.inputs(at, arrays),
    [
      (jax.ShapeDtypeStruct(q.shape, q.dtype), at["own"]),
      (jax.ShapeDtypeStruct(shape, jnp.float32), at["line"]),
    ],
    [(layout.channels, layout.size), (1, layout.size), (1, layout.size)],
  )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(window, scale, config, *arrays):
  """The op on whole tiles; arrays (B, H, S, D), (B, M) and (B, S)."""
  return _run(window, scale, config, arrays)[0]


def _push(window, scale, config, *arrays):
  out, log = _run(window, scale, config, arrays)
  return out, (arrays, out, log)


def _pull(window, scale, config, kept, dout):
  arrays, out, log = kept
  q, k, v, chunk_k, chunk_v = arrays[:5]
  layout = _Layout(config, window, arrays)
  wide = lambda x: x.astype(jnp.float32)
  dot = jnp.einsum("bhsd,bhsd->bhs", wide(out), wide(dout))[:, :, None]
  seen_from, ends, starts = layout.lines("seen_from", "ends", "starts")
  at = layout.of_queries()
  square, line = (layout.size, layout.channels), (log, dot)
  dq = _call(
    functools.partial(
      _queries_kernel, near=layout.near, window=window, scale=scale
    ),
    "chunked_attention_bwd_queries",
    config,
    (*q.shape[:2], layout.tiles, layout.near + layout.far_tiles),
    layout.span,
    [
      *layout.inputs(at, arrays), *[(x, at["line"]) for x in line],
      (dout, at["own"]),
    ],
    [(jax.ShapeDtypeStruct(q.shape, q.dtype), at["own"])],
    [square],
  )[0]  # fmt: skip

  def of_keys(keys, values, tokens):
    at = layout.of_keys(tokens)
    tiles = layout.tiles if tokens else layout.far_tiles
    # Heads that share a key are summed in float32.
    dtype = keys.dtype if layout.group == 1 else jnp.float32
    shape = (*q.shape[:2], *keys.shape[2:])
    found = _call(
      functools.partial(
        _keys_kernel,
        count=layout.tiles,
        window=window if tokens else None,
        scale=scale,
      ),
      f"chunked_attention_bwd_{'tokens' if tokens else 'chunks'}",
      config,
      (*q.shape[:2], tiles, layout.near if tokens else layout.tiles),
      layout.span_of_keys,
      [
        (q, at["queries"]), (keys, at["own"]), (values, at["own"]),
        (seen_from, at["of chunks"]), (ends, at["of chunks"]),
        (starts, at["starts"]), *[(x, at["line"]) for x in line],
        (dout, at["queries"]),
      ],
      [(jax.ShapeDtypeStruct(shape, dtype), at["found"])] * 2,
      [square, square],
    )  # fmt: skip
    if layout.group == 1:
      return found
    cut = lambda x: x.reshape(*keys.shape[:2], -1, *x.shape[2:]).sum(axis=2)
    return [cut(x).astype(keys.dtype) for x in found]

  dk, dv = of_keys(k, v, True)
  dchunk_k, dchunk_v = of_keys(chunk_k, chunk_v, False)
  return dq, dk, dv, dchunk_k, dchunk_v, None, None, None


_attend.defvjp(_push, _pull)
