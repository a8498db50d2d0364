"""The body of `mosaic_gpu_whole`: what a thread block does in each phase."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops.hopper import PROCESSORS
from ops.hopper_phases import Phases
from ops.hopper_tiles import ROWS, SUMS, TILE, load, repeat, store
from ops.mamba2_step import mosaic_gpu_ring as ring
from ops.mamba2_step import mosaic_gpu_state as states
from ops.mamba2_step.mosaic_gpu_product import PARTIALS, sum_of_rows
from ops.mamba2_step.mosaic_gpu_ring import CHUNK
from ops.selective_scan.mosaic_gpu_tile import sigmoid, softplus

PHASES = ("in", "state", "out")
# Channels of a head that a warpgroup steps at a time.
HALF = states.HEAD // 2
# As `mosaic_gpu_state.STATE`, for half a head.
STATE = plgpu.Layout.TILED(
  plgpu.Tiling(((HALF, 32), (8, 32), (4, 32), (4,))), (-7,), (-3, -2), -1
)
# A vector over these channels, whole in each warp.
CHANNELS = plgpu.Layout.TILED(
  plgpu.Tiling(((HALF,), (1,))), (plgpu.Replicated(4),), (-2,), -1
)
# A tile's columns of one row, whole in each warp.
LINE = plgpu.Layout.TILED(
  plgpu.Tiling(((TILE,), (2,))), (plgpu.Replicated(4),), (-2,), -1
)
# Added and subtracted, it leaves the nearest whole number, the even one of two.
_WHOLE = 1.5 * 2.0**23
_LARGEST = 127.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    blocks: Thread blocks, which must all run at once.
    warpgroups: Of a block.
    teams: Of a block; the warpgroups of one share the chunks of a unit alike.
    segment: Chunks that a warpgroup asks for at once; it divides its share.
    stages: Segments of a warpgroup in shared memory.
    splits: Units that share the rows of a tile of `out_proj`.
    joined: As of `mosaic_gpu_ring.Ring`.
    lean: Whether the only row of a batch of one is handled, and not eight; and
      blocks say that a phase is done before they write what no other one reads.
  """

  blocks: int = PROCESSORS
  warpgroups: int = 4
  teams: int = 1
  segment: int = 1
  stages: int = 4
  splits: int = 1
  joined: bool = False
  lean: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a model, and of what blocks hand to each other.

  Attributes:
    batch: B.
    width: D.
    inner: E.
    heads: H.
    groups: G, of B and C and of the gated norm.
    state: N.
    taps: K-1, tokens that the convolution's state holds.
  """

  batch: int
  width: int
  inner: int
  heads: int
  groups: int
  state: int
  taps: int

  @property
  def channels(self) -> int:
    """Of the convolution."""
    return self.inner + 2 * self.groups * self.state

  @property
  def features(self) -> int:
    """Columns of `in_proj`."""
    return self.inner + self.channels + self.heads

  @property
  def handed(self) -> list[jax.ShapeDtypeStruct]:
    """What in gives (z, the convolution's result, dt); g, and its squares."""
    rows = ring.ROWS
    shapes = [
      (rows, -(-self.features // TILE) * TILE),
      (rows, self.inner),
      (rows, -(-2 * self.heads // PARTIALS) * PARTIALS),
    ]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refs:
  """What the kernel reads and writes in memory.

  Attributes:
    norm: (L, D), as the next six of `Mamba2Weights`.
    taps: (L, K, C), of the convolution.
    bias: (L, C).
    dt_bias: (L, H).
    A_log: (L, H).
    D: (L, H).
    gated_norm: (L, E).
    products: Weights and scales of both, as `mosaic_gpu_ring.operands` gives.
    parts: Of the stream, (2, splits, ROWS, D), in front of even and odd layers.
    conv: (L, B, K-1, C).
    states: (L, B, H, P, N), and (L, B, H, P, 1), its scales if it is in int8.
    projected: Of `in`, (ROWS, F filled up), as the next two of `Sizes.handed`.
    gated: (ROWS, E).
    squares: (ROWS, 2 H filled up).
  """

  norm: Any
  taps: Any
  bias: Any
  dt_bias: Any
  A_log: Any
  D: Any
  gated_norm: Any
  products: tuple[tuple[Any, Any], ...]
  parts: Any
  conv: Any
  states: tuple[Any, ...]
  projected: Any
  gated: Any
  squares: Any

  @classmethod
  def of(cls, refs) -> Self:
    """From the references in the order of the fields."""
    names = [field.name for field in dataclasses.fields(cls)]
    vectors, (a, b, c, d, parts, conv), rest = refs[:7], refs[7:13], refs[13:]
    *states, projected, gated, squares = rest
    return cls(
      **dict(zip(names, vectors)),
      products=((a, b), (c, d)),
      parts=parts,
      conv=conv,
      states=tuple(states),
      projected=projected,
      gated=gated,
      squares=squares,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """The kernel, of which a phase takes:

    layer, done: the layer, and how many went before in this kernel;
    stream, counters: the weights, and what blocks wait for;
    refs, s: references to memory, and shared memory by name.

  Attributes:
    config: A Config.
    sizes: Sizes.
    phases: That it runs.
    eps: Of both norms.
    packed: Whether weights come as bytes of two levels.
    groups: Scales of a column of both products.
    interpret: Whether it is interpreted.
  """

  config: Config
  sizes: Sizes
  phases: tuple[str, ...]
  eps: float
  packed: bool
  groups: tuple[int, int]
  interpret: bool

  @functools.cached_property
  def ring(self) -> ring.Ring:
    """Of the weights."""
    sizes, config = self.sizes, self.config
    parts = (
      ring.Part(
        depth=sizes.width,
        width=sizes.features,
        groups=self.groups[0],
        runs="in" in self.phases,
      ),
      ring.Part(
        depth=sizes.inner,
        width=sizes.width,
        groups=self.groups[1],
        splits=config.splits,
        neighbours=True,
        runs="out" in self.phases,
      ),
    )
    return ring.Ring(
      parts=parts,
      packed=self.packed,
      blocks=config.blocks,
      warpgroups=config.warpgroups,
      teams=config.teams,
      segment=config.segment,
      stages=config.stages,
      joined=config.joined,
      interpret=self.interpret,
    )

  @property
  def items(self) -> int:
    """Halves of heads, of all rows."""
    return 2 * self.sizes.heads * self.sizes.batch

  def scratch(self) -> dict:
    """Shared memory and barriers."""
    warpgroups, rows = self.config.warpgroups, ring.ROWS
    teams = self.config.teams
    chunks = max(part.chunks for part in self.ring.parts)
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    x = plgpu.SMEM((chunks, rows, CHUNK), jnp.bfloat16, transforms=transforms)
    sums = (rows, TILE + 4)
    if self.config.lean:
      sums = (TILE,)
      if not self.interpret:
        # The same, as it lies there: no first row of eight is swizzled.
        tiles = plgpu.SMEM((chunks, CHUNK // 64, rows, 64), jnp.bfloat16)
        x = plgpu.RefUnion(x, tiles)
    return {
      **self.ring.scratch(),
      # The rows of the batch, whole, in the order of their products.
      "x": x,
      "x_written": plgpu.Barrier(num_arrivals=warpgroups),
      # Two, so that one is read while others write the next. Four more columns
      # than needed let the threads of a warp store to all banks.
      "sums": plgpu.SMEM((2, warpgroups, *sums), jnp.float32),
      "squares": plgpu.SMEM(
        (warpgroups, CHUNK if self.config.lean else rows), jnp.float32
      ),
      "y": plgpu.SMEM((2, warpgroups, HALF), jnp.float32),
      "conv": plgpu.SMEM((teams, rows, self.sizes.taps, TILE), jnp.bfloat16),
      "conv_loaded": plgpu.Barrier(num_barriers=teams),
      "done": plgpu.Barrier(
        num_arrivals=warpgroups // teams, num_barriers=teams
      ),
    }

  def kernel(self, span_ref, *refs, **s):
    """The body; references as `mosaic_gpu_whole` gives them."""
    refs = Refs.of(refs)
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    first, end = span_ref[0], span_ref[1]
    stream = ring.Stream(self.ring, refs.products, (first, end), block, me, s)
    parts, config = self.ring.parts, self.config
    each = {
      "in": min(parts[0].units, config.blocks * config.teams),
      "state": min(self.items, config.blocks * config.warpgroups),
      "out": parts[1].units,
    }
    counters = Phases(each, whole=self.phases == PHASES)
    stream.begin()

    @pl.loop(first, end)
    def _(layer):
      done = layer - first
      if "in" in self.phases:
        self._in(layer, done, stream, counters, refs, s)
      if "state" in self.phases:
        self._state(layer, done, stream, counters, refs, s)
      if "out" in self.phases:
        self._out(layer, done, stream, counters, refs, s)

    # The last states of the convolution are on their way to memory.
    plgpu.wait_smem_to_gmem(0)

    @pl.when((block == 0) & (me == 0))
    def _():
      counters.clear(end - first)

  def _rows(self, ref, chunk) -> jax.Array:
    """A chunk of the batch, (ROWS, CHUNK), from (ROWS, .) in memory.

    If only one row is handled, (CHUNK,).
    """
    own = pl.ds(chunk * CHUNK, CHUNK)
    if self.config.lean:
      return self._each_row(ref.at[0, own])
    if self.sizes.batch == 1:
      # All rows alike: those that no batch has are not looked at.
      return self._each_row(ref.at[0, own])
    return load(ref.at[:, own], self._layout)

  def _each_row(self, ref) -> jax.Array:
    """Numbers of a chunk, the same in all rows, as of `_rows`."""
    if self.config.lean:
      return load(ref, ring.row_layout(self.packed))
    value = load(ref, self._layout.reduce(0))
    return repeat(value, 1, (ring.ROWS, CHUNK), self._layout)

  @property
  def _layout(self):
    return ring.batch_layouts(self.packed)[0]

  def _share(self, chunks, me):
    """Of so many chunks of the batch those that a warpgroup writes.

    Each with whether it is the warpgroup's own, and not written by two.
    """
    count = -(-chunks // self.config.warpgroups)
    ids = [me + j * self.config.warpgroups for j in range(count)]
    return [(jnp.minimum(c, chunks - 1), c < chunks) for c in ids]

  def _write(self, s, chunk, value):
    """Gives a chunk of the batch to the block's products."""
    if not self.config.lean:
      ring.store_batch(s["x"].at[chunk], value, self.packed, self.interpret)
    elif self.interpret:
      store(s["x"].at[chunk, 0], value.astype(jnp.bfloat16))
    else:
      ring.store_row(s["x"][1].at[chunk, :, 0], value, self.packed)

  def _multiplied(self, s):
    """The batch as products take it."""
    return s["x"] if self.interpret or not self.config.lean else s["x"][0]

  @property
  def _line(self):
    """The layout of a tile's columns as `finish` takes them."""
    return LINE if self.config.lean else ROWS.reduce(0)

  @property
  def _squares_layout(self):
    """The layout of the squares of the only row."""
    return _whole_in_each_warp(self.sizes.handed[2].shape[1])

  def _over_rows(self, vector):
    """A vector over a tile's columns, for all rows of the batch."""
    if self.config.lean:
      return vector
    return repeat(vector, 1, (ring.ROWS, TILE), ROWS)

  def _some_rows(self, ref):
    """Of (ROWS, .) all rows, or the one that is handled."""
    return ref.at[0] if self.config.lean else ref

  def _tile(self, ref):
    """A tile's columns of the rows that are handled, from (ROWS, TILE)."""
    return load(self._some_rows(ref), LINE if self.config.lean else ROWS)

  def _written(self, s):
    """Waits until all chunks of the batch are there."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(s["x_written"])
    plgpu.barrier_wait(s["x_written"])

  def _unit(self, index, layer, k, stream, refs, s, finish) -> None:
    """Multiplies a unit, and finishes it in the first warpgroup of the team.

    Args:
      index: Of the product.
      layer: In which it is.
      k: Which of this team's units it is.
      stream: Of the weights.
      refs: Of the kernel.
      s: Shared memory by name.
      finish: Called with the product, (ROWS, TILE) float32 in the layout ROWS;
        if only one row is handled, (TILE,) in LINE.
    """
    column = stream.unit(index, k)[0]
    of_columns = None
    if self.groups[index] == 1:
      own = refs.products[index][1].at[layer, pl.ds(column, TILE)]
      of_columns = load(own, self._line)
    total = stream.multiply(index, layer, k, self._multiplied(s))
    sums = s["sums"].at[lax.rem(k, jnp.int32(2))]
    if not self.config.lean:
      own = sums.at[stream.me, :, pl.ds(0, TILE)]
      store(own.T, plgpu.layout_cast(total, SUMS))
    elif self.interpret:
      store(sums.at[stream.me], total[:, 0])
    else:
      ring.store_first(sums.at[stream.me], total)
    done = s["done"].at[stream.team]
    plgpu.barrier_arrive(done)
    if self.config.joined:
      stream.refill(index, layer, k)
    plgpu.barrier_wait(done)

    @pl.when(stream.member == 0)
    def _():
      some = (
        (slice(None),) if self.config.lean else (slice(None), pl.ds(0, TILE))
      )
      layout = LINE if self.config.lean else ROWS
      values = [
        load(sums.at[(stream.me + g, *some)], layout)
        for g in range(self.ring.members)
      ]
      value = sum(values[1:], values[0])
      if of_columns is not None:
        value *= self._over_rows(of_columns)
      finish(value)

  def _in(self, layer, done, stream, counters, refs, s):
    """in_proj, and the step of the convolution."""
    sizes, rows = self.sizes, ring.ROWS
    inner, channels, taps = sizes.inner, sizes.channels, sizes.taps
    conv_s = s["conv"].at[stream.team]
    conv_loaded = s["conv_loaded"].at[stream.team]

    def write_batch():
      share = self._share(sizes.width // CHUNK, stream.me)
      norms = [
        self._each_row(refs.norm.at[layer, pl.ds(c * CHUNK, CHUNK)])
        for c, _ in share
      ]
      counters.wait("out", done)
      before = refs.parts.at[lax.rem(layer, jnp.int32(2))]
      values = []
      for c, _ in share:
        each = [self._rows(before.at[k], c) for k in range(self.config.splits)]
        values.append(sum(each[1:], each[0]))
      squares = [
        jnp.where(mine, value * value, 0.0)
        for value, (_, mine) in zip(values, share)
      ]
      squares = sum(squares[1:], squares[0])
      if self.config.lean:
        # Sums over threads of several warps would share memory with those of
        # other warpgroups.
        store(s["squares"].at[stream.me], squares)
      else:
        store(s["squares"].at[stream.me], jnp.sum(squares, axis=1))
      for (c, _), value, norm in zip(share, values, norms):
        self._write(s, c, value * norm)
      self._written(s)

    @pl.loop(0, stream.most[0])
    def _(k):
      column = stream.unit(0, k)[0]
      channel = column - inner
      has = k < stream.units[0]
      convolves = has & (channel >= 0) & (channel < channels)
      # Rows past the end of the batch are read as zeros, and not written.
      some_rows = pl.ds(k * 0, rows)
      own = refs.conv.at[layer, some_rows, :, pl.ds(channel, TILE)]

      @pl.when(convolves & (stream.member == 0))
      def _():
        # The state of the unit before is on its way to memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(own, conv_s, conv_loaded)

      # Those of other columns are not used.
      here = pl.ds(jnp.clip(channel, 0, channels - TILE), TILE)
      vectors = [refs.bias.at[layer, here]]
      vectors += [refs.taps.at[layer, i, here] for i in range(taps + 1)]
      bias, *weight = [load(vector, self._line) for vector in vectors]
      pl.when(k == 0)(write_batch)

      def finish(value):
        value *= self._factor(s)
        target = self._some_rows(refs.projected.at[:, pl.ds(column, TILE)])
        # The states of the convolution of the rows that are handled.
        kept = conv_s.at[0] if self.config.lean else conv_s
        tap = lambda i: kept.at[i] if self.config.lean else kept.at[:, i]
        layout = LINE if self.config.lean else ROWS

        def said():
          if self.config.lean:
            pl.when(k == stream.units[0] - 1)(lambda: counters.signal("in"))

        @pl.when(convolves)
        def _():
          plgpu.barrier_wait(conv_loaded)
          inputs = [
            plgpu.load(tap(i), layout=layout, optimized=False)
            for i in range(taps)
          ]
          inputs.append(value.astype(jnp.bfloat16))
          mixed = self._over_rows(bias)
          for factor, one in zip(weight, inputs):
            mixed += self._over_rows(factor) * one.astype(jnp.float32)
          store(target, mixed * sigmoid(mixed))
          said()
          for i in range(taps):
            store(tap(i), inputs[i + 1])
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(conv_s, own)

        @pl.when(jnp.logical_not(convolves))
        def _():
          store(target, value)
          said()

      @pl.when(has)
      def _():
        self._unit(0, layer, k, stream, refs, s, finish)

    if not self.config.lean:

      @pl.when((stream.member == 0) & (stream.units[0] > 0))
      def _():
        counters.signal("in")

  def _factor(self, s):
    """What the first norm multiplies the rows that are handled by."""
    warpgroups = range(self.config.warpgroups)
    if self.config.lean:
      layout = _whole_in_each_warp(CHUNK)
      total = [load(s["squares"].at[g], layout) for g in warpgroups]
      total = [jnp.sum(sum(total[1:], total[0]))]
    else:
      total = [load(s["squares"].at[g], ROWS.reduce(1)) for g in warpgroups]
    total = sum(total[1:], total[0])
    factor = lax.rsqrt(total / self.sizes.width + self.eps)
    if self.config.lean:
      return factor
    return repeat(factor, 0, (ring.ROWS, TILE), ROWS)

  def _state(self, layer, done, stream, counters, refs, s):
    """The step of the state, and the gate."""
    sizes, workers = self.sizes, self.config.blocks * self.config.warpgroups
    n, inner, halves = sizes.state, sizes.inner, 2 * sizes.heads
    shape = HALF, n
    few_bits = len(refs.states) > 1
    first = stream.me * self.config.blocks + stream.block
    count = lax.div(self.items - first + workers - 1, workers)
    row_layout, column_layout = STATE.reduce(1), STATE.reduce(0)
    spread = lambda vector, axis: repeat(vector, axis, shape, STATE)

    @pl.loop(0, count)
    def _(k):
      item = first + k * workers
      row, half = (
        lax.div(item, jnp.int32(halves)),
        lax.rem(item, jnp.int32(halves)),
      )
      head = lax.div(half, jnp.int32(2))
      within = pl.ds(lax.rem(half, jnp.int32(2)) * HALF, HALF)
      own = pl.ds(half * HALF, HALF)
      own_refs = [ref.at[layer, row, head, within] for ref in refs.states]
      state = load(own_refs[0], STATE)
      if few_bits:
        steps = load(own_refs[1].at[:, 0], row_layout)
      scale = load(refs.gated_norm.at[layer, own], CHANNELS)
      of_head = lambda ref: ref[layer, head].astype(jnp.float32)
      bias, rate, skip = map(of_head, (refs.dt_bias, refs.A_log, refs.D))
      pl.when(k == 0)(lambda: counters.wait("in", done + 1))

      projected = refs.projected.at[row]
      group = lax.div(head, jnp.int32(sizes.heads // sizes.groups))
      first_B = 2 * inner + group * n
      x = load(projected.at[pl.ds(inner + half * HALF, HALF)], row_layout)
      B = load(projected.at[pl.ds(first_B, n)], column_layout)
      C = load(
        projected.at[pl.ds(first_B + sizes.groups * n, n)], column_layout
      )
      z = load(projected.at[own], CHANNELS)
      dt = softplus(projected[inner + sizes.channels + head] + bias)
      decay = jnp.exp(-dt * jnp.exp(rate))
      kept = spread(steps * decay, 0) if few_bits else decay
      state = kept * state + spread(dt * x, 0) * spread(B, 1)
      y = jnp.sum(state * spread(C, 1), axis=1)

      def keep(state=state):
        if few_bits:
          state, steps = _nearest(state, own_refs[1].dtype)
          store(own_refs[1].at[:, 0], steps)
        store(own_refs[0], state)

      if not self.config.lean:
        keep()
      y_ref = s["y"].at[lax.rem(k, jnp.int32(2)), stream.me]
      store(y_ref, y + skip * x)
      gated = load(y_ref, CHANNELS) * z * sigmoid(z)
      store(refs.gated.at[row, own], gated * scale)
      store(refs.squares.at[row, half], jnp.sum(gated * gated))
      if self.config.lean:
        pl.when(k == count - 1)(lambda: counters.signal("state"))
        keep()

    if not self.config.lean:
      pl.when(count > 0)(lambda: counters.signal("state"))

  def _out(self, layer, done, stream, counters, refs, s):
    """out_proj, onto the residual stream."""
    sizes = self.sizes
    part = self.ring.parts[1]
    now = lax.rem(layer, jnp.int32(2))
    of_group = sizes.inner // sizes.groups
    halves = 2 * sizes.heads // sizes.groups

    @pl.loop(0, stream.most[1])
    def _(k):
      # Teams of a block have the same share of the rows.
      split = stream.unit(1, k, team=0)[1]
      column = stream.unit(1, k)[0]
      has = k < stream.units[1]
      own = pl.ds(jnp.where(has, column, 0), TILE)

      @pl.when(k == 0)
      def _():
        counters.wait("state", done + 1)

      @pl.when(k > 0)
      def _():
        # Others may still multiply by the chunks before.
        self._written(s)

      # A factor of all rows of the weights may follow the product.
      after = self.config.lean and sizes.groups == 1
      factors, squares = [], None
      if after:
        squares = load(refs.squares.at[0], self._squares_layout)
      elif self.config.lean:
        squares = load(refs.squares.at[0], self._squares_layout)
        ids = plgpu.broadcasted_iota(
          jnp.int32, squares.shape, 0, layout=self._squares_layout
        )
        for g in range(sizes.groups):
          mine = (ids >= g * halves) & (ids < (g + 1) * halves)
          total = jnp.sum(jnp.where(mine, squares, 0.0))
          factors.append(lax.rsqrt(total / of_group + self.eps))
      else:
        for g in range(sizes.groups):
          total = sum_of_rows(
            refs.squares, g * halves, (g + 1) * halves, self._layout
          )
          factors.append(lax.rsqrt(total / of_group + self.eps))
      share = [c for c, _ in self._share(part.chunks, stream.me)]
      values = [self._rows(refs.gated, split * part.chunks + c) for c in share]
      residual = [
        self._tile(refs.parts.at[now, i, :, own])
        for i in range(self.config.splits)
      ]
      residual = sum(residual[1:], residual[0])
      residual *= (split == 0).astype(jnp.float32)
      for c, value in zip(share, values):
        if not after:
          first = (split * part.chunks + c) * CHUNK
          factor, group = factors[0], lax.div(first, jnp.int32(of_group))
          for g in range(1, sizes.groups):
            factor = jnp.where(group == g, factors[g], factor)
          if not self.config.lean:
            factor = repeat(factor, 0, value.shape, self._layout)
          value *= factor
        self._write(s, c, value)
      self._written(s)

      def finish(value):
        if after:
          ids = plgpu.broadcasted_iota(
            jnp.int32, squares.shape, 0, layout=self._squares_layout
          )
          total = jnp.sum(jnp.where(ids < halves, squares, 0.0))
          value *= lax.rsqrt(total / of_group + self.eps)
        target = refs.parts.at[1 - now, split, :, own]
        store(self._some_rows(target), residual + value)
        counters.signal("out")

      @pl.when(has)
      def _():
        self._unit(1, layer, k, stream, refs, s, finish)


def _whole_in_each_warp(size):
  """The layout of a vector that each warp holds whole."""
  return plgpu.Layout.TILED(
    plgpu.Tiling(((size,), (64,), (2,))), (plgpu.Replicated(4),), (-2,), -1
  )


def _nearest(state, scale_dtype):
  """Levels and scales of a state in int8, as `ops.quantize` finds them."""
  largest = jnp.max(jnp.abs(state), axis=1)
  steps = (largest * (1 / _LARGEST)).astype(scale_dtype)
  wide = steps.astype(jnp.float32)
  inverse = jnp.where(wide > 0, 1 / jnp.where(wide > 0, wide, 1.0), 0.0)
  levels = state * repeat(inverse, 0, state.shape, STATE)
  levels = (levels + _WHOLE) - _WHOLE
  levels = jnp.clip(levels, -_LARGEST, _LARGEST)
  return levels.astype(jnp.int8), steps
