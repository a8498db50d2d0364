import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.program_metrics import grammar, measure
from research.program_metrics.grammar import Input, Program

SOURCE = """import jax
import jax.numpy as jnp

inputs = {
  "a1": ((32, 16), "float32"),
}


def f(a1):
  x1 = jnp.tanh(a1 @ a1.T)
  return x1
"""
MADE = Program(
  index=3,
  source=SOURCE,
  typed=SOURCE,
  inputs={"a1": Input((32, 16), "float32")},
  operators=("matmul", "tanh"),
  outputs=(((32, 32), "float32"),),
)


@pytest.fixture(scope="module")
def compiled():
  return measure.compile_program(MADE)


def test_counts_are_those_of_the_arithmetic(compiled):
  row = compiled.row
  assert row["flops"] == 2 * 32 * 32 * 16
  assert row["transcendentals"] == 32 * 32
  assert row["argument_bytes"] == 32 * 16 * 4
  assert row["output_bytes"] == 32 * 32 * 4
  assert row["peak_bytes"] >= row["argument_bytes"] + row["output_bytes"]
  assert row["bytes_accessed"] >= row["argument_bytes"] + row["output_bytes"]
  assert (row["index"], row["operators"]) == (3, "matmul tanh")


def test_the_views_are_of_the_program(compiled):
  assert compiled.row["source"] == SOURCE
  assert "tanh" in compiled.row["jaxpr"]
  assert "stablehlo.tanh" in compiled.row["stablehlo"]


def test_a_call_computes_what_the_source_says(compiled):
  (a,) = grammar.arguments(MADE)
  np.testing.assert_allclose(
    compiled.call(), np.tanh(a @ a.T), rtol=1e-4, atol=1e-5
  )
  assert 0 < measure.latency(compiled.call, measure.Timing(repeats=3)) < 1e5


def changed(old, new):
  assert old in SOURCE
  return dataclasses.replace(MADE, source=SOURCE.replace(old, new))


def test_the_hash_sees_what_is_computed_and_not_how_it_is_named(compiled):
  same = changed("x1", "some_other_name")
  moved = changed("\n\ndef", "\n\n\n# A comment.\ndef")
  helper = changed("jnp.tanh(a1 @ a1.T)", "jnp.tanh(jnp.matmul(a1, a1.T))")
  for other in (same, moved, helper):
    assert measure.compile_program(other).row["hash"] == compiled.row["hash"]
  for other in (changed("tanh", "sin"), changed("a1.T)", "a1.T + 1)")):
    assert measure.compile_program(other).row["hash"] != compiled.row["hash"]


def test_the_hash_sees_shapes():
  hashes = [
    measure.fingerprint(
      jax.jit(jnp.sin).lower(jnp.zeros(shape)).compile().as_text()
    )
    for shape in (4, 5, (4, 1))
  ]
  assert len({*hashes}) == 3


def test_jaxprs_hold_no_addresses():
  text = measure.without_addresses("jvp=<function f at 0x7f01> b:f32[2]")
  assert text == "jvp=<function f> b:f32[2]"
  assert not re.search("0x", text)


def test_latency_takes_the_least():
  clock = iter([0.0] * 3 + [3e-3] + [0.0] * 30)

  def call():
    import time

    time.sleep(next(clock))
    return np.zeros(1)

  found = measure.latency(call, measure.Timing(repeats=4, burst=1e-7))
  assert found < 2e3
