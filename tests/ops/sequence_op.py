"""What every implementation of a state-space op must do, checked once for all.

A test module of an op makes a `SequenceOp` for each implementation and runs
every name of `CHECKS` on it:

  @pytest.mark.parametrize("check", sequence_op.CHECKS)
  @pytest.mark.parametrize("implementation", OPS)
  def test_contract(implementation, check):
    getattr(OPS[implementation], check)()
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

FULL = "x dt A B C D z dt_bias initial_state".split()
BARE = FULL[:5]
# Those that a model computes in its compute dtype; parameters stay float32.
ACTIVATIONS = ("x", "dt", "B", "C", "z")
PER_ROW = (*ACTIVATIONS, "initial_state")
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def tolerance(dtype: str, terms: int) -> float:
  """Error allowed in a sum of `terms`, relative to the largest result.

  Roundings of a float32 sum walk at random. With bfloat16 operands and results
  are rounded on top, but never a partial sum.
  """
  walk = 4 * EPSILON["float32"] * terms**0.5
  return walk if dtype == "float32" else walk + 4 * EPSILON[dtype]


def assert_close(found, expected, bound: float, name: str = ""):
  """Largest error of each leaf, relative to its largest value."""
  found = jax.tree.leaves_with_path(found)
  expected = jax.tree.leaves(expected)
  assert len(found) == len(expected)
  for (path, a), b in zip(found, expected):
    where = name + jax.tree_util.keystr(path)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, where
    assert np.isfinite(a).all(), where
    error = np.abs(a - b).max(initial=0)
    largest = np.abs(b).max(initial=0)
    assert error <= bound * largest, f"{where}: {error:.2e} of {largest:.2e}"


def packed_ids(length: int) -> np.ndarray:
  """Two rows: padding in front, between, behind; a one-token segment; id 0."""
  first = [-1] * 7 + [3] * 10 + [-5] * 2 + [5] + [3] * length
  second = [0] * 6 + [9] * 11 + [-1] * 3 + [9] * 4 + [1] * 7 + [-1] * length
  return np.asarray([first[:length], second[:length]], np.int32)


def make_case(make, case: str, dtype: str, batch: int, length: int, seed=0):
  """Returns the arrays of a case, float64 but exact in `dtype`, and ids.

  Cases: "bare" has the five arrays alone, "full" has every option, "packed" has
  segment ids too, "extreme" has dt = 100 and A = -100 among mild values.
  """
  arrays = make(seed, batch, length)
  assert list(arrays) == FULL
  ids = None
  if case == "bare":
    arrays = {name: arrays[name] for name in BARE}
    arrays["dt"] = np.log1p(np.exp(arrays["dt"]))
  elif case == "packed":
    ids = packed_ids(length)
  elif case == "extreme":
    ids = np.zeros((batch, length), np.int32)
    large = np.random.default_rng(seed).random(arrays["dt"].shape) < 0.3
    arrays["dt"] = np.where(large, 100.0, arrays["dt"] - 2)
    arrays["A"][::2], arrays["A"][1::2] = -100.0, -0.01
  for name in arrays:
    cast = dtype if name in ACTIVATIONS else "float32"
    arrays[name] = np.asarray(jnp.asarray(arrays[name], cast), np.float64)
  return arrays, ids


def call(op, arrays: dict, segment_ids):
  """Calls an op with a case, returns (y, final state)."""
  options = {name: value for name, value in arrays.items() if name not in BARE}
  return op(
    *(arrays[name] for name in BARE),
    **options,
    dt_softplus="dt_bias" in arrays,
    segment_ids=segment_ids,
    return_final_state=True,
  )


def pull(op, arrays, segment_ids, cotangents):
  """Returns an op's results and the gradients of all arrays."""
  run = functools.partial(call, op, segment_ids=segment_ids)
  results, pullback = jax.vjp(lambda arrays: run(arrays=arrays), arrays)
  return results, pullback(cotangents)[0]


