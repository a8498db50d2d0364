"""Cases of prefill: rows of random tokens, read from an empty state.

Timed is all that comes before the first token is drawn: states and caches of
the prompt, and the logits behind its last token. The least work are the
products of the forward pass, with the head once a row, at the rate of bfloat16,
and to read the weights once, in the bits that they are kept in.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import language_model
from research.bench import specs
from research.bench.case import Call, Case
from research.bench.suites import decoding
from research.bench.suites.decoding import Decoding
from research.cost import language_model as cost
from research.cost import recurrent_step
from research.cost.roofline import Phase


def parse(spec: str, **options: Any) -> Decoding:
  """What "MODEL:BATCHxTOKENS" asks for, with the tokens as its context.

  Args:
    spec: such as mamba2_130m:1x1024.
    **options: more of `Decoding`.

  Raises:
    InputError: it is not written so, or there is no such model.
  """
  name, config, batch, length = specs.prompted(spec)
  return Decoding(
    name=name, config=config, batch=batch, context=length, **options
  )


def case(what: Decoding) -> Case:
  """The case of one model and prompt."""
  make = functools.partial(decoding.initial, what.config, what.weights_format)
  params = jax.eval_shape(make)
  work = cost.forward(what.config, what.context)
  flops = what.batch * (
    what.context * (work["layers"] + work["mixing"]) + work["head"]
  )
  bytes_read = recurrent_step.least_work(params, (), what.batch).bytes
  return Case(
    op="prefill",
    model=what.name,
    shape=f"B{what.batch} L{what.context}",
    dtype="bfloat16",
    which="fwd",
    phases=(Phase(flops, bytes_read),),
    ours={"default": functools.partial(_call, what)},
    amounts={"tokens": what.batch * what.context},
    columns=decoding.formats_of(what),
  )


def _call(what: Decoding) -> Call:
  params = decoding.initial(what.config, what.weights_format)
  shape = what.batch, what.context
  tokens = jax.random.randint(jax.random.key(0), shape, 0, specs.VOCAB)
  lengths = jnp.full((what.batch,), what.context, jnp.int32)

  @jax.jit
  def read(params, tokens, lengths):
    hidden, state = language_model.prefill(
      what.config,
      params,
      tokens,
      lengths,
      cache_size=what.context,
      state_format=decoding.own_state_format(what),
    )
    return language_model.logits(what.config, params, hidden[:, -1:]), state

  return Call(start=functools.partial(read, params, tokens, lengths))
