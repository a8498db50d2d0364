import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.convert import load
from models.tokenizer import load_tokenizer
from research.evaluation import scoring
from research.evaluation.scoring import Row
from research.text import tokenizing

CONTEXT = "Once upon a time there was a little girl named"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
  """At these sizes it is what the tests wait for."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


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
  forward = jax.jit(transformer.forward, static_argnums=0)

  def logprobs(row):
    padded = np.zeros(48, np.int32)
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
  for length in (2, 5, 17, 18, 48, 48):
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
  assert len(long.tokens) == 48 and long.scored == short.scored
  assert long.tokens[-10:].tolist() == short.tokens[-10:].tolist()
  assert scorer.encode_pair("a", " cat" * 100).scored == 47


def test_an_empty_context_is_an_end_token_where_there_is_no_begin(tiny):
  scorer = scoring.Scorer(
    tiny.config, tiny.params, tokenizing.of_bytes(), max_length=8,
    batch_tokens=8,
  )  # fmt: skip
  assert scorer.encode_pair("", "ab").tokens.tolist() == [256, 97, 98]
  assert scorer.encode_pair("a", "b").tokens.tolist() == [97, 98]
  rows = scorer.encode_whole("abcdefghij")
  assert [row.scored for row in rows] == [7, 3]
  assert rows[0].tokens.tolist() == [256, *range(97, 104)]


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
