"""The backward GPU kernel of the causal convolution."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ops.causal_conv1d import mosaic_gpu_walk as walks
from ops.causal_conv1d.mosaic_gpu_walk import Walk

NAME = "causal_conv1d_bwd"


def backward(
  operands: dict[str, jax.Array], *, walk: Walk, silu: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
  """Runs the kernel.

  With p_t the gradient of token t's preactivation,

    dx_t = sum_{k<K} tap_k p_{t+k}          dtap_k = sum_t p_t x_{t-k}

  A block walks forwards, finds p_t once, and holds the sums that dx of the last
  K-1 tokens has got so far. For those of its last tokens it also finds p of the
  K-1 tokens after them.

  Args:
    operands: x, dy and weight, and optionally bias, state and reach, as of
      `xla.convolve`.
    walk: How to cut the problem.
    silu: Whether SiLU was applied.
    interpret: Of `plgpu.kernel`.

  Returns:
    dx (B, L, D) in x's dtype, and in float32 the gradients of the weight's
    columns and, with bias, its own, (segments, B, K or K+1, D), yet to be
    summed over the blocks of a channel.
  """
  x, weight = operands["x"], operands["weight"]
  batch, length, channels = x.shape
  taps, names = weight.shape[1], tuple(operands)
  num_sums = taps + 1 if "bias" in operands else taps
  # Then the last block of a row begins inside of the one before.
  overlaps = length % walk.tokens > 0

  def body(*refs, taps_):
    *refs, dx, sums_out = refs
    given = dict(zip(names, refs, strict=True))
    segment = lax.axis_index("segment")
    row, first, own = walk.place(x)
    x_, dy_, dx_ = (
      ref.at[row, :, own] for ref in (given["x"], given["dy"], dx)
    )
    state_ = given["state"].at[row, :, own] if "state" in given else None

    def load_reach(token):
      return given["reach"][row, token] if "reach" in given else None

    def fetch(token):
      reach = [load_reach(token + k) for k in range(walk.rows)]
      loaded = walk.load_rows(x_, token), walk.load_rows(dy_, token), reach
      return list(zip(*loaded, strict=True))

    def fetch_after(now):
      """The K-1 tokens after the block, in place of any others."""
      found = []
      for k in range(taps - 1):
        token = jnp.minimum(end + k, length - 1)
        found.append(
          (walk.load(x_.at[token]), walk.load(dy_.at[token]), load_reach(token))
        )
      return found + now[taps - 1 :]

    def differentiate(loaded, before):
      """Returns a token's inputs, newest first, and its p.

      It is divided by what the taps are multiplied by, and so are its sums.
      """
      values, dy, reach = loaded
      inputs = [values.astype(jnp.float32), *before]
      dpre = dy.astype(jnp.float32)
      if silu:
        pre = walks.preactivation(inputs, weights, bias, reach)
        dpre = walks.slope(pre, dpre, walk.gate)
      return inputs, walks.seen(dpre, reach, 0)

    def spread(dpre, reach, partial):
      """Adds a token's p to dx, of which one is then complete."""
      parts = [
        walks.seen(dpre, reach, back) * tap for back, tap in enumerate(weights)
      ]
      partial = [p + part for p, part in zip(partial, parts[1:], strict=True)]
      return parts[:1] + partial[:-1], partial[-1].astype(x.dtype)

    def collect(token, inputs, dpre, reach, sums):
      """Adds a token's share to the sums, unless another block does that."""
      if overlaps:
        dpre = jnp.where(token >= segment * walk.tokens, dpre, 0.0)
      shares = [
        walks.seen(dpre, reach, back) * values
        for back, values in enumerate(inputs)
      ]
      if bias is not None:
        shares.append(dpre)
      return [s + share for s, share in zip(sums, shares, strict=True)]

    def store(token, done, address):
      """Writes dx of a token, unless another block does that."""
      if not overlaps:
        address()[...] = done
        return

      @pl.when(token >= segment * walk.tokens)
      def _():
        dx_[token] = done

    def some_tokens(step, carry):
      before, partial, sums, now = carry
      token = first + step * walk.rows
      following = lax.cond(
        step + 1 < walk.steps,
        lambda now: fetch(token + walk.rows),
        fetch_after,
        now,
      )
      early = []
      for k, loaded in enumerate(now):
        reach = loaded[-1]
        inputs, dpre = differentiate(loaded, before)
        sums = collect(token + k, inputs, dpre, reach, sums)
        partial, done = spread(dpre, reach, partial)
        ago = taps - 1 - k
        if ago <= 0:
          # One address serves for all tokens of a step.
          near = dx_.at[pl.ds(token, walk.rows)]
          store(token - ago, done, lambda near=near, ago=ago: near.at[-ago])
        else:
          early.append(done)
        before = inputs[:-1]

      @pl.when(step > 0)
      def _():
        first = token - taps + 1
        near = dx_.at[pl.ds(first, taps - 1)]
        for k, done in enumerate(early):
          store(first + k, done, lambda k=k: near.at[k])

      return before, partial, sums, following

    end = first + walk.tokens
    now = fetch(first)
    before = walk.load_before(x_, state_, first, taps)
    bias, weights = walk.load_weights(given, own, taps_, silu)
    partial, sums = [walk.zeros()] * (taps - 1), [walk.zeros()] * num_sums
    before, partial, sums, after = lax.fori_loop(
      0, walk.steps, some_tokens, (before, partial, sums, now)
    )
    for k, loaded in enumerate(after[: taps - 1]):
      inputs, dpre = differentiate(loaded, before)
      dpre = jnp.where(end + k < length, dpre, 0.0)
      partial, done = spread(dpre, loaded[-1], partial)
      token = end + k - taps + 1
      store(token, done, lambda token=token: dx_.at[token])
      before = inputs[:-1]
    columns = [*sums[:taps][::-1], *sums[taps:]]
    for i, total in enumerate(columns):
      sums_out[segment, row, i, own] = total * walk.scale(silu)

  kernel = walk.kernel(
    body,
    x,
    taps,
    NAME,
    out_type=[
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct(
        (walk.segments(length), batch, num_sums, channels), jnp.float32
      ),
    ],
    interpret=interpret,
  )
  return tuple(kernel(*operands.values()))
