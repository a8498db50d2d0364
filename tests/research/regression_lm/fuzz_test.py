"""Whatever is given, the answer is a number or one clear line."""

import math
import random
import string
import warnings

import jax
import numpy as np
import pytest

from models.errors import InputError
from models.numbers import P10, Ieee, Normalized, TargetCodec
from research.predictors import tables
from research.regression_lm import Example, RegressionLM, token_batches
from research.text import tokenizing

ODD = [
  0.0,
  -0.0,
  5e-324,
  1.7976931348623157e308,
  -1e300,
  1e-300,
  math.nan,
  math.inf,
  -math.inf,
  10**400,
  -(10**400),
  None,
  True,
  "INVALID",
  "12",
  "",
  b"1",
  [],
  [1.0, 2.0, 3.0],
  [[1.0]],
  {},
  {"y": 1},
  1j,
  object(),
  np.float16(6e4),
  np.float32(1e-40),
  np.int64(-(2**63)),
  np.nan,
  np.array(3.0),
  np.array([]),
  np.array([[1.0, 2.0]]),
  np.array(["a"]),
  np.array(None),
  np.datetime64("2020-01-01"),
]
TEXTS = [
  "",
  " ",
  "\x00",
  "\ufeff",
  "é\u0301",
  "👩‍👩‍👧",
  "\ud800",
  "a" * 10000,
  "\n" * 50,
  None,
  3,
  b"bytes",
  ["a"],
]
GOOD = [Example("b", 1.0)]
CODECS = [
  TargetCodec(format=form, num_objectives=count)
  for form in (
    Ieee(),
    Ieee(base=2, exponent_digits=3, mantissa_digits=8, special=True),
    P10(),
    P10(digits=2, exponent_range=300, special=True),
    Normalized(special=True),
  )
  for count in (1, 2)
]


def outcome(function):
  """The result, or None where a line says what is wrong."""
  try:
    return function()
  except InputError as error:
    assert "\n" not in str(error) and len(str(error)) > 10
    return None


@pytest.mark.parametrize("number", range(len(CODECS)))
def test_targets(number):
  codec = CODECS[number]
  generator = random.Random(number)
  taken = 0
  for _ in range(300):
    y = generator.choice(ODD)
    if generator.random() < 0.4:
      y = [generator.choice(ODD) for _ in range(generator.randrange(4))]
    ids = outcome(lambda y=y: codec.encode([y]))
    if ids is None:
      continue
    taken += 1
    assert ids.shape == (1, codec.length)
    there = ids.reshape(codec.num_objectives, -1)[:, 0] != 1
    for part in ids.reshape(codec.num_objectives, -1)[there]:
      assert codec.grammar.accepts(part)
    assert codec.values(ids).shape == (1, codec.num_objectives)
  assert taken > 20


def test_texts():
  tokenizer = tokenizing.of_bytes()
  generator = random.Random(0)
  for _ in range(200):
    texts = [generator.choice(TEXTS) for _ in range(generator.randrange(4))]
    with warnings.catch_warnings(action="ignore", category=UserWarning):
      found = outcome(
        lambda texts=texts: token_batches.read_texts(tokenizer, texts, 64)
      )
    if found is not None:
      assert len(found.lengths) == len(texts)
      assert found.lengths.min() >= 1 and found.lengths.max() <= 64
      assert found.num_cut == sum(len(text) > 64 for text in texts)


def test_predictions_of_odd_texts_are_numbers():
  lm = RegressionLM.from_scratch(size="tiny", max_length=16)
  texts = [text for text in TEXTS if isinstance(text, str) and text]
  texts.remove("\ud800")
  with pytest.warns(UserWarning, match="lose their end"):
    draws = lm.sample(texts, 4)
  assert np.isfinite(draws).all()
  for text in TEXTS:
    if not isinstance(text, str) or text in ("", "\ud800"):
      assert outcome(lambda text=text: lm.sample([text], 2)) is None


def test_fine_tuning_refuses_odd_examples_and_stays_as_it_was():
  lm = RegressionLM.from_scratch(size="tiny", max_length=16)
  before = jax.tree.map(np.asarray, lm.params)
  for bad in (
    [Example("a", math.nan)],
    [Example("a", [1, 2])],
    [Example("", 1.0)],
    [Example("a", "fast")],
    [Example("a", None)],
    [{"x": "a", "y": 1}],
    [None],
  ):
    assert outcome(lambda bad=bad: lm.fine_tune(bad, max_epochs=1)) is None
    assert (
      outcome(lambda bad=bad: lm.fine_tune(GOOD, bad, max_epochs=1)) is None
    )
  jax.tree.map(np.testing.assert_array_equal, lm.params, before)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "csv.gz", "jsonl.xz"])
def test_files_of_noise(tmp_path, suffix):
  generator = random.Random(1)
  path = tmp_path / f"noise.{suffix}"
  alphabet = string.printable + '",\n{}[]:\\é'
  for _ in range(60):
    noise = "".join(generator.choices(alphabet, k=generator.randrange(120)))
    head = generator.choice(["", "x,y\n", '{"x": "a", "y": ', "x,y\na,1\n"])
    path.write_bytes((head + noise).encode())
    read = tables.read_csv if "csv" in suffix else tables.read_jsonl
    found = outcome(lambda read=read: read(path, ["y"]))
    if found is not None:
      assert len(found) >= 1 and found.values.shape == (len(found), 1)
