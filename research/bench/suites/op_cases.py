"""What a benchmark times: ops on the shapes of published models.

Axis letters: B batch, L length, D channels, H heads, P channels a head, G
groups, N state size, K taps, E width, V vocabulary.

The least work of a case is its inputs and outputs, read and written once; and,
each counted with the recurrence itself, not with what a parallel form adds:

  selective_scan   N exponentials a channel and token, forward and backward
  ssd              4 N P FLOPs a head and token, backward 10 N P
  token_logprob    2 E V FLOPs and V exponentials a token, backward 6 E V
  quantized_matmul 2 C D FLOPs a token, C channels and D features
  butterfly_matmul 4 E log2 E FLOPs a token, backward twice as many; and the
                   same of every butterfly of a feed-forward layer
  monarch_matmul   4 E B FLOPs a token, B channels a block, backward twice
  chunked_attention 4 P FLOPs and an exponential a head, token and key that it
                   sees, backward 10 P
  chunked_attention_step the same of one token, 4 P FLOPs and an exponential a
                   head and key
  paged_sparse_attention 4 P FLOPs and an exponential a head and slot of a page
                   that is kept, and 4 P a head and page; its bytes are those
                   of all summaries, and of the kept pages
  fourier_mix      2.5 E log2(L E) FLOPs a token, a real FFT's, backward too
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.errors import InputError
from ops.butterfly_matmul import (
  butterfly_matmul,
  butterfly_matmul_reference,
  twiddle_shape,
)
from ops.causal_conv1d import (
  causal_conv1d,
  causal_conv1d_reference,
  causal_conv1d_step,
)
from ops.chunked_attention import (
  chunked_attention,
  chunked_attention_reference,
  chunked_attention_step,
  chunked_attention_step_reference,
)
from ops.fourier_mix import fourier_mix
from ops.monarch_matmul import monarch_matmul, monarch_matmul_reference
from ops.paged_sparse_attention import (
  PageSummary,
  page_summary,
  paged_sparse_attention,
  paged_sparse_attention_reference,
)
from ops.quantized import QTensor, dequantize, formats, quantize
from ops.quantized_matmul import quantized_matmul, quantized_matmul_reference
from ops.rms_norm import rms_norm, rms_norm_reference
from ops.selective_scan import (
  selective_scan,
  selective_scan_reference,
  selective_scan_step,
)
from ops.ssd import ssd, ssd_reference, ssd_step
from ops.token_logprob import token_logprob, token_logprob_reference
from research.bench.peers import plain
from research.cost.roofline import Phase
from research.cost.sizes import nbytes

type Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """The axes of a model; those of a head and of N differ between its ops.

  Attributes:
    width: E.
    channels: D.
    scan_state: N of `selective_scan`.
    head: P.
    ssd_state: N of `ssd`.
    vocab: V.
    taps: K.
    group: heads that share keys.
  """

  width: int
  channels: int
  scan_state: int
  head: int
  ssd_state: int
  vocab: int
  taps: int = 4
  group: int = 1


def _published(width: int) -> Size:
  """The size of this width as Mamba and Mamba-2 were published."""
  return Size(
    width=width,
    channels=2 * width,
    scan_state=16,
    head=64,
    ssd_state=128,
    vocab=50280,
  )


SIZES = {
  "tiny": Size(
    width=32,
    channels=64,
    scan_state=4,
    head=16,
    ssd_state=8,
    vocab=300,
    group=2,
  ),
  "130m": _published(768),
  "370m": _published(1024),
  "1.3b": _published(2048),
  "2.8b": _published(2560),
  # Products are compared at square matrices of these widths.
  **{
    str(width): dataclasses.replace(_published(width), channels=width)
    for width in (128, 256, 512, 1024, 2048, 4096, 8192)
  },
  # Attention of Llama-3.2-1B and Llama-3.1-8B.
  **{
    name: dataclasses.replace(
      _published(width), channels=width, head=width // 32, group=4
    )
    for name, width in (("llama3_2_1b", 2048), ("llama3_1_8b", 4096))
  },
  # The widest product of a model of 70 billion parameters.
  "8192x28672": dataclasses.replace(_published(28672), channels=8192),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCase:
  """One op on one shape.

  Attributes:
    op: its name.
    function: the op itself.
    shape: for people.
    arrays: its arrays by name; `call` passes them on.
    sequences: names of those that begin with (B, L).
    batched: names of those that begin with B alone.
    call: (arrays, implementation) to outputs, y first.
    reference: arrays in NumPy to y in float64.
    plain: arrays to y by plain JAX, or None.
    others: what one would take instead, by the peer's name: arrays to a y that
      is not this one.
    plain_arrays: makes the arrays that `plain` takes, where they are others.
    flops: of the forward and of the backward.
    exps: of the forward and of the backward.
    read: bytes of the arrays that have to be read; None for all.
    differentiable: whether it is timed backward.
  """

  op: str
  function: Callable[..., Any]
  shape: str
  arrays: Arrays
  sequences: frozenset[str]
  batched: frozenset[str] = frozenset()
  call: Callable[[Arrays, str | None], Any]
  reference: Callable[[Mapping[str, np.ndarray]], np.ndarray]
  plain: Callable[[Arrays], jax.Array] | None = None
  others: Mapping[str, Callable[[Arrays], jax.Array]] = dataclasses.field(
    default_factory=dict
  )
  plain_arrays: Callable[[], Arrays] | None = None
  flops: tuple[float, float] = (0.0, 0.0)
  exps: tuple[float, float] = (0.0, 0.0)
  read: float | None = None
  differentiable: bool = True

  def prefix(self, tokens: int) -> Arrays:
    """The arrays of the first row's first tokens."""
    cut = {}
    for name, value in self.arrays.items():
      if name in self.sequences:
        value = value[:1, :tokens]
      cut[name] = value[:1] if name in self.batched else value
    return cut

  def phases(self, which: str) -> tuple[Phase, ...]:
    """The least work of the pass "fwd", "bwd" or "fwd+bwd"."""
    outputs = jax.eval_shape(
      lambda arrays: self.call(arrays, None), self.arrays
    )
    gradients = floating(self.arrays)
    read = nbytes(self.arrays) if self.read is None else self.read
    moved = read + nbytes(outputs)
    forward = Phase(self.flops[0], moved, self.exps[0])
    backward = Phase(self.flops[1], moved + nbytes(gradients), self.exps[1])
    both = {"fwd": (forward,), "bwd": (backward,)}
    return both.get(which, (forward, backward))


