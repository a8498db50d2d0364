import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models as bpe_models
from tokenizers import pre_tokenizers

from models import language_model, transformer
from models.convert import load
from models.errors import InputError
from models.tokenizer import Tokenizer, load_tokenizer
from models.transformer_config import TransformerConfig
from research.evaluation import scoring
from research.evaluation.scoring import Row
from research.text import tokenizing

CONTEXT = "Once upon a time there was a little girl named"


@pytest.fixture(scope="module")
def tiny():
  return load("tiny")


@pytest.fixture(scope="module")
def scorer(tiny):
  return scoring.Scorer(
    tiny.config,
    tiny.params,
    load_tokenizer(tiny),
    max_length=48,
    batch_tokens=96,
  )


@pytest.fixture(scope="module")
def expected(tiny):
  """Float64 log-probabilities and argmax of a row, by the definition."""
  forward = jax.jit(language_model.forward, static_argnums=0)

  def logprobs(row):
    padded = np.zeros(49, np.int32)
    padded[: len(row.tokens)] = row.tokens
    logits = forward(tiny.config, tiny.params, jnp.asarray(padded)[None])[0]
    logits = np.asarray(logits, np.float64)
    total = np.log(np.exp(logits).sum(-1))
    at = np.arange(len(row.tokens) - row.scored, len(row.tokens))
    targets = row.tokens[at]
    return (
      logits[at - 1, targets] - total[at - 1],
      logits[at - 1].argmax(-1) == targets,
    )

  return logprobs


def test_scores_are_those_of_the_definition(scorer, expected):
  rng = np.random.default_rng(0)
  rows = [scorer.encode_pair(CONTEXT, " Lily and she liked to play.")]
  for length in (2, 5, 17, 18, 48, 49):
    tokens = rng.integers(3, 512, length).astype(np.int32)
    rows.append(Row(tokens, int(rng.integers(1, length))))
  done = []
  scores = scorer.score(rows, done.append)
  assert sum(done) == len(rows)
  for row, score in zip(rows, scores, strict=True):
    logprobs, greedy = expected(row)
    assert score.logprobs.shape == score.greedy.shape == (row.scored,)
    # Logits of some tens, sums of 64 float32 products, five layers.
    np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-4)
    np.testing.assert_array_equal(score.greedy, greedy)
    assert score.total == pytest.approx(logprobs.sum(), abs=1e-3)
  assert scores[0].greedy.any()


def test_few_lengths_give_the_same_scores(scorer, monkeypatch):
  rng = np.random.default_rng(1)
  rows = [
    Row(rng.integers(3, 512, length).astype(np.int32), length - 1)
    for length in (2, 9, 20, 40, 49)
  ]
  plain, shapes, score = scorer.score(rows), set(), scoring._score
  monkeypatch.setattr(
    scoring,
    "_score",
    lambda config, params, tokens, *rest: (
      shapes.add(tokens.shape) or score(config, params, tokens, *rest)
    ),
  )
  few = scorer.score(rows, most_sizes=1)
  assert {length for _, length in shapes} == {48}
  for one, other in zip(plain, few, strict=True):
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_rows_that_differ_in_the_last_token_are_read_once(
  scorer, expected, monkeypatch
):
  calls = []

  def counted(*arguments, score=scoring._score):
    calls.append(arguments[2].shape)
    return score(*arguments)

  monkeypatch.setattr(scoring, "_score", counted)
  stem = scorer.encode_pair("Pick", " one of").tokens
  rows = [
    Row(np.append(stem, token).astype(np.int32), 1 + token % 2)
    for token in range(50, 54)
  ]
  scores = scorer.score(rows)
  assert calls == [(1, 16)]
  for row, score in zip(rows, scores, strict=True):
    np.testing.assert_allclose(score.logprobs, expected(row)[0], atol=1e-4)


def test_a_pair_is_encoded_as_one_text(scorer):
  tokenizer = scorer.tokenizer
  whole = tokenizer.encode(CONTEXT + " Lily").tolist()
  own = len(whole) - len(tokenizer.encode(CONTEXT))
  for pair in ((CONTEXT, " Lily"), (CONTEXT + " ", "Lily")):
    row = scorer.encode_pair(*pair)
    assert row.tokens.tolist() == [tokenizer.bos_id, *whole]
    assert row.scored == own > 0
  row = scorer.encode_pair("", "Lily")
  assert row.tokens.tolist() == [1, *tokenizer.encode("Lily").tolist()]
  assert row.scored == len(row.tokens) - 1
  assert scorer.encode_pair(CONTEXT, "").scored == 0
  assert scorer.score([scorer.encode_pair(CONTEXT, "")])[0].total == 0.0


def test_long_contexts_lose_their_beginning(scorer):
  short = scorer.encode_pair(CONTEXT, " Lily")
  long = scorer.encode_pair("A cat sat. " * 30 + CONTEXT, " Lily")
  # 48 tokens are read.
  assert len(long.tokens) == 49 and long.scored == short.scored
  assert long.tokens[-10:].tolist() == short.tokens[-10:].tolist()
  with pytest.raises(InputError, match="200 tokens.*48.*--max_length"):
    scorer.encode_pair("a", " cat" * 100)