def cotangents_like(arrays, dtype):
  rng = np.random.default_rng(7)
  state = arrays.get("initial_state")
  dy = jnp.asarray(rng.normal(size=arrays["x"].shape), dtype)
  return np.asarray(dy, np.float64), rng.normal(size=state.shape)


@functools.cache
def exact_pull(oracle):
  return jax.jit(functools.partial(pull, oracle))


@functools.cache
def expected_gradients(oracle, make, case, dtype, batch, length):
  """The oracle's results and gradients in float64, kept for all tests."""
  arrays, ids = make_case(make, case, dtype, batch, length)
  if ids is None:  # the same, and one compilation less
    ids = np.zeros((batch, length), np.int32)
  with jax.enable_x64(True):
    arguments = jax.tree.map(jnp.asarray, (arrays, ids))
    cotangents = jax.tree.map(jnp.asarray, cotangents_like(arrays, dtype))
    found = exact_pull(oracle)(*arguments, cotangents)
    return jax.tree.map(np.asarray, found)


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceOp:
  """One implementation under test.

  Attributes:
    op: `op(x, dt, A, B, C, **options)` as models call it.
    reference: The NumPy specification, same arguments.
    oracle: A plain recurrence in JAX, same arguments: gradients in float64.
    make: From (seed, batch, length) to a dict of float64 arrays named `FULL`.
    length: Tokens, odd; at least 33, so that packed rows end in padding.
    cuts: Where a sequence is cut: by default to 1, 16 and 16 tokens.
    partitions: Whether the compiler shards it by itself; else `shard_map` does.
  """

  op: Callable
  reference: Callable
  oracle: Callable
  make: Callable
  batch: int = 2
  length: int = 33
  cuts: tuple[int, ...] = (1, 17)
  partitions: bool = True

  @functools.cached_property
  def run(self):
    return jax.jit(functools.partial(call, self.op))

  @functools.cached_property
  def pull(self):
    return jax.jit(functools.partial(pull, self.op))

  @functools.cached_property
  def pull_rematerialized(self):
    """Gradients by running the op anew, which takes no residuals along."""
    return jax.jit(lambda *case: pull(self._rematerialized(), *case))

  def _rematerialized(self):
    def op(*arrays, dt_softplus, return_final_state, **options):
      static = {
        "dt_softplus": dt_softplus,
        "return_final_state": return_final_state,
      }
      run = jax.checkpoint(functools.partial(self.op, **static))
      return run(*arrays, **options)

    return op

  def case(self, case: str, dtype: str = "float32", seed: int = 0):
    arrays, ids = make_case(
      self.make, case, dtype, self.batch, self.length, seed
    )
    arrays = {
      name: jnp.asarray(x, dtype if name in ACTIVATIONS else "float32")
      for name, x in arrays.items()
    }
    return arrays, None if ids is None else jnp.asarray(ids)

  def tolerance(self, dtype: str = "float32") -> float:
    state_size = self.make(0, 1, 1)["B"].shape[-1]
    return tolerance(dtype, self.batch * self.length * state_size)

  def compare_forward(self, case: str, dtype: str):
    arrays, ids = self.case(case, dtype)
    y, state = self.run(arrays, ids)
    assert y.dtype == dtype and state.dtype == jnp.float32
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    expected = call(self.reference, exact, None if ids is None else ids)
    assert_close((y, state), expected, self.tolerance(dtype), case)

  def compare_gradients(self, case: str, dtype: str, remat: bool = False):
    arrays, ids = self.case(case, dtype)
    dy, dstate = cotangents_like(arrays, dtype)
    cotangents = jnp.asarray(dy, dtype), jnp.asarray(dstate, jnp.float32)
    run = self.pull_rematerialized if remat else self.pull
    found = run(arrays, ids, cotangents)
    expected = expected_gradients(
      self.oracle, self.make, case, dtype, self.batch, self.length
    )
    assert_close(found, expected, self.tolerance(dtype), case)
    for name, gradient in found[1].items():
      assert gradient.dtype == arrays[name].dtype, name

  def check_forward(self):
    self.compare_forward("full", "float32")

  def check_forward_without_options(self):
    self.compare_forward("bare", "float32")

  def check_forward_packed_and_padded(self):
    self.compare_forward("packed", "float32")

  def check_forward_extreme(self):
    self.compare_forward("extreme", "float32")

  def check_gradients_rematerialized(self):
    self.compare_gradients("full", "float32", remat=True)

  def check_gradients_bfloat16(self):
    self.compare_gradients("full", "bfloat16")

  def check_gradients_packed_and_padded(self):
    self.compare_gradients("packed", "float32")

  def check_gradients_extreme(self):
    self.compare_gradients("extreme", "float32")

  def check_oracle_is_the_reference(self):
    """Gradients are those of a function that has the right values."""
    for case in ("full", "packed", "extreme"):
      (y, state), _ = expected_gradients(
        self.oracle, self.make, case, "float32", self.batch, self.length
      )
      arrays, ids = make_case(
        self.make, case, "float32", self.batch, self.length
      )
      assert_close((y, state), call(self.reference, arrays, ids), 1e-12, case)

  def check_eager_without_state(self):
    arrays, _ = self.case("bare")
    y, _ = self.run(arrays, None)
    assert_close(self.op(*arrays.values()), y, self.tolerance())

  def check_split_is_the_whole(self):
    arrays, _ = self.case("full")
    pieces, state = [], arrays["initial_state"]
    for start, end in zip((0, *self.cuts), (*self.cuts, self.length)):
      part = {
        name: x[:, start:end] if name in ACTIVATIONS else x
        for name, x in arrays.items()
      }
      y, state = self.run({**part, "initial_state": state}, None)
      pieces.append(y)
    joined = jnp.concatenate(pieces, axis=1), state
    assert_close(joined, self.run(arrays, None), self.tolerance(), "split")

  def check_packed_and_padded_are_separate(self):
    """Every segment alone gives the numbers it has in its row."""
    arrays, ids = self.case("packed")
    y, state = (np.asarray(x) for x in self.run(arrays, ids))
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    ids = np.asarray(ids)
    np.testing.assert_array_equal(y[ids < 0], 0)
    for row in range(self.batch):
      tokens = np.flatnonzero(ids[row] >= 0)
      edges = np.flatnonzero(np.diff(ids[row, tokens])) + 1
      start = exact["initial_state"][row : row + 1]
      for segment in np.split(tokens, edges):
        part = {
          name: x[row : row + 1, segment] if name in ACTIVATIONS else x
          for name, x in exact.items()
        }
        alone = call(self.reference, {**part, "initial_state": start}, None)
        bound = self.tolerance() * np.abs(y).max() / np.abs(alone[0]).max()
        assert_close(y[row : row + 1, segment], alone[0], bound, "segment")
        start = np.zeros_like(start)
      assert_close(state[row : row + 1], alone[1], self.tolerance(), "state")

  def check_padding_may_hold_anything(self):
    arrays, ids = self.case("packed")
    dirty = dict(arrays)
    for name in ("x", "dt", "B", "C"):
      hole = (ids < 0).reshape(*ids.shape, *(1,) * (arrays[name].ndim - 2))
      dirty[name] = jnp.where(hole, jnp.nan, arrays[name])
    cotangents = self.run(arrays, ids)
    found, expected = (self.pull(x, ids, cotangents) for x in (dirty, arrays))
    jax.tree.map(np.testing.assert_array_equal, found, expected)

  def check_vmap(self):
    first, second = self.case("full", seed=0)[0], self.case("full", seed=1)[0]
    both = {
      name: jnp.stack([first[name], second[name]]) if name in PER_ROW else x
      for name, x in first.items()
    }
    axes = {name: 0 if name in PER_ROW else None for name in first}
    mapped = jax.jit(jax.vmap(self.run, in_axes=(axes, None)))(both, None)
    second |= {name: first[name] for name in first if name not in PER_ROW}
    for i, alone in enumerate((first, second)):
      found = jax.tree.map(lambda x, i=i: x[i], mapped)
      assert_close(found, self.run(alone, None), self.tolerance(), "vmap")

  def check_sharded_is_single(self):
    """Rows of a batch on two devices, results and gradients."""
    arrays, ids = self.case("packed")
    cotangents = self.run(arrays, ids)
    expected = self.pull(arrays, ids, cotangents)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    rows = P("data")
    specs = {name: rows if name in PER_ROW else P() for name in arrays}
    run = functools.partial(call, self.op)
    if not self.partitions:
      run = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs, rows),
        out_specs=(rows, rows),
        check_vma=False,
      )

    @jax.jit
    def pull_sharded(arrays, ids, cotangents):
      results, pullback = jax.vjp(lambda a: run(a, ids), arrays)
      return results, pullback(cotangents)[0]

    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    found = pull_sharded(
      {name: place(x, specs[name]) for name, x in arrays.items()},
      place(ids, rows),
      jax.tree.map(lambda x: place(x, rows), cotangents),
    )
    assert len(found[0][0].devices()) == 2
    assert_close(found, expected, self.tolerance(), "sharded")


