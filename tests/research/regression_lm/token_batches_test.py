import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from models.errors import InputError
from models.numbers import MISSING, Ieee, TargetCodec
from research.predictors.examples import Example
from research.regression_lm import prompts, token_batches
from research.text import tokenizing

CODEC = TargetCodec(format=Ieee(), num_objectives=2)
BYTES = tokenizing.of_bytes()


def dataset(lengths, max_length=99):
  given = [
    Example(x=chr(97 + i % 26) * n, y=[i, None]) for i, n in enumerate(lengths)
  ]
  return token_batches.build(given, BYTES, CODEC, max_length)


def test_texts_come_back_from_their_tokens():
  texts = ["grün", "a", "two words"]
  found = token_batches.read_texts(BYTES, texts, 99)
  np.testing.assert_array_equal(found.lengths, [5, 1, 9])
  tokens, lengths = found.rows(np.array([2, 0]))
  assert tokens.shape == (2, 16) and tokens.dtype == np.int32
  decoded = [BYTES.decode(row[:n]) for row, n in zip(tokens, lengths)]
  assert decoded == ["two words", "grün"]


def test_long_texts_are_counted_and_cut_with_a_warning():
  with pytest.warns(UserWarning, match="2 of 3 texts have more than 4 tokens"):
    found = token_batches.read_texts(BYTES, ["12345", "1234", "123456"], 4)
  assert found.num_cut == 2 and found.lengths.tolist() == [4, 4, 4]


@pytest.mark.parametrize("lengths", [[5] * 10, [1, 2, 3, 60, 5, 1, 2, 9, 3, 4]])
def test_every_example_comes_once_an_epoch(lengths):
  data = dataset(lengths)
  assert data.is_ragged == (len(set(lengths)) > 1)
  for rows in (2, 5):
    # Five batches a pool at most, and pools divide the epoch here.
    steps = 10 // rows
    for epoch in range(3):
      seen = np.concatenate(
        [data.indices_at(epoch * steps + i, rows, 7) for i in range(steps)]
      )
      assert sorted(seen) == list(range(10))
  first = data.indices_at(0, 5, 7).tolist()
  assert first == data.indices_at(0, 5, 7).tolist()
  orders = {tuple(data.indices_at(0, 5, seed)) for seed in range(5)}
  assert len(orders) > 1


def test_batches_larger_than_the_data_repeat_it_evenly():
  data = dataset([3, 3, 3])
  counts = np.bincount(data.indices_at(0, 8, 0), minlength=3)
  assert counts.tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_like_lengths_stand_together():
  generator = np.random.default_rng(0)
  data = dataset(generator.integers(1, 90, 256))
  spans = [np.ptp(data.rows(data.indices_at(i, 8, 0))["lengths"])
           for i in range(32)]  # fmt: skip
  assert np.mean(spans) < 10


def test_the_whole_counts_every_example_once():
  data = dataset([3, 1, 2, 5, 4])
  batches = data.whole(2)
  assert [len(batch["tokens"]) for batch in batches] == [2, 2, 2]
  targets = np.concatenate([batch["targets"] for batch in batches])
  values = CODEC.values(targets[(targets != MISSING).any(1)])[:, 0]
  assert sorted(values) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
  "given, words",
  [
    ([], "there are no examples"),
    ([Example("", 1.0)], "text 0 is empty"),
    ([Example("a", 1.0), Example(None, 1.0)], "text 1 is a NoneType"),
    ([Example(b"a", 1.0)], "text 0 is a bytes"),
    ([Example("a", float("nan"))], "example 0: target nan is not finite"),
    ([Example("a", [1, 2, 3])], "example 0: a target has 3 objectives"),
    ([Example("a")], "no example has a target"),
    ([("a", 1.0)], "example 0 is a tuple"),
    ([Example("\ud800", 1.0)], r"the tokenizer cannot read '\\ud800'"),
  ],
)
def test_bad_examples_are_one_line(given, words):
  with pytest.raises(InputError, match=words) as caught:
    token_batches.build(given, BYTES, CODEC, 9)
  assert "\n" not in str(caught.value)


def test_a_text_without_tokens_is_named():
  backend = tokenizing.train_bpe(["aaaa bbbb"], 300)
  backend.backend.normalizer = normalizers.Strip()
  with pytest.raises(InputError, match="text 1 has no token"):
    token_batches.read_texts(backend, ["a", "  "], 9)


def test_a_pattern_that_takes_too_long_is_one_line(capfd):
  long = tokenizing.train_bpe(["aaaa bbbb"], 300)
  long.backend.pre_tokenizer = pre_tokenizers.Split(
    tokenizers.Regex("^((a)+.)+c(a)+$"), "isolated"
  )
  for read in (
    lambda texts: token_batches.read_texts(long, texts, 9),
    lambda texts: prompts.Others([Example(x, 1.0) for x in texts], long, 9),
  ):
    with pytest.raises(InputError, match="its pattern takes too long"):
      read(["a", "a" * 60])
  assert capfd.readouterr().err == ""
