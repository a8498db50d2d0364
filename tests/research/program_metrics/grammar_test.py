import hashlib
import re

import jax
import numpy as np
import pytest

from research.program_metrics import grammar

COUNT = 1200
# Of the sources of seed 0. Where it changes, `grammar.VERSION` must too.
DIGEST = "2cf3acca64869914"


@pytest.fixture(scope="module")
def programs():
  return [grammar.program(0, index) for index in range(COUNT)]


def function(program):
  namespace = {}
  exec(compile(program.source, "<program>", "exec"), namespace)
  return namespace["f"], namespace["inputs"]


def covering(programs):
  """Programs that use every operator together, and few more."""
  missing = {*grammar.OPERATORS, grammar.GRADIENT}
  found = []
  for program in programs:
    if missing & {*program.operators}:
      missing -= {*program.operators}
      found.append(program)
  assert not missing
  return found


def test_programs_follow_from_seed_and_index(programs):
  text = "".join(program.source for program in programs[:200])
  assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGEST
  assert grammar.program(0, 7) == programs[7]
  assert grammar.program(1, 7).source != programs[7].source


def test_programs_differ_in_what_they_are_made_of(programs):
  assert len({program.source for program in programs}) == COUNT
  lengths = [len(program.operators) for program in programs]
  assert min(lengths) == 1 and max(lengths) >= 8
  dtypes = {i.dtype for p in programs for i in p.inputs.values()}
  assert dtypes == {"float32", "bfloat16", "float16", "int32"}
  sizes = [sum(np.prod(i.shape) for i in p.inputs.values()) for p in programs]
  low, high = np.percentile(sizes, [5, 95])
  assert low < 1000 and high > 200_000


def test_every_operator_writes_what_jax_takes(programs):
  for program in covering(programs):
    run, inputs = function(program)
    assert [*inputs] == [*program.inputs]
    for (shape, dtype, *bound), item in zip(
      inputs.values(), program.inputs.values()
    ):
      assert (shape, dtype) == (item.shape, item.dtype)
      assert bound == ([] if item.bound is None else [item.bound])
    shapes = [
      jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, *_ in inputs.values()
    ]
    # Elsewhere in these tests a vector does not meet a matrix by itself.
    with jax.numpy_rank_promotion("allow"):
      found = jax.eval_shape(run, *shapes)
    found = found if isinstance(found, tuple) else (found,)
    assert tuple((x.shape, str(x.dtype)) for x in found) == program.outputs, (
      program.source
    )


def test_every_input_is_used(programs):
  for program in programs[:300]:
    body = program.source.split("def ", 1)[1].split("\n", 1)[1]
    for name in program.inputs:
      assert name in body


def test_arguments_are_the_same_again_and_in_bounds(programs):
  program = next(
    p for p in programs
    if any(i.bound for i in p.inputs.values())
  )  # fmt: skip
  first, second = grammar.arguments(program), grammar.arguments(program)
  for item, a, b in zip(program.inputs.values(), first, second):
    np.testing.assert_array_equal(a, b)
    assert a.shape == item.shape
    if item.bound is not None:
      assert a.dtype == np.int32 and 0 <= a.min() and a.max() < item.bound


def test_the_typed_source_is_the_source_with_true_comments(programs):
  for program in covering(programs)[:12]:
    lines = program.typed.split("\n")
    assert "\n".join(line.split("  #")[0] for line in lines) == program.source
    run, inputs = function(program)
    shapes = [
      jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, *_ in inputs.values()
    ]
    with jax.numpy_rank_promotion("allow"):
      jaxpr = str(jax.make_jaxpr(run)(*shapes))
    for note in re.findall(r"[ax]\d+ ((?:b?f|i)\d+\[[\d,]*\])", program.typed):
      assert note in jaxpr
