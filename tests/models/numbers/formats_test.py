"""Golden values are those of regress_lm/tokenizers_test.py (Apache-2.0)."""

import decimal
import fractions
import math

import numpy as np
import pytest

from models.errors import InputError
from models.numbers import INVALID, P10, Ieee, Normalized, formats

FORMATS = {
  "ieee": Ieee(),
  "ieee_wide": Ieee(exponent_digits=3, mantissa_digits=12),
  "ieee_base2": Ieee(base=2, exponent_digits=3, mantissa_digits=8),
  "ieee_base18": Ieee(base=18, exponent_digits=2, mantissa_digits=3),
  "ieee_one_digit": Ieee(mantissa_digits=1, special=True),
  "p10": P10(),
  "p10_narrow": P10(digits=1, exponent_range=2, special=True),
  "p10_wide": P10(digits=15, exponent_range=300),
  "normalized": Normalized(),
  "normalized_base16": Normalized(base=16, digits=5, special=True),
}


def written(form, value):
  return "".join(form.tokens[i] for i in form.encode(value))


@pytest.mark.parametrize(
  "value, tokens, back",
  [
    (123.4, "<+><+><2><1><2><3><4>", 123.4),
    (12345, "<+><+><4><1><2><3><4>", 12340),
    (0.1234, "<+><-><1><1><2><3><4>", 0.1234),
    (-123.4, "<-><+><2><1><2><3><4>", -123.4),
    (-12345, "<-><+><4><1><2><3><4>", -12340),
    (-0.1234, "<-><-><1><1><2><3><4>", -0.1234),
    (1.234e-9, "<+><-><9><1><2><3><4>", 1.234e-9),
    (-1.2e-9, "<-><-><9><1><2><0><0>", -1.2e-9),
    (1.2345e9, "<+><+><9><1><2><3><4>", 1.234e9),
    (1.234e-10, "<+><-><0><0><0><0><0>", 0.0),
    (-1.234e-10, "<-><-><0><0><0><0><0>", 0.0),
    (1.234e10, "<+><+><9><9><9><9><9>", 9999000000.0),
    (-1.234e10, "<-><+><9><9><9><9><9>", -9999000000.0),
    (0.0, "<+><+><0><0><0><0><0>", 0.0),
    (-0.0, "<+><+><0><0><0><0><0>", 0.0),
    (1.0, "<+><+><0><1><0><0><0>", 1.0),
    (1000.0, "<+><+><3><1><0><0><0>", 1000.0),
    (0.01, "<+><-><2><1><0><0><0>", 0.01),
    # The release truncates a product of floats here: 5.699e-1.
    (0.57, "<+><-><1><5><7><0><0>", 0.57),
    (np.float32(0.57), "<+><-><1><5><7><0><0>", 0.57),
    # Rounding may carry into the exponent, and past the largest.
    (9.9995, "<+><+><1><1><0><0><0>", 10.0),
    (9.99951e9, "<+><+><9><9><9><9><9>", 9.999e9),
    # The nearer of the smallest number and zero; the release gives zero.
    (6e-10, "<+><-><9><1><0><0><0>", 1e-9),
    (5e-10, "<+><-><0><0><0><0><0>", 0.0),
  ],
)
def test_ieee_golden(value, tokens, back):
  form = Ieee()
  assert written(form, value) == tokens
  assert form.decode(form.encode(value)) == back


@pytest.mark.parametrize(
  "value, tokens, back",
  [
    (123.4, "<+><1><2><3><4><E-1>", 123.4),
    (12345, "<+><1><2><3><4><E1>", 12340),
    (0.1234, "<+><1><2><3><4><E-4>", 0.1234),
    (-12345, "<-><1><2><3><4><E1>", -12340),
    (0.0, "<+><0><0><0><0><E0>", 0.0),
    (-0.0, "<+><0><0><0><0><E0>", 0.0),
    (-0.4e-13, "<-><0><0><0><0><E0>", 0.0),
  ],
)
def test_p10_golden(value, tokens, back):
  form = P10()
  assert written(form, value) == tokens
  assert form.decode(form.encode(value)) == back


@pytest.mark.parametrize(
  "value, tokens",
  [
    (1.0e13, "<+><9><9><9><E10>"),
    (-2.0e13, "<-><9><9><9><E10>"),
    (9.9e12, "<+><9><9><0><E10>"),
    (5.0e5, "<+><5><0><0><E3>"),
    (1.1e-8, "<+><1><1><0><E-10>"),
    (0.9e-8, "<+><1><0><0><E-10>"),
    (0.5e-8, "<+><0><0><0><E0>"),
    (0.51e-8, "<+><1><0><0><E-10>"),
    (0.4e-8, "<+><0><0><0><E0>"),
    (-0.5e-8, "<-><0><0><0><E0>"),
    (-0.51e-8, "<-><1><0><0><E-10>"),
    (-1.1e-8, "<-><1><1><0><E-10>"),
  ],
)
def test_p10_limits_golden(value, tokens):
  assert written(P10(digits=3), value) == tokens