def floating(arrays: Arrays) -> Arrays:
  """Those that have gradients."""
  return {
    name: value
    for name, value in arrays.items()
    if not isinstance(value, QTensor)
    and jnp.issubdtype(value.dtype, jnp.floating)
  }


def build(op: str, shape: str, dtype: str) -> OpCase:
  """Draws the arrays of an op.

  Args:
    op: a key of `BUILDERS`.
    shape: "SIZE:BxL", SIZE a key of `SIZES`.
    dtype: of activations; parameters are float32.

  Raises:
    InputError: there is no such op or shape.
  """
  if op not in BUILDERS:
    raise InputError(f"ops={op}: take from {', '.join(BUILDERS)}")
  name, _, axes = shape.partition(":")
  batch, _, length = axes.partition("x")
  whole = batch.isdigit() and length.isdigit()
  if name not in SIZES or not whole or min(int(batch), int(length)) < 1:
    raise InputError(
      f"shapes={shape}: write SIZE:BxL, such as tiny:2x64, with SIZE one of "
      f"{', '.join(SIZES)}"
    )
  draw = _Draw(dtype)
  return BUILDERS[op](SIZES[name], int(batch), int(length), draw)


class _Draw:
  """Random arrays, drawn on the host: nothing to compile."""

  def __init__(self, dtype: str):
    self.dtype, self._rng = dtype, np.random.default_rng(0)

  def __call__(self, *shape: int, scale: float = 1.0) -> jax.Array:
    values = self._rng.standard_normal(shape, np.float32)
    return jnp.asarray(scale * values, self.dtype)

  def parameter(self, *shape: int) -> jax.Array:
    return jnp.asarray(self._rng.standard_normal(shape, np.float32))

  def integers(self, below: int, *shape: int) -> jax.Array:
    return jnp.asarray(self._rng.integers(below, size=shape, dtype=np.int32))


_EPS = 1e-5
# Time steps of about softplus(-3) = 0.05, as Mamba begins with.
_DT_BIAS = -3.0