@pytest.fixture(scope="module")
def merging():
  """A scorer whose tokenizer merges "ab", "abc", "abcd" and "zabcd"."""
  vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
  merges = [("ab", "c"), ("abc", "d"), ("z", "abcd")]
  vocab += ["ab", *("".join(pair) for pair in merges), "<|endoftext|>"]
  backend = tokenizers.Tokenizer(
    bpe_models.BPE(
      vocab={token: i for i, token in enumerate(vocab)},
      merges=[("a", "b"), *merges],
    )
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.add_special_tokens(["<|endoftext|>"])
  config = TransformerConfig.tiny(vocab_size=len(vocab))
  init = jax.jit(transformer.init, static_argnums=0)
  params = init(config, jax.random.key(0))
  params["embed"]["table"] = 20 * params["embed"]["table"]
  return scoring.Scorer(
    config,
    params,
    Tokenizer(backend=backend, vocab_size=len(vocab), bos_id=None),
    max_length=16,
    batch_tokens=64,
  )


@pytest.mark.parametrize(
  "pair, tokens, scored",
  [
    # What the harness does: the tokens behind those of the context alone.
    (("x", "y"), ["x", "y"], 1),
    (("ab", "cdab"), ["abcd", "ab"], 1),
    (("", "ab"), ["<|endoftext|>", "ab"], 1),
    (("", "<|endoftext|>ab"), ["<|endoftext|>", "ab"], 1),
    # There are none: the two are encoded apart.
    (("ab", "c"), ["ab", "c"], 1),
    (("zab", "cd"), ["z", "ab", "c", "d"], 2),
    (("ab", ""), ["ab"], 0),
  ],
)
def test_a_continuation_has_tokens_of_its_own(merging, pair, tokens, scored):
  row = merging.encode_pair(*pair)
  names = [merging.tokenizer.backend.id_to_token(t) for t in row.tokens]
  assert (names, row.scored) == (tokens, scored)


def test_rows_do_not_touch_each_other(merging):
  pairs = [("zab", "cd"), ("x", "y"), ("ab", "c"), ("", "x"), ("x", "yz")]
  rows = [merging.encode_pair(*pair) for pair in pairs]
  for row, score in zip(rows, merging.score(rows), strict=True):
    (alone,) = merging.score([row])
    np.testing.assert_allclose(score.logprobs, alone.logprobs, atol=1e-5)
    assert score.total < -0.01
  for scored in (-1, 2):
    with pytest.raises(ValueError, match="cannot be scored"):
      Row(np.arange(2), scored)


def test_logits_that_are_not_finite_are_told(merging):
  norm = jax.tree.map(lambda x: x * np.nan, merging._params["final_norm"])
  damaged = scoring.Scorer(
    merging._config,
    merging._params | {"final_norm": norm},
    merging.tokenizer,
    max_length=16,
    batch_tokens=64,
  )
  with pytest.raises(InputError, match="NaN or infinite"):
    damaged.score([damaged.encode_pair("x", "y")])


def test_an_empty_context_is_an_end_token_where_there_is_no_begin(tiny):
  scorer = scoring.Scorer(
    tiny.config, tiny.params, tokenizing.of_bytes(), max_length=8,
    batch_tokens=8,
  )  # fmt: skip
  assert scorer.encode_pair("", "ab").tokens.tolist() == [256, 97, 98]
  assert scorer.encode_pair("a", "b").tokens.tolist() == [97, 98]
  rows = scorer.encode_whole("abcdefghij")
  assert [row.scored for row in rows] == [8, 2]
  assert rows[0].tokens.tolist() == [256, *range(97, 105)]


# By `make_disjoint_window` and `get_rolling_token_windows` of lm-eval 0.4.13,
# of the tokens 1 to n with prefix 0 and context_len 1.
ROLLING = {
  (10, 4): [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4), ([6, 7, 8, 9, 10], 2)],
  (8, 4): [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4)],
  (5, 4): [([0, 1, 2, 3, 4], 4), ([1, 2, 3, 4, 5], 1)],
  (3, 4): [([0, 1, 2, 3], 3)],
  (3, 1): [([0, 1], 1), ([1, 2], 1), ([2, 3], 1)],
  (0, 4): [],
}


@pytest.mark.parametrize("count, size", ROLLING)
def test_rolling_rows_are_those_of_the_harness(count, size):
  tokens = np.arange(1, count + 1, dtype=np.int32)
  rows = scoring.rolling(tokens, size=size, prefix=0)
  found = [(row.tokens.tolist(), row.scored) for row in rows]
  assert found == ROLLING[count, size]


@pytest.mark.parametrize("begin", [None, 7])
@pytest.mark.parametrize("size, overlap", [(10, 0), (10, 4), (3, 1), (200, 0)])
def test_windows_score_every_token_once(begin, size, overlap):
  tokens = np.arange(100, 205, dtype=np.int32)
  rows = scoring.windows(tokens, size=size, overlap=overlap, begin=begin)
  scored = np.concatenate([row.tokens[-row.scored :] for row in rows])
  first = 0 if begin is not None else 1
  np.testing.assert_array_equal(scored, tokens[first:])
  lengths = {len(row.tokens) for row in rows}
  assert lengths == {min(size, len(tokens) + (begin is not None))}
  for row in rows:
    body = row.tokens if begin is None else row.tokens[1:]
    assert begin is None or row.tokens[0] == begin
    assert (np.diff(body) == 1).all()
  for row in rows[1:]:
    assert len(row.tokens) - row.scored >= overlap + (begin is not None)


def test_windows_need_room():
  with pytest.raises(ValueError, match="full"):
    scoring.windows(np.arange(9), size=4, overlap=4, begin=None)
  assert scoring.windows(np.arange(1), size=4, overlap=0, begin=None) == []