@pytest.mark.parametrize(
  "value, base, digits, tokens, back",
  [
    (0.123, 10, 3, "<1><2><3>", 0.123),
    (0.0, 10, 3, "<0><0><0>", 0.0),
    (1.0, 10, 3, "<9><9><9>", 0.999),
    (0.999, 10, 3, "<9><9><9>", 0.999),
    (0.12345, 10, 4, "<1><2><3><4>", 0.1234),
    (0.25, 2, 3, "<0><1><0>", 0.25),
    (1.0, 2, 3, "<1><1><1>", 0.875),
    (0.5, 16, 2, "<8><0>", 0.5),
    (1.0, 16, 2, "<15><15>", 15 / 16 + 15 / 256),
  ],
)
def test_normalized_golden(value, base, digits, tokens, back):
  form = Normalized(base=base, digits=digits)
  assert written(form, value) == tokens
  assert form.decode(form.encode(value)) == back


def test_names_of_tokens_golden():
  names = P10(digits=1, exponent_range=2, special=True).tokens
  digits = [f"<{i}>" for i in range(10)]
  powers = ["<E-2>", "<E-1>", "<E0>", "<E1>", "<E2>"]
  special = ["<INVALID>", "<NAN>", "<INF>", "<NINF>"]
  assert list(names) == ["<+>", "<->", *digits, *powers, *special]
  assert len(Ieee().tokens) == 12 and Ieee().length == 7
  assert len(P10().tokens) == 33 and P10().length == 6


def test_every_number_of_two_decimals_survives():
  form = Ieee()
  for hundredths in range(1, 10000):
    value = hundredths / 100
    assert form.decode(form.encode(value)) == value


def random_ids(form, generator, count):
  """Sequences that the grammar allows, its choices drawn evenly."""
  ids = np.zeros((count, form.length), np.int32)
  for row in range(count):
    state = 0
    for step in range(form.length):
      choices = np.flatnonzero(form.grammar.allowed[state])
      ids[row, step] = generator.choice(choices)
      state = form.grammar.next_state[state, ids[row, step]]
    assert state == 0
  return ids


def is_zero(form, ids):
  return form.values(ids) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_sequences_of_the_grammar_survive_the_round_trip(name):
  form = FORMATS[name]
  ids = random_ids(form, np.random.default_rng(1), 400)
  assert form.grammar.accepts(ids).all()
  values = form.values(ids)
  for row, value in zip(ids, values):
    decoded = form.decode(row)
    if decoded == INVALID:
      assert math.isnan(value)
    else:
      assert decoded == value or math.isnan(decoded)
    if value != 0 and abs(value) < 1e300 and abs(value) > 1e-300:
      assert form.encode(decoded) == row.tolist()


def sweep(form, generator):
  """Numbers over the whole range of a format, beyond it, and its edges."""
  if isinstance(form, Normalized):
    edges = [0.0, 1.0, 1e-30, 1 - 1e-16, 0.5]
    return np.concatenate([generator.uniform(0, 1, 400), edges])
  powers = generator.uniform(-320, 307, 250)
  near = generator.uniform(-12, 12, 350)
  sizes = 10 ** np.concatenate([powers, near])
  values = sizes * generator.choice([-1, 1], sizes.shape)
  edges = [0.0, 1.0, -1.0, 5e-324, 1.7976931348623157e308, 0.1, 9.9995]
  edges += [10.0**power for power in range(-20, 20)]
  return np.concatenate([values, edges])


def largest_and_smallest(form):
  if isinstance(form, P10):
    step = decimal.Decimal(10)
    return (
      fractions.Fraction((10**form.digits - 1) * step**form.exponent_range),
      fractions.Fraction(step ** (form.digits - 1) / step**form.exponent_range),
    )
  base, most = fractions.Fraction(form.base), form._largest_exponent
  whole = base**form.mantissa_digits - 1
  scale = base ** (form.mantissa_digits - 1)
  return whole / scale * base**most, base**-most


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_to_the_nearest_over_the_whole_range(name):
  form = FORMATS[name]
  for value in sweep(form, np.random.default_rng(2)):
    ids = np.asarray(form.encode(value))
    assert form.grammar.accepts(ids)
    exact = fractions.Fraction(decimal.Decimal(repr(float(value))))
    found = form.values(ids)
    if not 1e-290 < abs(found) < 1e290 and found:
      continue  # Where float64 itself is coarse.
    found = fractions.Fraction(float(found))
    width = fractions.Fraction(float(form.widths(ids)))
    error = abs(found - exact)
    if isinstance(form, Normalized):
      # 1 has no place of its own, and what is nearest to it goes with it.
      assert error <= width / 2 or abs(found + width - 1) < 1e-15
      continue
    largest, smallest = largest_and_smallest(form)
    if abs(exact) > largest:
      assert abs(abs(found) / largest - 1) < 1e-15
    elif abs(exact) < smallest:
      assert found in (0, *(s * fractions.Fraction(float(smallest))
                            for s in (1, -1)))  # fmt: skip
      assert error <= smallest / 2 * (1 + fractions.Fraction(1, 10**15))
    else:
      # Half a step, and the rounding of the two floats compared.
      slack = abs(exact) * fractions.Fraction(2, 1 << 52)
      assert error <= width / 2 + slack