def _scan_arrays(size: Size, batch: int, length: int, draw: _Draw) -> Arrays:
  d, n = size.channels, size.scan_state
  decay = np.arange(1, n + 1, dtype=np.float32)
  return {
    "x": draw(batch, length, d),
    "dt": draw(batch, length, d),
    "A": jnp.asarray(np.tile(-decay, (d, 1))),
    "B": draw(batch, length, 1, n),
    "C": draw(batch, length, 1, n),
    "D": draw.parameter(d),
    "z": draw(batch, length, d),
    "dt_bias": jnp.asarray(np.full(d, _DT_BIAS, np.float32)),
  }


def _ssd_arrays(size: Size, batch: int, length: int, draw: _Draw) -> Arrays:
  h, n = size.channels // size.head, size.ssd_state
  return {
    "x": draw(batch, length, h, size.head),
    "dt": draw(batch, length, h),
    "A": jnp.asarray(-np.linspace(1.0, 16.0, h, dtype=np.float32)),
    "B": draw(batch, length, 1, n),
    "C": draw(batch, length, 1, n),
    "D": draw.parameter(h),
    "dt_bias": jnp.asarray(np.full(h, _DT_BIAS, np.float32)),
  }


def _conv_arrays(size: Size, batch: int, length: int, draw: _Draw) -> Arrays:
  return {
    "x": draw(batch, length, size.channels),
    "weight": draw.parameter(size.channels, size.taps),
    "bias": draw.parameter(size.channels),
  }


def _selective_scan(size, batch, length, draw):
  d, n = size.channels, size.scan_state
  # Softplus takes an exponential and a logarithm a channel, and SiLU an
  # exponential, beside N of the decays.
  exps = float(batch * length * d * (n + 3))
  return OpCase(
    op="selective_scan",
    function=selective_scan,
    shape=f"B{batch} L{length} D{d} G1 N{n}",
    arrays=_scan_arrays(size, batch, length, draw),
    sequences=frozenset({"x", "dt", "B", "C", "z"}),
    call=lambda arrays, implementation: selective_scan(
      **arrays, dt_softplus=True, implementation=implementation
    ),
    reference=lambda a: selective_scan_reference(**a, dt_softplus=True),
    plain=plain.selective_scan,
    exps=(exps, exps),
  )


def _ssd(size, batch, length, draw):
  h, p, n = size.channels // size.head, size.head, size.ssd_state
  product = float(batch * length * h * p * n)
  exps = 3.0 * batch * length * h
  return OpCase(
    op="ssd",
    function=ssd,
    shape=f"B{batch} L{length} H{h} P{p} G1 N{n}",
    arrays=_ssd_arrays(size, batch, length, draw),
    sequences=frozenset({"x", "dt", "B", "C"}),
    call=lambda arrays, implementation: ssd(
      **arrays, dt_softplus=True, implementation=implementation
    ),
    reference=lambda a: ssd_reference(**a, dt_softplus=True),
    plain=plain.ssd,
    flops=(4 * product, 10 * product),
    exps=(exps, exps),
  )


def _causal_conv1d(size, batch, length, draw):
  exps = float(batch * length * size.channels)
  return OpCase(
    op="causal_conv1d",
    function=causal_conv1d,
    shape=f"B{batch} L{length} D{size.channels} K{size.taps}",
    arrays=_conv_arrays(size, batch, length, draw),
    sequences=frozenset({"x"}),
    call=lambda arrays, implementation: causal_conv1d(
      **arrays, activation="silu", implementation=implementation
    ),
    reference=lambda a: causal_conv1d_reference(**a, activation="silu"),
    plain=plain.causal_conv1d,
    exps=(exps, exps),
  )


def _rms_norm(size, batch, length, draw):
  """Mamba-2's gated norm."""
  exps = float(batch * length * size.channels)
  return OpCase(
    op="rms_norm",
    function=rms_norm,
    shape=f"B{batch} L{length} C{size.channels} gated",
    arrays={
      "x": draw(batch, length, size.channels),
      "gate": draw(batch, length, size.channels),
      "scale": draw.parameter(size.channels),
    },
    sequences=frozenset({"x", "gate"}),
    call=lambda arrays, implementation: rms_norm(
      **arrays, eps=_EPS, implementation=implementation
    ),
    reference=lambda a: rms_norm_reference(**a, eps=_EPS),
    plain=lambda arrays: plain.gated_rms_norm(arrays, _EPS),
    exps=(exps, exps),
  )


