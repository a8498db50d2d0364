"""Ops under a mesh: rows, heads and parts of a row on eight devices."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ops
from ops import dispatch, sharding
from ops.mamba2_step import api as mamba2_step_api
from ops.ring_attention import ring_attention

_B, _L, _H, _P, _N = 4, 16, 4, 3, 5
# Padding on both sides, texts that end at, before and behind a device's end.
_IDS = np.array(
  [
    [-1] * 3 + [0] * 6 + [1] * 7,
    [0] * 8 + [1] * 8,
    [0] * 4 + [1] * 3 + [2] * 7 + [-1] * 2,
    [0] * 16,
  ],
  np.int32,
)


def _mesh(**shape):
  return jax.make_mesh(
    tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape)
  )


def _draw(generator, *shape):
  return generator.standard_normal(shape, dtype=np.float32)


def _scan(op, a):
  options = {"D": a["D"], "z": a["z"], "dt_softplus": True}
  return op(
    *(a[name] for name in ("x", "dt", "A", "B", "C")),
    initial_state=a["state"],
    return_final_state=True,
    segment_ids=a["ids"],
    **options,
  )


def _case(name):
  """A function of arrays, the arrays, and what their dimensions are."""
  draw = functools.partial(_draw, np.random.default_rng(1))
  if name in ("ssd", "selective_scan"):
    last = (_P,) if name == "ssd" else ()
    arrays = {
      "x": draw(_B, _L, _H, *last),
      "dt": draw(_B, _L, _H),
      "A": -np.exp(draw(_H) if name == "ssd" else draw(_H, _N)),
      "B": draw(_B, _L, 1, _N),
      "C": draw(_B, _L, 1, _N),
      "D": draw(_H),
      "z": draw(_B, _L, _H, *last),
      "state": draw(_B, _H, *last, _N),
    }
    return functools.partial(_scan, getattr(ops, name)), arrays
  if name == "causal_conv1d":
    run = lambda a: ops.causal_conv1d(
      a["x"], a["w"], a["b"], segment_ids=a["ids"], activation="silu"
    )
    return run, {"x": draw(*_IDS.shape, _H), "w": draw(_H, 4), "b": draw(_H)}
  if name == "rms_norm":
    run = lambda a: ops.rms_norm(
      a["x"], a["s"], residual=a["r"], eps=1e-5, implementation="xla"
    )
    shape = (_B, _L, _H)
    return run, {"x": draw(*shape), "s": draw(_H), "r": draw(*shape)}
  if name == "token_logprob":
    run = lambda a: ops.token_logprob(
      a["h"], a["w"], abs(a["ids"]), return_log_normalizer=True, valid_vocab=7
    )
    return run, {"h": draw(_B, _L, _H), "w": draw(8, _H)}
  if name == "chunked_attention":
    ends = np.array([[3, 8, 2**30]] * 3 + [[1, 5, 12]], np.int32)
    run = lambda a: ops.chunked_attention(
      a["q"], a["k"], a["v"], ends, window=2, chunk_k=a["ck"], chunk_v=a["cv"]
    )
    arrays = {"q": draw(_B, _L, 4, 6)}
    arrays |= {name: draw(_B, _L, 2, 6) for name in ("k", "v")}
    return run, arrays | {name: draw(_B, 3, 2, 6) for name in ("ck", "cv")}
  run = lambda a: ring_attention(
    a["q"], a["k"], a["v"], texts=a["ids"], block_size=3
  )
  kv = (_B, _L, 2, 6)
  return run, {"q": draw(_B, _L, 4, 6), "k": draw(*kv), "v": draw(*kv)}


def _results(run, arrays, mesh=None):
  """Results and gradients as trees, and the compiled text."""
  like = jax.eval_shape(lambda a: run(a | {"ids": _IDS}), arrays)
  generator = np.random.default_rng(2)
  outer = jax.tree.map(lambda x: _draw(generator, *x.shape), like)

  def both(arrays, ids, outer):
    values, pull = jax.vjp(lambda a: run(a | {"ids": ids}), arrays)
    return values, pull(outer)[0]

  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return both(*args)

  where = None
  if mesh is not None:
    # Rows and their parts lie on their devices, so that what is counted below
    # is of the ops and not of moving arrays there and back.
    axes = {name: size for name, size in mesh.shape.items() if size > 1}

    def place(x):
      dims = ("batch", "length") if x.shape[:2] == (_B, _L) else ()
      dims += (None,) * (x.ndim - len(dims))
      return NamedSharding(mesh, sharding.spec(dims, x.shape, axes))

    given = arrays, _IDS, outer
    values = jax.tree.map(place, like)
    where = {
      "in_shardings": jax.tree.map(place, given),
      "out_shardings": (values, jax.tree.map(place, arrays)),
    }
  function = jax.jit(both if mesh is None else traced, **(where or {}))
  compiled = function.lower(arrays, _IDS, outer).compile()
  return compiled(arrays, _IDS, outer), compiled.as_text()


@functools.cache
def _alone(name):
  return _results(*_case(name))[0]


_NAMES = ("ssd", "selective_scan", "causal_conv1d", "rms_norm",
          "token_logprob", "ring_attention", "chunked_attention")  # fmt: skip


def _assert_same(name, found):
  for one, many in zip(
    jax.tree.leaves(_alone(name)), jax.tree.leaves(found), strict=True
  ):
    # Sums over 16 tokens and 4 rows in another order.
    scale = np.abs(one).max() * 64 * np.finfo(np.float32).eps
    np.testing.assert_allclose(many, one, rtol=0, atol=scale, err_msg=name)


@pytest.mark.parametrize("name", _NAMES)
def test_rows_heads_and_parts_of_rows_are_one_device(name):
  mesh = _mesh(data=2, sequence=2, tensor=2)
  found, _ = _results(*_case(name), mesh)
  _assert_same(name, found)


# Collectives forward and backward; gradients of what all devices share are one
# sum. States go to all devices at once, keys and edges to the next one.
@pytest.mark.parametrize(
  "name, counts",
  [
    ("ssd", {"all-gather": 1, "reduce-scatter": 1}),
    ("selective_scan", {"all-gather": 1, "reduce-scatter": 1}),
    ("causal_conv1d", {"collective-permute": 2}),
    ("rms_norm", {}),
    ("token_logprob", {}),
    # Keys, numbers of texts, and gradients of keys; three steps each.
    ("ring_attention", {"collective-permute": 9}),
  ],
)
def test_parts_of_rows_take_the_fewest_collectives(name, counts, optimized):
  run, arrays = _case(name)
  if scanned := name in ("ssd", "selective_scan", "causal_conv1d"):
    # Where texts begin is found in whole rows, which costs small gathers of
    # the ids; they are left out here.
    run = functools.partial(lambda run, a: run(a | {"ids": None}), run)
  found, text = _results(run, arrays, _mesh(sequence=4))
  if not scanned:
    _assert_same(name, found)
  kinds = ("all-gather", "reduce-scatter", "collective-permute", "all-to-all")
  seen = {k: len(re.findall(rf" {k}(?:-start)?\(", text)) for k in kinds}
  assert {k: n for k, n in seen.items() if n} == counts
  assert len(re.findall(r" all-reduce(?:-start)?\(", text)) <= 1


def test_without_a_mesh_nothing_is_cut():
  assert sharding.sizes() == {}
  x = np.ones((2, 2))
  assert sharding.constrain(x, "batch", None) is x


def test_what_does_not_divide_stays_whole():
  spec = sharding.spec(("batch", "heads"), (3, 4), {"data": 2, "tensor": 2})
  assert spec == PartitionSpec(None, "tensor")
  assert sharding.spec(("heads",), (5,), {"tensor": 2}) == PartitionSpec()


def test_ring_attention_refuses_heads_that_do_not_fit():
  q, k = np.ones((1, 4, 3, 2), np.float32), np.ones((1, 4, 2, 2), np.float32)
  with pytest.raises(ValueError, match="do not fit"):
    ring_attention(q, k, k)


def _quantized(name):
  x = np.ones((4, 2), np.float32)
  ops.quantized_matmul(x, x.T, implementation=name)


def _butterfly(name):
  x, twiddle = np.ones((4, 2), np.float32), np.ones((1, 1, 1, 1, 2, 2))
  ops.butterfly_matmul(x, twiddle.astype(np.float32), implementation=name)


@pytest.mark.parametrize(
  "run",
  [
    _quantized,
    _butterfly,
    lambda name: mamba2_step_api.resolve(implementation=name),
  ],
)
def test_kernels_of_one_device_are_refused_on_many(run):
  with jax.sharding.use_abstract_mesh(_mesh(data=2, tensor=2).abstract_mesh):
    with pytest.raises(dispatch.UnsupportedError) as told:
      run("mosaic_gpu")
  assert "runs on one device, and the mesh is data:2,tensor:2" in str(
    told.value
  )
  assert "usable: xla" in str(told.value)
