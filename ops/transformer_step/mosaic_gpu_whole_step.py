"""The body of `mosaic_gpu_whole`: what a thread block does in each phase."""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper_tiles
from ops.hopper import PROCESSORS
from ops.hopper_attention import QUERIES
from ops.hopper_phases import Phases
from ops.hopper_tiles import ROWS, SUMS, TILE, load, repeat, store
from ops.selective_scan.mosaic_gpu_tile import sigmoid
from ops.transformer_step.mosaic_gpu_qkv import _HALF
from ops.transformer_step.mosaic_gpu_whole_ring import Attention, Part, Stream

PHASES = ("qkv", "attend", "o", "gate_up", "down")
# The phase that each one waits for.
BEFORE = dict(zip(PHASES, ("down", *PHASES)))
# Tiles of a vector that a warpgroup prepares at a time, one in a warp.
BLOCK = 4
# A vector of a tile, whole in each warp.
VECTOR = ROWS.reduce(0)
# Finite, so that blocks without a slot are merged as nothing.
_UNSEEN = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    blocks: Thread blocks, which must all run at once.
    warpgroups: Of a block, which share the rows of its unit of a product.
    stages: Tiles of 64 x 64 of a warpgroup in shared memory.
    qkv_per: Tiles of columns of a unit.
    qkv_splits: Units that share the rows of their tiles.
    attend_splits: Units that share the slots of a key/value head.
    o_per: As of qkv, as the rest.
    o_splits:
    gate_up_per:
    down_per:
    down_splits:
    each_waits: Whether every warpgroup waits for other blocks, and not the
      first one alone. On an H200 with three warpgroups it took .786 instead of
      .821 ms at 1B, and as long at 135M; with two it was not timed.
  """

  blocks: int = PROCESSORS
  warpgroups: int = 3
  stages: int = 4
  qkv_per: int = 1
  qkv_splits: int = 1
  attend_splits: int = 1
  o_per: int = 1
  o_splits: int = 1
  gate_up_per: int = 1
  down_per: int = 1
  down_splits: int = 1
  each_waits: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a model.

  Attributes:
    width: D.
    hidden: F.
    heads: H.
    kv_heads: N.
    size: K.
    slots: S.
  """

  width: int
  hidden: int
  heads: int
  kv_heads: int
  size: int
  slots: int

  @property
  def parts(self) -> int:
    """Of 64 of a head's numbers."""
    return self.size // TILE

  @property
  def shared(self) -> int:
    """Queries of a key/value head."""
    return self.heads // self.kv_heads

  def handed(self, config: Config) -> list[jax.ShapeDtypeStruct]:
    """What blocks hand to each other, in the order of `Refs`."""
    rows = lambda size: size // TILE + BLOCK
    heads = self.heads + 2 * self.kv_heads + QUERIES
    inner = rows(self.heads * self.size)
    shapes = [
      (config.qkv_splits, heads, self.size),
      (config.qkv_splits, TILE),
      (config.attend_splits, inner, TILE),
      (2, config.attend_splits, inner),
      (config.o_splits, rows(self.width), TILE),
      (rows(self.hidden), TILE),
    ]
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@dataclasses.dataclass(frozen=True)
class Refs:
  """What the kernel reads and writes in memory; vectors lie as tiles, (., 64).

  Attributes:
    turns: Cosines and sines, (2, K / 2).
    norms: Those of attention and of the MLP, (2, L, D / 64 and more, 64).
    q_proj: (L, D, H K), as the next six in their shapes.
    k_proj:
    v_proj:
    o_proj:
    gate_proj:
    up_proj:
    down_proj:
    keys: (L, 1, S, N, K).
    values: Alike.
    stream: The stream in front of a layer, in parts, (splits of down, tiles,
      64).
    qkv: Products, in parts, without the norm's factor: (splits, heads, K).
    squares: Parts of the sum of squares, (splits of qkv, 64).
    mixed: What blocks found of attention, (splits, tiles, 64).
    weights: Maxima and sums of each of these tiles, (2, splits, tiles).
    middle: The stream in front of the MLP, in parts.
    hidden: What down_proj takes, (tiles, 64).
  """

  turns: Any
  norms: Any
  q_proj: Any
  k_proj: Any
  v_proj: Any
  o_proj: Any
  gate_proj: Any
  up_proj: Any
  down_proj: Any
  keys: Any
  values: Any
  stream: Any
  qkv: Any
  squares: Any
  mixed: Any
  weights: Any
  middle: Any
  hidden: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """The kernel, whose phases take the layer, and how many went before it.

  Attributes:
    config: A Config.
    sizes: Sizes.
    phases: That it runs.
    eps: Of both norms.
    interpret: Whether it is interpreted.
  """

  config: Config
  sizes: Sizes
  phases: tuple[str, ...]
  eps: float
  interpret: bool

  def __post_init__(self):
    """Checks what would else be left out, or waited for forever."""
    for name, part in self.parts.items():
      if not 0 < part.units <= self.config.blocks:
        raise ValueError(
          f"transformer_step: {name} has {part.units} units, but there are"
          f" {self.config.blocks} blocks"
        )

  @functools.cached_property
  def parts(self) -> dict[str, Part | Attention]:
    """By phase how it is cut up."""
    sizes, c = self.sizes, self.config
    inner = sizes.heads * sizes.size
    runs = {name: name in self.phases for name in PHASES}
    return {
      "qkv": Part(
        depth=sizes.width, width=inner + 2 * sizes.kv_heads * sizes.size,
        per=c.qkv_per, splits=c.qkv_splits, runs=runs["qkv"],
      ),
      "attend": Attention(
        heads=sizes.kv_heads, splits=c.attend_splits, parts=sizes.parts,
        runs=runs["attend"],
      ),
      "o": Part(
        depth=inner, width=sizes.width, per=c.o_per, splits=c.o_splits,
        runs=runs["o"],
      ),
      "gate_up": Part(
        depth=sizes.width, width=sizes.hidden, per=c.gate_up_per, splits=1,
        matrices=2, backwards=True, runs=runs["gate_up"],
      ),
      "down": Part(
        depth=sizes.hidden, width=sizes.width, per=c.down_per,
        splits=c.down_splits, runs=runs["down"],
      ),
    }  # fmt: skip

  def scratch(self) -> dict:
    """Shared memory and barriers."""
    w, parts = self.config.warpgroups, self.sizes.parts
    chunks = max(
      part.chunks for part in self.parts.values() if isinstance(part, Part)
    )
    chunks = -(-chunks // BLOCK) * BLOCK
    tiles = lambda *shape: hopper_tiles.swizzled(
      (*shape, TILE), jnp.bfloat16, 16
    )
    attention = [
      tiles(w, parts, QUERIES),
      tiles(w, QUERIES),
      plgpu.SMEM((w, self.sizes.size), jnp.float32),
      # Four more than needed let the threads of a warp store to all banks.
      plgpu.SMEM((w, QUERIES, TILE + 4), jnp.float32),
      plgpu.SMEM((w, parts, QUERIES, TILE + 4), jnp.float32),
      plgpu.SMEM((w, 2, QUERIES), jnp.float32),
    ]
    x = [tiles(chunks, QUERIES)]
    if self.interpret:
      memory = [*x, *attention]
    else:
      # The first row of a tile lies as one would write it. No phase needs both
      # a product's vector and what attention does.
      plain = plgpu.SMEM((chunks, QUERIES * TILE), jnp.bfloat16)
      memory = plgpu.RefUnion(x, [plain], attention)
    every = lambda: plgpu.Barrier(num_arrivals=w)
    return {
      **Stream.scratch(w, self.config.stages),
      "memory": memory,
      # Two, so that one is read while others write the next.
      "sums": plgpu.SMEM((2, w, 2, TILE), jnp.float32),
      "squares": plgpu.SMEM((TILE,), jnp.float32),
      "ready": every(),
      "written": every(),
      "done": every(),
    }

  def kernel(self, span_ref, lengths_ref, *refs, **s):
    """The body; references as `mosaic_gpu_whole` gives them."""
    refs = Refs(*refs)
    memory = s.pop("memory")
    if self.interpret:
      x, plain, attention = memory[0], None, memory[1:]
    else:
      (x,), (plain,), attention = memory
    names = "q", "shares", "key", "scores", "mixed", "weights"
    s |= {"x": x, "plain": plain} | dict(zip(names, attention))
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    first, end, length = span_ref[0], span_ref[1], lengths_ref[0]
    sizes = self.sizes
    inner, own = sizes.heads * sizes.parts, sizes.kv_heads * sizes.parts
    everything = 1 << 20
    matrices = {
      "qkv": [
        (refs.q_proj, 0, inner),
        (refs.k_proj, inner, own),
        (refs.v_proj, inner + own, own),
      ],
      "attend": (refs.keys, refs.values),
      "o": [(refs.o_proj, 0, everything)],
      "gate_up": [(refs.gate_proj, 0, 0), (refs.up_proj, 0, 0)],
      "down": [(refs.down_proj, 0, everything)],
    }
    stream = Stream(
      self.parts, matrices, (first, end), length, block, self.config.blocks, s
    )
    units = {name: part.units for name, part in self.parts.items()}
    counters = Phases(units, whole=self.phases == PHASES)
    stream.begin()
    zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), VECTOR)
    pl.when(me == 0)(lambda: store(s["squares"], zero))
    self._meet(s["ready"])
    steps = {
      "qkv": self._qkv,
      "attend": self._attend,
      "o": self._o,
      "gate_up": self._gate_up,
      "down": self._down,
    }

    @pl.loop(first, end)
    def _(layer):
      for name in self.phases:
        # What a phase waits for: in the first layer nobody has gone before.
        layers = layer - first + (name != "qkv")

        def ready(name=name, layers=layers):
          with jax.named_scope(f"{name}_wait"):
            wait = lambda: counters.wait(BEFORE[name], layers)
            if self.config.each_waits:
              # This block's own signal comes when nothing of it is in use.
              wait()
            else:
              pl.when(me == 0)(wait)
              self._meet(s["ready"])

        @pl.when(stream.has[name])
        def _(name=name, ready=ready):
          with jax.named_scope(name):
            steps[name](layer, length, stream, ready, refs, s)
            pl.when(me == 0)(lambda: counters.signal(name))
          with jax.named_scope(f"{name}_rest"):
            last = getattr(self.parts[name], "per", 1) - 1
            stream.rest(name, layer, last)

    @pl.when((block == 0) & (me == 0))
    def _():
      counters.clear(end - first)

  def _meet(self, barrier) -> None:
    """Waits until all warpgroups of the block are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)

  def _starts(self, chunks, me) -> list:
    """Of a unit's chunks the first ones of the blocks of a warpgroup.

    Each with the number of chunks that there are of it, not more than 0 where
    another warpgroup has the same.
    """
    found = []
    for j in range(-(-chunks // (BLOCK * self.config.warpgroups))):
      start = BLOCK * (me + j * self.config.warpgroups)
      last = (chunks - 1) // BLOCK * BLOCK
      found.append((jnp.minimum(start, last), chunks - start))
    return found

  def _write(self, s, start, value) -> None:
    """Gives tiles of a vector to the block's product, (BLOCK, TILE)."""
    value, own = value.astype(jnp.bfloat16), pl.ds(start, BLOCK)
    if self.interpret:
      store(s["x"].at[own, 0], value)
    else:
      store(s["plain"].at[own, pl.ds(0, TILE)], value)

  def _written(self, s) -> None:
    plgpu.commit_smem()
    self._meet(s["written"])

  def _normed(self, name, layer, before, norm, stream, ready, s) -> None:
    """Prepares a norm's result without its factor, and sums of squares.

    Args:
      name: Of the product that takes it.
      layer: In which it is.
      before: Parts of the stream, (splits, tiles, 64).
      norm: Scales, (L, tiles, 64).
      stream: Of the weights.
      ready: Waits for what was before.
      s: Shared memory.
    """
    part = self.parts[name]
    starts = self._starts(part.chunks, stream.me)
    own = [
      pl.ds(stream.split[name] * part.chunks + at, BLOCK) for at, _ in starts
    ]
    scales = [load(norm.at[layer, at], ROWS) for at in own]
    ready()
    shape, total = (BLOCK, TILE), None
    ids = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS)
    splits = before.shape[0]
    parts = [
      [load(before.at[i, at], ROWS) for i in range(splits)] for at in own
    ]
    for (start, count), scale, values in zip(starts, scales, parts):
      value = sum(values[1:], values[0])
      self._write(s, start, value * scale)
      squares = jnp.where(ids < count, value * value, 0.0)
      total = squares if total is None else total + squares
    rows = jnp.sum(total, axis=1)
    store(s["squares"].at[pl.ds(stream.me * BLOCK, BLOCK)], rows)
    self._written(s)

  def _product(self, name, layer, stream, s, before, finish) -> None:
    """Multiplies the block's unit.

    Args:
      name: Of the product.
      layer: In which it is.
      stream: Of the weights.
      s: Shared memory.
      before: Called with a tile's number before it is multiplied; what it
        returns goes to `finish`.
      finish: Called in the first warpgroup with a tile's number, a vector of
        each matrix, and what `before` returned.
    """
    part = self.parts[name]

    def each(k):
      tile = stream.group[name] * part.per + k
      prepared = before(tile)
      sums = s["sums"].at[lax.rem(k, jnp.int32(2))]
      with jax.named_scope(f"{name}_multiply"):
        for j, one in enumerate(stream.multiply(name, layer, k, s["x"])):
          store(sums.at[stream.me, j], one)
        self._meet(s["done"])

      @pl.when(stream.me == 0)
      def _():
        found = []
        for j in range(part.matrices):
          parts = [
            load(sums.at[w, j], VECTOR) for w in range(self.config.warpgroups)
          ]
          found.append(sum(parts[1:], parts[0]))
        finish(tile, found, prepared)

      pl.when(k < part.per - 1)(lambda: stream.rest(name, layer, k))

    if part.per == 1:
      each(jnp.int32(0))
    else:
      pl.loop(0, part.per)(each)

  def _qkv(self, layer, length, stream, ready, refs, s):
    """Products of the three matrices."""
    del length
    split, parts = stream.split["qkv"], self.sizes.parts
    self._normed(
      "qkv",
      layer,
      refs.stream,
      refs.norms.at[0],
      stream,
      ready,
      s,
    )

    def finish(tile, found, _):
      head = lax.div(tile, jnp.int32(parts))
      own = pl.ds(lax.rem(tile, jnp.int32(parts)) * TILE, TILE)
      store(refs.qkv.at[split, head, own], found[0])

      @pl.when(tile == 0)
      def _():
        squares = load(s["squares"], VECTOR)
        store(refs.squares.at[split], squares)

    self._product("qkv", layer, stream, s, lambda _: (), finish)

  def _factor(self, squares) -> jax.Array:
    """Of a norm, of parts of the sum of squares, (64,)."""
    return lax.rsqrt(jnp.sum(squares) / self.sizes.width + self.eps)

  def _attend(self, layer, length, stream, ready, refs, s):
    """Attention to slots of a key/value head, and to the new token."""
    sizes, me = self.sizes, stream.me
    parts, size, half = sizes.parts, sizes.size, sizes.size // 2
    head, split = stream.group["attend"], stream.split["attend"]
    layout = _HALF if half < TILE else ROWS
    line, across = layout.reduce(0), (QUERIES, half)
    cos, sin = (load(refs.turns.at[i], line) for i in range(2))
    ready()
    ids = range(self.config.qkv_splits)
    add = lambda values: sum(values[1:], values[0])
    ends = [pl.ds(i * half, half) for i in range(2)]
    queries = pl.ds(head * sizes.shared, QUERIES)
    row = sizes.heads + head
    wanted = [(queries, own, layout) for own in ends]
    wanted += [(row, own, line) for own in ends]
    wanted += [
      (row + sizes.kv_heads, pl.ds(p * TILE, TILE), VECTOR)
      for p in range(parts)
    ]
    squares = add([load(refs.squares.at[i], VECTOR) for i in ids])
    found = [
      add([load(refs.qkv.at[i, rows, own], form) for i in ids])
      for rows, own, form in wanted
    ]
    factor = self._factor(squares)
    q, k, v = (
      [one * factor for one in some]
      for some in (found[:2], found[2:4], found[4:])
    )
    turned = lambda x, cos, sin: (
      x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin
    )  # fmt: skip
    k = turned(k, cos, sin)
    q = turned(q, *(repeat(one, 1, across, layout) for one in (cos, sin)))
    scale = size**-0.5 * 1.4426950408889634
    for i in range(2):
      part, at = divmod(i * half, TILE)
      store(s["mixed"].at[me, part, :, pl.ds(at, half)], q[i] * scale)
      store(s["key"].at[me, ends[i]], k[i])
    rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    shape, score = (QUERIES, TILE), None
    keys = []
    for p in range(parts):
      value = load(s["mixed"].at[me, p, :, pl.ds(0, TILE)], ROWS)
      value = rounded(value)
      store(s["q"].at[me, p], value.astype(jnp.bfloat16))
      keys.append(rounded(load(s["key"].at[me, pl.ds(p * TILE, TILE)], VECTOR)))
      one = jnp.sum(value * repeat(keys[p], 1, shape, ROWS), axis=1)
      score = one if score is None else score + one
    plgpu.commit_smem()
    v = [rounded(one) for one in v]

    @pl.when((split == 0) & (me == 0) & (length < sizes.slots))
    def _():
      for p in range(parts):
        own = pl.ds(p * TILE, TILE)
        for ref, new in ((refs.keys, keys[p]), (refs.values, v[p])):
          target = ref.at[layer, 0, length, head, own]
          store(target, new.astype(jnp.bfloat16))

    # One warpgroup of a head begins with the new token.
    mine = ((split == 0) & (me == 0)).astype(jnp.float32)
    one = plgpu.layout_cast(
      jnp.full((QUERIES,), 1.0, jnp.float32), ROWS.reduce(1)
    )
    start = score * mine + _UNSEEN * (1 - mine), one * mine
    start += tuple(repeat(one, 1, shape, ROWS) * mine for one in v)
    base = stream.base("attend", layer)
    loop = lambda i, state: self._tile(i, state, base, length, layer, stream, s)
    top, total, *mixed = lax.fori_loop(jnp.int32(0), stream.tiles, loop, start)
    store(s["weights"].at[me, 0], top)
    store(s["weights"].at[me, 1], total)
    for p, value in enumerate(mixed):
      store(s["mixed"].at[me, p, :, pl.ds(0, TILE)], value)
    self._meet(s["done"])
    pl.when(me == 0)(lambda: self._merge(head, split, refs, s))

  def _tile(self, i, state, base, length, layer, stream, s):
    """Attends to a tile of slots: new maxima, sums and mixed values."""
    top, total, *mixed = state
    me, parts, shape = stream.me, self.sizes.parts, (QUERIES, TILE)
    first = base + i * 2 * parts
    sums = plgpu.ACC((TILE, QUERIES), jnp.float32)

    def logits(sums):
      for p in range(parts):
        plgpu.wgmma(sums, stream.arrived(first + p), s["q"].at[me, p].T)
      plgpu.wgmma_wait(0)
      return sums[...]

    target = s["scores"].at[me, :, pl.ds(0, TILE)]
    found = pl.run_scoped(logits, sums)
    store(target.T, plgpu.layout_cast(found, SUMS))
    for p in range(parts):
      stream.refill_slots(i, p, layer)
    scores = load(target, ROWS)
    places = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROWS)
    seen = length - (stream.begin_tile + i) * TILE
    scores = jnp.where(places < seen, scores, _UNSEEN)
    most = jnp.maximum(top, jnp.max(scores, axis=1))
    shares = jnp.exp2(scores - repeat(most, 0, shape, ROWS))
    store(s["shares"].at[me], shares.astype(jnp.bfloat16))
    plgpu.commit_smem()
    factor = jnp.exp2(top - most)
    total = total * factor + jnp.sum(shares, axis=1)
    factor = repeat(factor, 0, shape, ROWS)

    def mix(*sums):
      for p, one in enumerate(sums):
        values = stream.arrived(first + parts + p)
        plgpu.wgmma(one, values.T, s["shares"].at[me].T)
      plgpu.wgmma_wait(0)
      return [one[...] for one in sums]

    new = []
    for p, one in enumerate(pl.run_scoped(mix, *[sums] * parts)):
      target = s["mixed"].at[me, p, :, pl.ds(0, TILE)]
      store(target.T, plgpu.layout_cast(one, SUMS))
      new.append(mixed[p] * factor + load(target, ROWS))
    for p in range(parts):
      stream.refill_slots(i, parts + p, layer)
    return most, total, *new

  def _merge(self, head, split, refs, s):
    """Merges what the warpgroups found, in the first of them."""
    sizes, shape, count = self.sizes, (QUERIES, TILE), self.config.warpgroups
    vector = ROWS.reduce(1)
    tops, totals = (
      [load(s["weights"].at[w, i], vector) for w in range(count)]
      for i in range(2)
    )
    top = functools.reduce(jnp.maximum, tops)
    factors = [jnp.exp2(one - top) for one in tops]
    total = sum(f * t for f, t in zip(factors, totals))
    store(s["weights"].at[0, 0], top)
    store(s["weights"].at[0, 1], total)
    for p in range(sizes.parts):
      own = [s["mixed"].at[w, p, :, pl.ds(0, TILE)] for w in range(count)]
      found = sum(
        repeat(f, 0, shape, ROWS) * load(one, ROWS)
        for f, one in zip(factors, own)
      )
      store(own[0], found)
    for g in range(sizes.shared):
      for p in range(sizes.parts):
        row = (head * sizes.shared + g) * sizes.parts + p
        found = load(s["mixed"].at[0, p, g, pl.ds(0, TILE)], VECTOR)
        store(refs.mixed.at[split, row], found)
        for i in range(2):
          refs.weights[i, split, row] = s["weights"][0, i, g]

  def _residual(self, name, ref, stream):
    """A function of a tile: the stream, for units of the first rows, else 0."""
    mine = (stream.split[name] == 0).astype(jnp.float32)

    def of(tile):
      parts = [load(ref.at[i, tile], VECTOR) for i in range(ref.shape[0])]
      return sum(parts[1:], parts[0]) * mine

    return of

  def _o(self, layer, length, stream, ready, refs, s):
    """o_proj of merged attention, onto the stream."""
    del length
    part, split, shape = self.parts["o"], stream.split["o"], (BLOCK, TILE)
    ready()
    for start, _ in self._starts(part.chunks, stream.me):
      first, count = split * part.chunks + start, self.config.attend_splits
      own, ids = pl.ds(first, BLOCK), range(count)
      values = [load(refs.mixed.at[j, own], ROWS) for j in ids]
      tops, totals = (
        [load(refs.weights.at[i, j, own], ROWS.reduce(1)) for j in ids]
        for i in range(2)
      )
      top = functools.reduce(jnp.maximum, tops)
      factors = [jnp.exp2(one - top) for one in tops]
      total = sum(f * t for f, t in zip(factors, totals))
      found = sum(
        repeat(f / total, 0, shape, ROWS) * v for f, v in zip(factors, values)
      )
      self._write(s, start, found)
    self._written(s)
    self._onto("o", layer, refs.stream, refs.middle, stream, s)

  def _onto(self, name, layer, before, after, stream, s):
    """A product, and the stream."""
    split = stream.split[name]
    self._product(
      name, layer, stream, s, self._residual(name, before, stream),
      lambda tile, found, residual: store(
        after.at[split, tile], residual + found[0]
      ),
    )  # fmt: skip

  def _gate_up(self, layer, length, stream, ready, refs, s):
    """silu(gate_proj) * up_proj."""
    del length
    self._normed(
      "gate_up",
      layer,
      refs.middle,
      refs.norms.at[1],
      stream,
      ready,
      s,
    )

    def finish(tile, found, _):
      factor = self._factor(load(s["squares"], VECTOR))
      gate, up = (one * factor for one in found)
      store(refs.hidden.at[tile], gate * sigmoid(gate) * up)

    self._product("gate_up", layer, stream, s, lambda _: (), finish)

  def _down(self, layer, length, stream, ready, refs, s):
    """down_proj, onto the stream."""
    del length
    part, split = self.parts["down"], stream.split["down"]
    ready()
    starts = self._starts(part.chunks, stream.me)
    rows = [pl.ds(split * part.chunks + at, BLOCK) for at, _ in starts]
    values = [load(refs.hidden.at[own], ROWS) for own in rows]
    for (start, _), value in zip(starts, values):
      self._write(s, start, value)
    self._written(s)
    self._onto("down", layer, refs.middle, refs.stream, stream, s)