def _token_logprob(size, batch, length, draw):
  product = 2.0 * batch * length * size.width * size.vocab
  exps = float(batch * length * size.vocab)
  return OpCase(
    op="token_logprob",
    function=token_logprob,
    shape=f"B{batch} L{length} E{size.width} V{size.vocab}",
    arrays={
      "hidden": draw(batch, length, size.width),
      # A product of E terms of variance 1/E each gives logits of about one.
      "weight": draw(size.vocab, size.width, scale=size.width**-0.5),
      "targets": draw.integers(size.vocab, batch, length),
    },
    sequences=frozenset({"hidden", "targets"}),
    call=lambda arrays, implementation: token_logprob(
      **arrays, implementation=implementation
    ),
    reference=lambda arrays: token_logprob_reference(**arrays)[0],
    plain=plain.token_logprob,
    flops=(product, 3 * product),
    exps=(exps, exps),
  )


# Formats of weights and activations by their usual names.
_PRODUCTS = {
  "bf16": (None, None),
  "w8a16": ("int8:128", None),
  "w4a16": ("int4:128", None),
  "w8a8": ("int8:row", "int8:row"),
  "w4a8": ("int4:128", "int8:row"),
  "w4a8_columns": ("int4:row", "int8:row"),
  # Levels that are looked up: of one table, of blocks that choose one level,
  # with scales of a second level, and in small blocks. Other tables take the
  # same time.
  "nf4": ("nf4", None),
  "fp4_ea": ("fp4_ea", None),
  "bitmod4": ("bitmod4", None),
  "mxfp4": ("mxfp4", None),
  "razer4": ("razer4", None),
}


def _quantized_matmul(name, size, batch, length, draw):
  """Mamba-2's `out_proj`."""
  depth, width = size.channels, size.width
  weights, activations = _PRODUCTS[name]
  x = draw(batch, length, depth)
  w = draw(width, depth, scale=depth**-0.5)
  if weights is not None:
    form = formats.get(weights)
    if isinstance(form.group, int):
      form = dataclasses.replace(form, group=math.gcd(form.group, depth))
    w = quantize(w, form)
  if activations is not None:
    x = quantize(x, activations)

  def dense(v):
    return dequantize(v, dtype=draw.dtype) if isinstance(v, QTensor) else v

  return OpCase(
    op="quantized_matmul",
    function=quantized_matmul,
    shape=f"B{batch} L{length} C{depth} D{width} {name}",
    arrays={"x": x, "w": w},
    sequences=frozenset({"x"}),
    call=lambda arrays, implementation: quantized_matmul(
      arrays["x"],
      arrays["w"].T,
      dtype=jnp.dtype(draw.dtype),
      implementation=implementation,
    ),
    reference=lambda a: quantized_matmul_reference(a["x"], a["w"].T),
    plain=lambda a: jnp.matmul(dense(a["x"]), dense(a["w"].T)),
    flops=(2.0 * batch * length * depth * width, 0.0),
    differentiable=False,
  )


def _structured(op, function, reference, shape, x, weights, macs):
  """A product of rows with a matrix that has few parameters.

  Its plain form is the product with the whole matrix, whose own gradient is
  one more, as that of the parameters is.
  """

  def call(arrays, implementation):
    return function(**arrays, implementation=implementation)

  def whole():
    weight = function(jnp.eye(x.shape[-1]), **weights)
    return {"x": x, "weight": weight.astype(x.dtype)}

  tokens = float(x.shape[0] * x.shape[1])
  return OpCase(
    op=op,
    function=function,
    shape=f"B{x.shape[0]} L{x.shape[1]} {shape}",
    arrays={"x": x, **weights},
    sequences=frozenset({"x"}),
    call=call,
    reference=lambda arrays: reference(**arrays),
    plain=lambda arrays: arrays["x"] @ arrays["weight"],
    plain_arrays=whole,
    flops=(2 * tokens * macs, 4 * tokens * macs),
  )