CHECKS = tuple(name for name in vars(SequenceOp) if name.startswith("check_"))


def scan_oracle(
  x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False,
  initial_state=None, return_final_state=False, segment_ids=None,
):  # fmt: skip
  """`selective_scan` as a plain recurrence over tokens, any precision."""
  b, _, d = x.shape
  if dt_bias is not None:
    dt = dt + dt_bias[None, None]
  if dt_softplus:
    dt = jax.nn.softplus(dt)
  B, C = (jnp.repeat(value, d // B.shape[2], axis=2) for value in (B, C))
  ids = (
    jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
  )

  def step(carry, token):
    state, last = carry
    x, dt, B, C, ids = token
    kept, first = (ids >= 0)[:, None, None], (last < 0)[:, None, None]
    same = (ids == last)[:, None, None]
    before = jnp.where(first | same, state, 0)
    decay = jnp.exp(dt[..., None] * A[None])
    after = decay * before + (dt * x)[..., None] * B
    y = jnp.where(kept[..., 0], jnp.sum(C * after, axis=-1), 0)
    state = jnp.where(kept, after, state)
    return (state, jnp.where(ids >= 0, ids, last)), y

  if initial_state is None:
    initial_state = jnp.zeros((b, *A.shape), x.dtype)
  tokens = tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, B, C, ids))
  start = initial_state, jnp.full((b,), -1, ids.dtype)
  (state, _), y = lax.scan(step, start, tokens)
  y = jnp.moveaxis(y, 0, 1)
  if D is not None:
    y = y + jnp.where((ids >= 0)[..., None], D[None, None] * x, 0)
  if z is not None:
    y = y * jax.nn.silu(z)
  return (y, state) if return_final_state else y


def ssd_oracle(
  x, dt, A, B, C, *, D=None, z=None, dt_bias=None, initial_state=None,
  return_final_state=False, **options,
):  # fmt: skip
  """`ssd` as the selective scan that it is a special case of."""
  b, length, h, p = x.shape
  n = B.shape[-1]
  spread = lambda v: v if v is None else jnp.repeat(v, p, axis=-1)
  flat = lambda v: v if v is None else v.reshape(b, length, h * p)
  if D is not None:
    D = jnp.broadcast_to(D.reshape(h, -1), (h, p)).reshape(h * p)
  if initial_state is not None:
    initial_state = initial_state.reshape(b, h * p, n)
  y, state = scan_oracle(
    flat(x),
    spread(dt),
    jnp.broadcast_to(spread(A)[:, None], (h * p, n)),
    B,
    C,
    D=D,
    z=flat(z),
    dt_bias=spread(dt_bias),
    initial_state=initial_state,
    return_final_state=True,
    **options,
  )
  y, state = y.reshape(x.shape), state.reshape(b, h, p, n)
  return (y, state) if return_final_state else y
