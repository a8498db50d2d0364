"""The Mosaic GPU `butterfly_matmul` for Hopper: one pass over memory.

A butterfly of n = 64 H channels is a block-diagonal matrix of H blocks of 64
channels, which merges the six smallest strides, and log2 H stages that mix
channels a multiple of 64 apart. The matrix unit multiplies each block with the
transposed rows, and leaves (64 channels, rows) in registers. So a thread holds
two of the 64 places of every block for its rows. Stages of large strides mix
equal places of two blocks, which are in the registers of one thread; they run
in float32, before or after the products.

Two warpgroups of a thread block multiply and mix, each a tile of rows of its
own, so that the matrix unit works for one while the other mixes. A third one
loads. The blocks and the twiddles of large strides stay in shared memory.

From 2048 channels on the registers of a warpgroup do not hold a row. There the
thread blocks of a cluster share the channels, and between the stages of middle
and of large strides each gives the others their part, in bfloat16, by way of
distributed shared memory.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from ops import hopper
from ops import hopper_warpgroups as warpgroups
from ops.butterfly_matmul import mosaic_gpu_exchange as exchange
from ops.hopper_tiles import compiler_params, swizzled

# Channels of a block.
WIDE = 64
_LAYOUT = plgpu.Layout.WGMMA
_ROW = _LAYOUT.reduce(1)
# Pieces on their way to memory, of each warpgroup.
_OUT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernel is launched.

  Attributes:
    rows: Of x, in a tile of a warpgroup.
    workers: Warpgroups that compute.
    stages: Pieces in the ring of each of them.
    blocks: Thread blocks.
    cluster: Thread blocks that share the channels of a row.
    each: Blocks of 64 channels that are loaded and written at a time.
  """

  rows: int = 16
  workers: int = 2
  stages: int = 4
  blocks: int = hopper.PROCESSORS
  cluster: int = 1
  each: int = 2


def _scratch(heights, mixes, increasing, c: Config):
  """Shared memory and barriers by name."""
  bits = 16
  pieces = lambda count: swizzled(
    (c.workers, count, c.rows, c.each * WIDE), jnp.bfloat16, bits
  )
  scratch = {
    "w": swizzled((heights, WIDE, WIDE), jnp.bfloat16, bits),
    "mix": plgpu.SMEM((mixes[0], WIDE), jnp.float32),
    "x": pieces(c.stages),
    "out": pieces(_OUT),
    "ready": plgpu.Barrier(num_arrivals=2 + (c.cluster > 1)),
    "loaded": plgpu.Barrier(num_barriers=c.workers * c.stages),
    "consumed": plgpu.Barrier(num_barriers=c.workers * c.stages),
  }
  if not increasing:
    scratch["middle"] = pieces(_OUT)
  if c.cluster > 1:
    scratch["cross"] = plgpu.SMEM((mixes[1], WIDE), jnp.float32)
    scratch["given"] = exchange.memory(c.workers, heights, WIDE, c.rows)
    scratch["arrived"] = exchange.barriers(c.workers)
    scratch["free"] = plgpu.ClusterBarrier(
      collective_axes=("cluster",), num_arrivals=1, num_barriers=c.workers
    )
  return scratch