def _butterfly_matmul(size, batch, length, draw):
  width = size.width
  shape = twiddle_shape(width, width)
  return _structured(
    "butterfly_matmul",
    butterfly_matmul,
    butterfly_matmul_reference,
    f"E{width}",
    draw(batch, length, width),
    # Each stage adds two products, so that twiddles of variance 1/2 keep the
    # values at about one.
    {"twiddle": 0.5**0.5 * draw.parameter(*shape)},
    2.0 * width * shape[2],
  )


# Hidden channels of a feed-forward layer by those of the model.
_EXPANSION = 4


def _butterfly_ffn(size, batch, length, draw):
  """FABNet's feed-forward layer: a stack of butterflies, GELU, and one back."""
  width, hidden = size.width, _EXPANSION * size.width
  x = draw(batch, length, width)
  shapes = twiddle_shape(width, hidden), twiddle_shape(hidden, width)
  up, down = (0.5**0.5 * draw.parameter(*shape) for shape in shapes)
  macs = 2.0 * hidden * (shapes[0][2] + shapes[1][2])
  tokens = float(batch * length)

  def call(arrays, implementation):
    product = functools.partial(butterfly_matmul, implementation=implementation)
    y = jax.nn.gelu(product(arrays["x"], arrays["up"]))
    return product(y, arrays["down"], out_features=width)

  def reference(arrays):
    y = butterfly_matmul_reference(arrays["x"], arrays["up"])
    inner = np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)
    y = 0.5 * y * (1 + np.tanh(inner))
    return butterfly_matmul_reference(y, arrays["down"], out_features=width)

  def whole():
    first = butterfly_matmul(jnp.eye(width), up)
    second = butterfly_matmul(jnp.eye(hidden), down, out_features=width)
    return {"x": x, "up": first.astype(x.dtype), "down": second.astype(x.dtype)}

  return OpCase(
    op="butterfly_ffn",
    function=butterfly_matmul,
    shape=f"B{batch} L{length} E{width} hidden {hidden}",
    arrays={"x": x, "up": up, "down": down},
    sequences=frozenset({"x"}),
    call=call,
    reference=reference,
    plain=lambda a: jax.nn.gelu(a["x"] @ a["up"]) @ a["down"],
    plain_arrays=whole,
    flops=(2 * tokens * macs, 4 * tokens * macs),
  )


def _monarch_matmul(size, batch, length, draw):
  blocks = 1 << round(np.log2(size.width) / 2)
  each = size.width // blocks
  factor = lambda: each**-0.5 * draw.parameter(blocks, each, each)
  return _structured(
    "monarch_matmul",
    monarch_matmul,
    monarch_matmul_reference,
    f"E{size.width} of {blocks} blocks",
    draw(batch, length, size.width),
    {"first": factor(), "second": factor()},
    2.0 * size.width * each,
  )


def _fourier_mix(size, batch, length, draw):
  values = batch * length * size.width
  flops = 2.5 * values * float(np.log2(length * size.width))

  def exact(arrays):
    return np.fft.fftn(arrays["x"], axes=(-2, -1)).real

  return OpCase(
    op="fourier_mix",
    function=fourier_mix,
    shape=f"B{batch} L{length} E{size.width}",
    arrays={"x": draw(batch, length, size.width)},
    # No array is cut in length for the float64 reference, since the transform
    # mixes all tokens of a row: those of a shorter row have other results.
    sequences=frozenset(),
    batched=frozenset({"x"}),
    call=lambda arrays, implementation: fourier_mix(
      **arrays, implementation=implementation
    ),
    reference=exact,
    plain=plain.fourier_mix,
    flops=(flops, flops),
  )


# Attamba's P and L; a head sees 7.75 times fewer keys of 32,768 tokens.
_CHUNK, _WINDOW = 8, 64


