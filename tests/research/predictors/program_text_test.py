"""Texts of JAX programs: sizes as words, and forms that compute the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from research.predictors import program_text
from research.predictors.program_text import Program
from research.program_metrics import grammar

COUNT = 192
TYPED = """\
import jax
import jax.numpy as jnp

inputs = {
  "a1": ((3, 136), "float32"),
  "a2": ((136, 256), "float32"),
  "a3": ((5,), "int32", 14),
  "a4": ((), "bfloat16"),
}


def loss(a1, a2, a3, a4):
  x1 = a1 @ a2  # x1 f32[3,256], a1 f32[3,136], a2 f32[136,256]
  x2 = jnp.sum(x1)  # x2 f32[], x1 f32[3,256]
  def step2(h, r):
    h = h @ a2  # a2 f32[136,256]
    return h, r
  for k in range(3):
    x1 = 2 * x1  # x1 f32[3,256]
  mask = x1 > 0
  return jnp.mean(x1.astype(jnp.float32))


def f(a1, a2, a3, a4):
  return jax.grad(loss, argnums=(0, 1, 3))(a1, a2, a3, a4)
"""


@pytest.fixture(scope="module")
def programs():
  return [grammar.program(0, index) for index in range(COUNT)]


def test_sizes_are_words():
  assert (
    program_text.sized(TYPED)
    == """\
a1 f32[3,136] Bg Hb Ih
a2 f32[136,256] Hb Ia Pb
a3 i32[5] Cd below 14
a4 bf16[] Aa
gradient
x1 = a1 @ a2 # x1 f32[3,256] Bg Ia Jg a1 Bg Hb Ih a2 Hb Ia Pb
x2 = jnp.sum(x1) # x2 f32[] Aa x1 Bg Ia Jg
def step2(h, r):
  h = h @ a2 # a2 Hb Ia Pb
  return h, r
for k in range(3):
  x1 = 2 * x1 # x1 f32[3,256] Bg Ia Jg
mask = x1 > 0
return jnp.mean(x1.astype(jnp.float32))
"""
  )


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1 << 20, (1 << 26) - 1])
def test_a_word_is_the_logarithm(size):
  word = program_text.logarithms(str(size))
  *more, whole, tenths = word
  assert set(more) <= {"Z"}
  found = (
    26 * len(more) + ord(whole) - ord("A") + "abcdefghij".index(tenths) / 10
  )
  assert abs(found - np.log2(size)) <= 0.0501


def test_parts_make_the_text_again(programs):
  for text in [TYPED, *(t for p in programs for t in (p.source, p.typed))]:
    assert Program.parse(text).write() == text


def test_what_must_stand_before():
  program = Program.parse(TYPED)
  assert program.needs == [set(), {0}, set(), {0, 1}, {0, 3}]
  # As `jax.lax.scan` calls it: with the arrays that its body reads.
  more = [*program.statements, "  a2 = a2\n", "  x3 = step2(x2, x2)\n"]
  *_, bound, called = Program(
    program.head, program.inputs, more, program.result, True
  ).needs
  assert bound == {0, 2} and called == {1, 2, 5}


def test_forms_differ_and_follow_from_the_seed(programs):
  differ = 0
  for made in programs:
    forms = program_text.other_forms(made.typed, 7)
    assert forms == program_text.other_forms(made.typed, 7)
    assert forms[:3] == program_text.other_forms(made.typed, 3)
    differ += len({made.typed, *forms})
  assert differ > 0.7 * 8 * COUNT
  text = programs[7].typed
  assert program_text.other_forms(text, 3, 1) != (
    program_text.other_forms(text, 3, 0)
  )


def test_names_stay_consistent(programs):
  """Undoing names and order gives the program back, comments too."""
  for made in programs:
    program = Program.parse(made.typed)
    for number in range(3):
      found, names = program_text.form(program, number)
      assert len({*names.values()}) == len(names)
      assert found.inputs.keys() == {names[name] for name in program.inputs}
      assert Program.parse(found.write()).write() == found.write()
      back = {new: old for old, new in names.items()}
      undone = found.renamed(back)
      assert sorted(undone.statements) == sorted(program.statements)
      assert undone.result == program.result
      assert dict(undone.inputs) == dict(program.inputs)


def test_every_second_form_is_numbered_as_it_appears(programs):
  for made in programs[:40]:
    text = program_text.other_forms(made.source, 2)[1]
    for letter in "ax":
      names = re.findall(rf"\b{letter}(\d+) = |\b{letter}(\d+), ", text)
      first = list(dict.fromkeys(int(a or b) for a, b in names))
      assert first == sorted(first)


def _run(text, arrays):
  """What `f` gives for arrays by name of the input."""
  scope = {}
  exec(text, scope)
  given = [
    jnp.asarray(arrays[name], item[1]) for name, item in scope["inputs"].items()
  ]
  for array, item in zip(given, scope["inputs"].values()):
    assert array.shape == item[0]
  with jax.numpy_rank_promotion("allow"):
    found = jax.tree.leaves(jax.jit(scope["f"])(*given))
  return [np.asarray(leaf, np.float64) for leaf in found], scope["inputs"]


# Statements with a body, names that are bound again, and gradients.
OPERATORS = (
  "scan_rnn", "scan_recurrence", "conjugate_gradient", "newton_schulz",
  "horizon", "attention", "top_k", "rotary", "gradient",
)  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_forms_compute_the_same(operator, programs):
  able = [
    made
    for made in programs
    if operator in made.operators
    and len(made.operators) > 3
    and all(item.dtype in ("float32", "int32") for item in made.inputs.values())
  ]
  made = min(
    able, key=lambda made: sum(np.prod(v.shape) for v in made.inputs.values())
  )
  arrays = dict(zip(made.inputs, grammar.arguments(made)))
  expected, inputs = _run(made.source, arrays)
  floats = [name for name, item in inputs.items() if item[1] == "float32"]
  program = Program.parse(made.typed)
  for number in range(3):
    found, names = program_text.form(program, number)
    given = {names[name]: array for name, array in arrays.items()}
    outputs, other = _run(found.write(), given)
    wanted = expected
    if program.is_gradient:
      by_name = dict(zip((names[name] for name in floats), expected))
      wanted = [by_name[name] for name in other if name in by_name]
    assert len(outputs) == len(wanted)
    for left, right in zip(outputs, wanted):
      np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["", "def f(x):\n  return x\n", TYPED[:-90]])
def test_other_texts_are_refused(text):
  for call in (
    program_text.sized,
    lambda text: program_text.other_forms(text, 2),
  ):
    with pytest.raises(InputError, match="no program as make_program_metrics"):
      call(text)