def mixed(values, twiddle, increasing, unit=1):
  """Runs stages of strides that are multiples of 64.

  Args:
    values: (64, rows) of each block of 64 channels.
    twiddle: Called with the number of an entry, gives its 64 values.
    increasing: Whether the smallest stride comes first.
    unit: Blocks that the smallest stride spans.
  """
  values, half = list(values), len(values) // 2
  stages = (len(values) // unit).bit_length() - 1
  for stage in range(stages):
    stride = unit * 2 ** (stage if increasing else stages - 1 - stage)
    for pair in range(half):
      a = pair // stride * 2 * stride + pair % stride
      b = a + stride
      t = [twiddle((stage * half + pair) * 4 + i) for i in range(4)]
      values[a], values[b] = (
        t[0] * values[a] + t[1] * values[b],
        t[2] * values[a] + t[3] * values[b],
      )
  return values


def left(i, copies, pending):
  """Copies that may be under way before the i-th of a tile is prepared.

  The copies of a tile take two memories in turn, so `pending` of them may be
  under way: those that came after the last one from the same memory. With an
  odd number of copies the first one follows a copy from its own memory, the
  last of the tile before, so then none may be under way.
  """
  return 0 if i == 0 and copies % _OUT else pending


class _Block:
  """A thread block at work, in one of its warpgroups."""

  def __init__(self, c: Config, sizes, grid, interpret, keep, refs, s):
    """Takes sizes, references and shared memory by name."""
    self.c, self.s, self.interpret, self.keep = c, s, interpret, keep
    self.x_ref, self.w_ref, self.mix_ref, self.cross_ref, *out = refs
    self.y_ref, self.middle_ref = out[0], out[1] if keep else None
    # `heights` blocks of 64 channels are multiplied here. Of each thread block
    # of the cluster `shared` blocks are mixed here across thread blocks.
    rows, width, self.stacked, self.out_width = sizes
    self.heights = width // WIDE // c.cluster
    self.shared = self.heights // c.cluster
    self.pieces = self.heights // c.each
    self.tiles = pl.cdiv(rows, c.rows)
    self.me = lax.axis_index("warpgroup")
    self.peer = lax.axis_index("cluster") if c.cluster > 1 else 0
    self.stack = lax.axis_index("stacks")
    self.first = lax.axis_index("blocks") * c.workers
    self.step = grid * c.workers
    self.halves = [pl.ds(k * WIDE, WIDE) for k in range(c.each)]

  def count(self, worker):
    """Tiles of a worker."""
    left = self.tiles - self.first - worker
    return lax.div(jnp.maximum(left + self.step - 1, 0), jnp.int32(self.step))

  def at(self, worker, n):
    """The slot of a worker's ring that holds its piece n, and its barrier."""
    slot = lax.rem(n, jnp.int32(self.c.stages))
    return slot, worker * self.c.stages + slot

  def place(self, worker, j, p, crossed, width):
    """Rows and channels of piece p of a worker's tile j.

    Args:
      worker: Number of a warpgroup.
      j: Number of a tile.
      p: Number of a piece.
      crossed: Whether pieces are some of those of all thread blocks of a
        cluster, not all of this one's.
      width: Channels of a stack.
    """
    c = self.c
    row = (self.first + worker + j * self.step) * c.rows
    h = self.peer * self.heights + p * c.each
    if crossed and c.cluster > 1:
      many = self.shared // c.each
      div, rem = (
        divmod(p, many)
        if isinstance(p, int)
        else (lax.div(p, jnp.int32(many)), lax.rem(p, jnp.int32(many)))
      )
      h = div * self.heights + self.peer * self.shared + rem * c.each
    column = self.stack * width + h * WIDE
    return pl.ds(row, c.rows), pl.ds(column, c.each * WIDE)

  def left_out(self, p, crossed):
    """Whether piece p lies behind all that is wanted of a stack."""
    if not crossed:
      return self.c.cluster == 1 and p * self.c.each * WIDE >= self.out_width
    span = self.heights * WIDE if self.c.cluster > 1 else self.c.each * WIDE
    many = max(1, self.shared // self.c.each) if self.c.cluster > 1 else 1
    return p // many * span >= self.out_width

  def load(self):
    """Fills the rings."""
    c, s = self.c, self.s
    share = self.stack * c.cluster + self.peer
    own = pl.ds(share * self.heights, self.heights)
    plgpu.copy_gmem_to_smem(self.w_ref.at[own], s["w"], s["ready"])
    plgpu.copy_gmem_to_smem(self.mix_ref.at[share], s["mix"], s["ready"])
    if c.cluster > 1:
      cross = self.cross_ref.at[share]
      plgpu.copy_gmem_to_smem(cross, s["cross"], s["ready"])

    def copy(worker, n):
      j, p = (f(n, jnp.int32(self.pieces)) for f in (lax.div, lax.rem))
      slot, barrier = self.at(worker, n)

      @pl.when(j < self.count(worker))
      def _():
        @pl.when(n >= c.stages)
        def _():
          plgpu.barrier_wait(s["consumed"].at[barrier])

        place = self.place(worker, j, p, not self.increasing, self.stacked)
        plgpu.copy_gmem_to_smem(
          self.x_ref.at[place],
          s["x"].at[worker, slot],
          s["loaded"].at[barrier],
        )

    def seen(worker, n):
      plgpu.barrier_wait(s["consumed"].at[self.at(worker, n)[1]])

    def all_workers(n, _):
      for worker in range(c.workers):
        copy(worker, n)

    lax.fori_loop(0, self.count(0) * self.pieces, all_workers, None)
    # The slots that are still in use are waited for, because every phase of a
    # barrier must be seen before the kernel ends.
    for worker in range(c.workers):
      total = self.count(worker) * self.pieces
      pl.loop(jnp.maximum(total - c.stages, 0), total)(
        functools.partial(seen, worker)
      )

  def wait(self, j, p):
    """Piece p of this warpgroup's tile j, once it is there."""
    slot, barrier = self.at(self.me, j * self.pieces + p)
    plgpu.barrier_wait(self.s["loaded"].at[barrier])
    return self.s["x"].at[self.me, slot]

  def release(self, j, p):
    """Lets the slot of piece p be filled anew."""
    _, barrier = self.at(self.me, j * self.pieces + p)
    plgpu.barrier_arrive(self.s["consumed"].at[barrier])

  def products(self, first, pieces, after=lambda p: None):
    """The blocks from `first` on times pieces of rows, transposed.

    Args:
      first: Number of a block.
      pieces: Functions that return the references.
      after: Called with the number of a piece that is no longer needed.
    """
    w, each = self.s["w"], self.c.each
    if self.interpret:
      found = []
      for p, piece in enumerate(pieces):
        x = piece()
        for k, own in enumerate(self.halves):
          a, b = w.at[first + each * p + k][...], x.at[:, own][...]
          found.append(jnp.dot(a, b.T, preferred_element_type=jnp.float32))
        after(p)
      return found

    def scoped(*sums):
      for p, piece in enumerate(pieces):
        x = piece()
        for k, own in enumerate(self.halves):
          plgpu.wgmma(
            sums[each * p + k], w.at[first + each * p + k], x.at[:, own].T
          )
        if p:
          plgpu.wgmma_wait(each)
          after(p - 1)
      plgpu.wgmma_wait(0)
      after(len(pieces) - 1)
      return [total[...] for total in sums]

    sums = plgpu.ACC((WIDE, self.c.rows), jnp.float32)
    return pl.run_scoped(scoped, *[sums] * (each * len(pieces)))

  def mix(self, values, name="mix", unit=1):
    """Runs the stages whose twiddles lie in the memory of this name."""
    shape = WIDE, self.c.rows

    def twiddle(at):
      own = self.s[name].at[at]
      if self.interpret:
        return jnp.broadcast_to(own[...][:, None], shape)
      value = plgpu.load(own, layout=_ROW, optimized=False)
      return lax.broadcast_in_dim(value, shape, (0,))

    return mixed(values, twiddle, self.increasing, unit)

  def exchange(self, j, values):
    """Gives each thread block of the cluster its share, and takes one of each.

    Args:
      j: Number of the tile.
      values: (64, rows), by the thread block that they go to.

    Returns:
      As many, by the thread block that they come from.
    """
    s, me = self.s, self.me

    @pl.when(j > 0)
    def _():
      # Memory is written once all thread blocks have read the tile before.
      plgpu.barrier_wait(s["free"].at[me])

    own = pl.ds(self.peer * self.shared, self.shared)
    exchange.give(
      s["given"].at[me, own],
      [value.astype(jnp.bfloat16) for value in values],
      s["arrived"].at[me],
    )
    exchange.wait(s["arrived"].at[me], j)
    found = [
      value.astype(jnp.float32)
      for value in exchange.take(s["given"].at[me], (WIDE, self.c.rows))
    ]
    # A few threads signal for all, so that these must have read before.
    plgpu.commit_smem()
    plgpu.barrier_arrive(s["free"].at[me])
    return found

  def crossed(self, values):
    """Runs the stages that mix what thread blocks of the cluster have."""
    return self.mix(values, "cross", self.shared)

  def run(self):
    """Multiplies tile after tile."""
    s, me = self.s, self.me
    if self.c.cluster > 1:
      # Messages count at a barrier, so all thread blocks have theirs first.
      exchange.start(s["arrived"].at[me])
      plgpu.commit_smem()
      plgpu.barrier_arrive(s["free"].at[me])
      plgpu.barrier_wait(s["free"].at[me])
    count = self.count(me)
    lax.fori_loop(0, count, self.tile, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)
    if self.c.cluster > 1:
      # A thread block waits here for the others' last signal, because the
      # memory that it is sent to must not be given away before.
      @pl.when(count > 0)
      def _():
        plgpu.barrier_wait(s["free"].at[me])

  def put(self, piece, values):
    """Writes the blocks (64, rows) of a piece to shared memory, transposed."""
    for own, value in zip(self.halves, values):
      value, out = value.astype(jnp.bfloat16), piece.at[:, own]
      if self.interpret:
        out[...] = value.T
      else:
        out.T[...] = value
    plgpu.commit_smem()

  def memory(self, name, i, copies, pending):
    """The shared memory for the i-th of a tile's copies, once it is free."""
    plgpu.wait_smem_to_gmem(left(i, copies, pending), wait_read_only=True)
    return self.s[name].at[self.me, i % _OUT]

  def send(self, j, p, values, ref, out, crossed, width):
    """Writes the blocks of a piece to memory, by way of shared memory."""
    self.put(out, values)
    place = self.place(self.me, j, p, crossed, width)
    plgpu.copy_smem_to_gmem(out, ref.at[place])

  @property
  def width(self):
    """Channels of a butterfly."""
    return self.heights * self.c.cluster * WIDE

  def piece(self, values, p):
    """Those of piece p."""
    return values[self.c.each * p : self.c.each * (p + 1)]


class _Increasing(_Block):
  """Products first."""

  increasing = True

  def tile(self, j, _):
    """Multiplies tile j."""
    values = self.products(
      0,
      [functools.partial(self.wait, j, p) for p in range(self.pieces)],
      functools.partial(self.release, j),
    )
    wanted = [p for p in range(self.pieces) if not self.left_out(p, True)]
    kept = range(self.pieces if self.keep else 0)
    copies = len(kept) + len(wanted)
    for i, p in enumerate(kept):
      out, own = self.memory("out", i, copies, 1), self.piece(values, p)
      self.send(j, p, own, self.middle_ref, out, False, self.width)
    values = self.mix(values)
    if self.c.cluster > 1:
      values = self.crossed(self.exchange(j, values))
    for i, p in enumerate(wanted, len(kept)):
      out, own = self.memory("out", i, copies, 1), self.piece(values, p)
      self.send(j, p, own, self.y_ref, out, True, self.out_width)


class _Decreasing(_Block):
  """Products last."""

  increasing = False

  def tile(self, j, _):
    """Multiplies tile j."""
    values = []
    for p in range(self.pieces):
      x = self.wait(j, p)
      for own in self.halves:
        part = x.at[:, own]
        if self.interpret:
          value = part[...].T
        else:
          value = plgpu.load(part.T, layout=_LAYOUT)
        values.append(value.astype(jnp.float32))
      self.release(j, p)
    if self.c.cluster > 1:
      values = self.exchange(j, self.crossed(values))
    values = self.mix(values)
    pending = 3 if self.keep else 1
    for p in range(self.pieces):
      middle = self.s["middle"].at[self.me, p % _OUT]
      if self.keep:
        middle = self.memory("middle", p, self.pieces, pending)
      self.put(middle, self.piece(values, p))
      if self.keep:
        plgpu.copy_smem_to_gmem(
          middle,
          self.middle_ref.at[self.place(self.me, j, p, False, self.width)],
        )
      found = self.products(self.c.each * p, [lambda middle=middle: middle])
      out = self.memory("out", p, self.pieces, pending)
      self.send(j, p, found, self.y_ref, out, False, self.out_width)


def shares(mixes, cluster, increasing):
  """The twiddles of large strides by stack and thread block of a cluster.

  Those of strides within one, (S cluster, ..., 64), and of those across.
  """
  stacks, depth = mixes.shape[:2]
  across = cluster.bit_length() - 1
  if increasing:
    inner, outer = mixes[:, : depth - across], mixes[:, depth - across :]
  else:
    outer, inner = mixes[:, :across], mixes[:, across:]
  inner = inner.reshape(stacks, depth - across, cluster, -1, WIDE)
  inner = inner.transpose(0, 2, 1, 3, 4).reshape(stacks * cluster, -1, WIDE)
  if not across:
    return inner, inner
  outer = outer.reshape(stacks, across, cluster // 2, cluster, -1, WIDE)
  outer = outer.transpose(0, 3, 1, 2, 4, 5)
  return inner, outer.reshape(stacks * cluster, -1, WIDE)


@functools.partial(
  jax.jit,
  static_argnames=("increasing", "keep", "width", "config", "interpret"),
)
def product(
  x,
  blocks,
  mixes,
  *,
  increasing,
  keep=False,
  width=None,
  config,
  interpret=False,
):
  """Multiplies rows by a stack of butterflies.

  Args:
    x: (M, n) bfloat16 with n = 64 H, or (M, S n) with channels of their own for
      each stack; M a multiple of 8.
    blocks: (S, H, 64, 64) bfloat16, the matrices of the small strides, as (out,
      in).
    mixes: (S, log2 H, H / 2, 2, 2, 64) float32, the twiddles of the large
      strides in the order of use.
    increasing: Whether blocks come first.
    keep: Whether to return what lies between both, too.
    width: Of a stack's channels the first that are wanted, if not all; with
      increasing strides, and a multiple of a thread block's.
    config: A Config.
    interpret: False, or the parameters of the interpreter.

  Returns:
    (M, S width) bfloat16; and (M, S n), if kept.
  """
  c, rows = config, x.shape[0]
  stacks, n = blocks.shape[0], blocks.shape[1] * WIDE
  width = width or n
  tiles = pl.cdiv(rows, c.rows)
  grid = min(c.blocks // (c.cluster * stacks), pl.cdiv(tiles, c.workers))
  grid = max(grid, 1)
  mixes = shares(mixes, c.cluster, increasing)
  high = tiles * c.rows if interpret else rows
  if interpret:
    x = jnp.pad(x, ((0, high - rows), (0, 0)))
  sizes = rows, n, n if x.shape[1] > n else 0, width

  def kernel(*refs, **s):
    kind = _Increasing if increasing else _Decreasing
    block = kind(c, sizes, grid, bool(interpret), keep, refs, s)

    def compute():
      plgpu.barrier_wait(s["ready"])
      block.run()

    warpgroups.divide(c.workers, block.me, compute, block.load)

  out = lambda width: jax.ShapeDtypeStruct((high, stacks * width), x.dtype)
  clusters = {}
  if c.cluster > 1:
    clusters = {"cluster": (c.cluster,), "cluster_names": ("cluster",)}
  run = plgpu.kernel(
    kernel,
    out_type=[out(width), out(n)][: 1 + keep],
    grid=(grid, stacks),
    grid_names=("blocks", "stacks"),
    num_threads=c.workers + 1,
    thread_name="warpgroup",
    **clusters,
    scratch_types=_scratch(
      n // WIDE // c.cluster, [part.shape[1] for part in mixes], increasing, c
    ),
    kernel_name="butterfly_matmul_" + ("fwd" if increasing else "bwd"),
    compiler_params=compiler_params(),
    interpret=interpret,
  )
  blocks = blocks.reshape(-1, WIDE, WIDE)
  found = [part[:rows] for part in run(x, blocks, *mixes)]
  return tuple(found) if keep else found[0]