def test_base_ten_agrees_with_exact_fractions():
  generator = np.random.default_rng(3)
  for value in 10 ** generator.uniform(-300, 300, 300):
    number = decimal.Decimal(repr(float(value)))
    mantissa, exponent = formats.rounding.scientific(number, 10, 5)
    whole = fractions.Fraction(number) / fractions.Fraction(10) ** exponent
    assert 10**4 <= mantissa < 10**5 and abs(mantissa - whole) <= 0.5


@pytest.mark.parametrize("name", ["ieee_one_digit", "p10_narrow"])
def test_special_values_repeat_their_token(name):
  form = FORMATS[name]
  for value in [math.nan, math.inf, -math.inf, INVALID]:
    ids = form.encode(value)
    assert len(set(ids)) == 1 and form.grammar.accepts(np.asarray(ids))
    back = form.decode(ids)
    assert back == value or (back != back and value != value)
  stacked = np.asarray([form.encode(v) for v in [math.inf, 2.0, INVALID]])
  np.testing.assert_array_equal(form.values(stacked), [math.inf, 2.0, math.nan])
  assert form.widths(stacked)[0] == 1.0
  # A special value once begun is repeated; a number once begun has none.
  after = form.grammar.next_state[0, form.encode(math.nan)[0]]
  assert form.grammar.allowed[after].sum() == 1
  first_special = form.encode(INVALID)[0]
  signed = form.grammar.next_state[0, 0]
  assert not form.grammar.allowed[signed, first_special:].any()


def test_finite_numbers_have_one_sequence():
  form = Ieee(base=3, exponent_digits=2, mantissa_digits=2)
  every = np.stack(
    np.meshgrid(*[np.arange(5)] * form.length, indexing="ij"), -1
  ).reshape(-1, form.length)
  ids = every[form.grammar.accepts(every)]
  values = form.values(ids)
  finite = values[values != 0]
  assert len(np.unique(finite)) == len(finite) == 2 * 17 * 2 * 3
  # Zero: by sign, and by whether it was too small to be written.
  assert (values == 0).sum() == 4
  for row, value in zip(ids, values):
    if value:
      assert form.encode(value) == row.tolist()


@pytest.mark.parametrize(
  "form, value, words",
  [
    (Ieee(), math.nan, "not finite"),
    (P10(), math.inf, "not finite"),
    (Ieee(), "INVALID", "not finite"),
    (Ieee(special=True), "fast", "is no number"),
    (Ieee(), None, "is no number"),
    (Ieee(), True, "is no number"),
    (Ieee(), 1j, "is no number"),
    (Ieee(), np.ones(2), "is no number"),
    (Ieee(), np.datetime64("2020-01-01"), "is no number"),
    (Normalized(), 1.5, r"not in \[0, 1\]"),
    (Normalized(), -1e-9, r"not in \[0, 1\]"),
  ],
)
def test_what_cannot_be_written_is_one_line(form, value, words):
  with pytest.raises(InputError, match=words) as caught:
    form.encode(value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "make",
  [
    lambda: Ieee(base=1),
    lambda: Ieee(mantissa_digits=0),
    lambda: P10(digits=1.5),
    lambda: Normalized(base=10, digits=20),
    lambda: formats.from_json({"kind": "roman"}),
    lambda: formats.from_json({"kind": "p10", "colour": 1}),
    lambda: formats.from_json({}),
  ],
)
def test_sizes_are_checked(make):
  with pytest.raises(InputError):
    make()


@pytest.mark.parametrize("name", FORMATS)
def test_json_round_trip(name):
  form = FORMATS[name]
  assert formats.from_json(form.to_json()) == form


@pytest.mark.parametrize("name", FORMATS)
def test_zero_has_all_its_spellings(name):
  form = FORMATS[name]
  zeros = form.zeros
  assert form.grammar.accepts(zeros).all() and (form.values(zeros) == 0).all()
  assert len(np.unique(zeros, axis=0)) == len(zeros)
  assert (zeros == form.encode(0)).all(axis=1).any()
  ids = random_ids(form, np.random.default_rng(3), 400)
  # Where a float64 holds the smallest number, no other sequence is 0.
  found = ids[form.values(ids) == 0] if form._limits()[1] else zeros
  assert (found[:, None] == zeros[None]).all(-1).any(1).all()


def test_what_a_format_cannot_hold_is_told():
  values = np.array([9.9994e9, 9.9996e9, -1e12, 0.0, 4e-10, 6e-10, np.inf])
  large, small = Ieee().lost(values)
  assert large.tolist() == [False, True, True, False, False, False, False]
  assert small.tolist() == [False, False, False, False, True, False, False]
  large, small = P10(digits=3).lost(np.array([9.994e12, 1e13, 0.4e-8, 0.6e-8]))
  assert large.tolist() == [False, True, False, False]
  assert small.tolist() == [False, False, True, False]
  assert not np.any(Ieee(exponent_digits=3, base=36).lost(values))