def _chunked_attention(size, batch, length, draw):
  heads, p = size.channels // size.head, size.head
  window, chunk = min(_WINDOW, length // 4), min(_CHUNK, length // 4)
  ends = np.arange(chunk - 1, length, chunk, dtype=np.int32)
  # Keys that a query sees, summed over the queries of a row.
  keys = np.minimum(np.arange(length), window).sum() + length
  keys += np.maximum(length - ends - window - 1, 0).sum()
  seen = float(batch * heads * keys)
  options = {"window": window}
  arrays = ("q", "k", "v")
  return OpCase(
    op="chunked_attention",
    function=chunked_attention,
    shape=f"B{batch} L{length} H{heads} P{p} chunk {chunk} window {window}",
    arrays={
      **{name: draw(batch, length, heads, p) for name in arrays},
      "ends": jnp.asarray(np.tile(ends, (batch, 1))),
    },
    sequences=frozenset(arrays),
    batched=frozenset({"ends"}),
    call=lambda arrays, implementation: chunked_attention(
      **arrays, **options, implementation=implementation
    ),
    reference=lambda a: chunked_attention_reference(**a, **options),
    plain=functools.partial(plain.chunked_attention, window=window),
    others={
      "causal_attention": plain.causal_attention,
      "sliding_window": functools.partial(
        plain.causal_attention, window=window
      ),
    },
    flops=(4 * seen * p, 10 * seen * p),
    exps=(seen, seen),
  )


def _chunked_attention_step(size, batch, length, draw):
  """One token behind `length` others, in the first of two layers of caches."""
  heads, p = size.channels // size.head, size.head
  window, chunk = min(_WINDOW, length // 4), min(_CHUNK, length // 4)
  chunks = length // chunk
  cache = lambda slots: draw(2, batch, slots, heads, p)
  counts = {"chunks": chunks, "near": window}
  arrays = {
    **{name: draw(batch, heads, p) for name in ("q", "k", "v")},
    **{name: cache(chunks) for name in ("chunk_k", "chunk_v")},
    **{name: cache(window) for name in ("ring_k", "ring_v")},
    **{name: jnp.full((batch,), x, jnp.int32) for name, x in counts.items()},
  }
  keys = float(batch * heads * (chunks + window + 1))
  return OpCase(
    op="chunked_attention_step",
    function=chunked_attention_step,
    shape=f"B{batch} S{length} H{heads} P{p} chunk {chunk} window {window}",
    arrays=arrays,
    sequences=frozenset(),
    # Of caches the first layer is kept, of the others the first row: that is
    # what the reference reads.
    batched=frozenset(arrays),
    call=lambda arrays, implementation: chunked_attention_step(
      **arrays, layer=0, implementation=implementation
    ),
    reference=lambda a: chunked_attention_step_reference(**a, layer=0),
    flops=(4 * p * keys, 0.0),
    exps=(keys, 0.0),
    # Keys and values that are seen, of one layer, and the query.
    read=arrays["q"].dtype.itemsize * (2 * p * keys + batch * heads * p),
    differentiable=False,
  )


# Slots of a page, and how many pages there are to one that is kept.
_PAGE, _PAGES_OF_KEPT = 16, 4


def _paged_sparse_attention(size, batch, length, draw):
  """One token, of which a quarter of the pages holds what its queries seek.

  So rounding does not decide which pages are kept, be there thousands. The page
  of the token is summarized anew, as every step of decoding has to.
  """
  heads, p = size.channels // size.head, size.head
  kv_heads, page = heads // size.group, min(_PAGE, length // 4)
  pages, rng = length // page, np.random.default_rng(1)
  kept = max(pages // _PAGES_OF_KEPT, 2)
  q = draw(batch, heads, p)
  # The first and the last page are kept in any case.
  order = rng.random((batch, pages, kv_heads))
  order[:, [0, -1]] = -1
  sought = order.argsort(axis=1).argsort(axis=1) < kept
  middle = (
    np.asarray(q, np.float32).reshape(batch, kv_heads, -1, p).mean(axis=2)
  )
  keys = rng.standard_normal((batch, pages, page, kv_heads, p), np.float32)
  keys += 4 * sought[:, :, None, :, None] * middle[:, None, None]
  keys = jnp.asarray(keys.reshape(batch, length, kv_heads, p), draw.dtype)
  lengths = jnp.full((batch,), length, jnp.int32)
  summary = page_summary(keys, lengths, page_size=page)
  arrays = {
    "q": q,
    "keys": keys,
    "values": draw(batch, length, kv_heads, p),
    "first": summary.first,
    "second": summary.second,
    "lengths": lengths,
    "num_pages": jnp.full((batch,), kept, jnp.int32),
  }

  def given(arrays):
    rest = dict(arrays)
    parts = rest.pop("first"), rest.pop("second")
    return rest | {"summary": PageSummary(*parts, "bounds")}

  scores = float(batch * heads * kept * page)
  cache = nbytes(keys) / pages
  return OpCase(
    op="paged_sparse_attention",
    function=paged_sparse_attention,
    shape=f"B{batch} S{length} H{heads}/{kv_heads} P{p} pages {kept}/{pages}",
    arrays=arrays,
    sequences=frozenset(),
    batched=frozenset(arrays),
    call=lambda arrays, implementation: paged_sparse_attention(
      **given(arrays),
      max_pages=kept,
      summarize=True,
      implementation=implementation,
    ),
    reference=lambda a: paged_sparse_attention_reference(
      **given(a), max_pages=kept
    ),
    others={
      "cudnn_attention": functools.partial(
        plain.token_attention, implementation="cudnn"
      ),
      "xla_attention": functools.partial(
        plain.token_attention, implementation="xla"
      ),
    },
    flops=(4 * p * (scores + batch * heads * pages), 0.0),
    exps=(scores, 0.0),
    read=nbytes(q) + nbytes(summary) + 2 * kept * cache,
    differentiable=False,
  )


def _step(op, function, reference, arrays, state, sequences, call, **more):
  def in_float64(arrays):
    rest = {name: v for name, v in arrays.items() if name != "state"}
    return reference(rest, arrays["state"])

  batch = state.shape[0]
  return OpCase(
    op=op,
    function=function,
    shape=f"B{batch} T1 state {'x'.join(map(str, state.shape[1:]))}",
    arrays=dict(arrays) | {"state": state},
    sequences=frozenset(sequences),
    batched=frozenset({"state"}),
    call=call,
    reference=in_float64,
    differentiable=False,
    **more,
  )


def _selective_scan_step(size, batch, length, draw):
  state = draw.parameter(batch, size.channels, size.scan_state)
  return _step(
    "selective_scan_step",
    selective_scan_step,
    lambda a, s: selective_scan_reference(
      **a, dt_softplus=True, initial_state=s
    ),
    _scan_arrays(size, batch, 1, draw),
    state,
    {"x", "dt", "B", "C", "z"},
    lambda arrays, implementation: selective_scan_step(
      **arrays, dt_softplus=True, implementation=implementation
    ),
    exps=(float(state.size + 3 * batch * size.channels), 0.0),
  )


def _ssd_step(size, batch, length, draw):
  heads = size.channels // size.head
  state = draw.parameter(batch, heads, size.head, size.ssd_state)
  return _step(
    "ssd_step",
    ssd_step,
    lambda a, s: ssd_reference(**a, dt_softplus=True, initial_state=s),
    _ssd_arrays(size, batch, 1, draw),
    state,
    {"x", "dt", "B", "C"},
    lambda arrays, implementation: ssd_step(
      **arrays, dt_softplus=True, implementation=implementation
    ),
    exps=(3.0 * batch * heads, 0.0),
  )


def _causal_conv1d_step(size, batch, length, draw):
  return _step(
    "causal_conv1d_step",
    causal_conv1d_step,
    lambda a, s: causal_conv1d_reference(
      **a, activation="silu", initial_state=s
    ),
    _conv_arrays(size, batch, 1, draw),
    draw(batch, size.taps - 1, size.channels),
    {"x"},
    lambda arrays, implementation: causal_conv1d_step(
      **arrays, activation="silu", implementation=implementation
    ),
    exps=(float(batch * size.channels), 0.0),
  )


BUILDERS = {
  "selective_scan": _selective_scan,
  "ssd": _ssd,
  "causal_conv1d": _causal_conv1d,
  "rms_norm": _rms_norm,
  "token_logprob": _token_logprob,
  **{
    f"quantized_matmul_{name}": functools.partial(_quantized_matmul, name)
    for name in _PRODUCTS
  },
  "butterfly_matmul": _butterfly_matmul,
  "butterfly_ffn": _butterfly_ffn,
  "monarch_matmul": _monarch_matmul,
  "fourier_mix": _fourier_mix,
  "chunked_attention": _chunked_attention,
  "chunked_attention_step": _chunked_attention_step,
  "paged_sparse_attention": _paged_sparse_attention,
  "selective_scan_step": _selective_scan_step,
  "ssd_step": _ssd_step,
  "causal_conv1d_step": _causal_conv1d_step,
}
