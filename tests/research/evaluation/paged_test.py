import jax
import numpy as np
import pytest

from models import language_model, transformer
from models.caches.paged import PageBudget
from models.errors import InputError
from models.transformer_config import TransformerConfig
from ops.paged_sparse_attention.xla import kept_pages
from research.evaluation import paged
from research.results import pages
from research.text import tokenizing

CONFIG = TransformerConfig.tiny(vocab_size=257, vocab_multiple=1)
PAGE = 4
TEXT = np.random.default_rng(0).integers(0, 256, 400).astype(np.int32)


@pytest.fixture(scope="module")
def params():
  params = jax.jit(transformer.init, static_argnums=0)(
    CONFIG, jax.random.key(0)
  )
  params["embed"]["table"] = 20 * params["embed"]["table"]
  return params


@pytest.fixture(scope="module")
def rows():
  return paged.windows(TEXT, context=30, scored=20, count=3, begin=256)


@pytest.fixture(scope="module")
def readings():
  read = lambda *what: paged.Reading(
    keep=what[0], choice=what[1], page_size=PAGE
  )
  return [
    read(1.0, "bounds"),
    read(0.999, "bounds"),
    read(0.25, "latest"),
  ]


@pytest.fixture(scope="module")
def scores(params, rows, readings):
  return paged.score(CONFIG, params, rows, readings, batch=2)


def test_all_pages_are_the_dense_model(params, rows, scores):
  forward = jax.jit(language_model.forward, static_argnums=0)
  logits = forward(CONFIG, params, rows.tokens)
  logprobs = np.asarray(jax.nn.log_softmax(logits))[:, 30:-1]
  wanted = -np.take_along_axis(logprobs, rows.tokens[:, 31:, None], -1)
  wanted = wanted[..., 0].sum(-1)
  # 20 sums of a vocabulary in float32, over two layers.
  np.testing.assert_allclose(scores[0].nll, wanted, rtol=2e-5)
  np.testing.assert_allclose(scores[1].nll, wanted, rtol=2e-5)
  assert (np.abs(scores[2].nll - wanted) > 1e-3).all()


def test_the_latest_pages_are_the_first_and_the_last_ones(params, rows):
  state = paged._begin(CONFIG, params, rows.tokens[:2, :30], 128)
  budget = PageBudget(keep=0.5, page_size=PAGE, kind="moments")
  state = paged.with_latest(language_model.with_pages(CONFIG, state, budget))
  cache = state.cache
  own = jax.random.normal(
    jax.random.key(1), (2, CONFIG.num_kv_heads, 1, CONFIG.head_dim)
  )
  kept = kept_pages(
    own,
    jax.tree.map(lambda x: x[0], cache.summary),
    state.length,
    cache.pages(state.length).num_pages[0],
    max_pages=8,
    page_size=PAGE,
  )
  # Of 8 pages that hold a token the first and the last three, then none.
  wanted = [0, 5, 6, 7, *[cache.summary.first.shape[2]] * 4]
  assert np.asarray(kept).tolist() == [[wanted] * CONFIG.num_kv_heads] * 2


def test_what_is_read_is_counted():
  reading = paged.Reading(keep=0.25, choice="bounds", page_size=4)
  # 8 pages hold tokens at steps 0 and 1, 9 at step 2: 2, 2 and 3 are read.
  pages_read = (2 / 8 + 2 / 8 + 3 / 9) / 3
  found = reading.shares(30, 3)
  np.testing.assert_allclose(found, (pages_read, pages_read + 1 / 4))
  latest = paged.Reading(keep=0.25, choice="latest", page_size=4)
  np.testing.assert_allclose(latest.shares(30, 3), (pages_read, pages_read))
  assert paged.Reading(keep=1).shares(30, 3) == (1, 1)


def test_needles_lie_at_even_depths_and_their_digits_are_scored():
  tokenizer = tokenizing.of_bytes()
  found = paged.needles(TEXT % 100, tokenizer, context=120, count=3)
  assert found.tokens.shape[1] == 120 + 1 + found.scored.shape[1]
  depths = []
  for tokens, scored in zip(found.tokens, found.scored, strict=True):
    text = tokenizer.decode(tokens[:120])
    digits = tokenizer.decode(tokens[121:][scored]).strip()
    assert len(digits) == 5 and f"number is {digits}. Remember" in text
    depths.append(text.index("\nThe secret"))
    assert tokenizer.decode(tokens[120:]).endswith(f"number is {digits}")
  assert depths[0] <= 1 < depths[1] < depths[2]


def test_rows_and_their_table(rows, readings, scores):
  made = paged.result_rows("perplexity", rows, readings, scores)
  assert made[0]["method"] == "all pages" and made[0]["nats_more"] == 0
  for row, score in zip(made, scores, strict=True):
    more = (score.nll - scores[0].nll).sum() / 60
    assert row["nats_more"] == pytest.approx(more)
    assert row["nats_more_low"] <= row["nats_more"] <= row["nats_more_high"]
    assert row["value"] == pytest.approx(np.exp(score.nll.sum() / 60))
  named = {"model": "m", "dtype": "float32", "data": "d"}
  table = pages.table([named | row for row in made])
  assert "60 tokens scored behind 3 of them" in table
  assert f"| {made[2]['nats_more']:+.3f} [" in table
  found = paged.Scores(nll=scores[2].nll, found=np.asarray([True, False, True]))
  made = paged.result_rows("needles", rows, readings[::2], [scores[0], found])
  table = pages.table([named | row for row in made])
  assert "2 of 3; +" in table or "2 of 3; -" in table


def test_moments_stand_beside_bounds_of_their_share(rows, scores):
  read = lambda choice: paged.Reading(keep=0.25, choice=choice)
  readings = [paged.Reading(keep=1.0), read("bounds"), read("moments")]
  made = paged.result_rows("perplexity", rows, readings, scores)
  over = (scores[2].nll - scores[1].nll).sum() / 60
  assert made[2]["minus_bounds"] == pytest.approx(over)
  assert "minus_bounds" not in made[0] | made[1]
  named = {"model": "m", "dtype": "float32", "data": "d"}
  table = pages.table([named | row for row in made])
  assert "| moments - bounds " in table and f"| {over:+.3f} [" in table


def test_what_does_not_fit_is_told():
  with pytest.raises(InputError, match="7 windows of 50, not 9"):
    paged.windows(TEXT[:380], context=30, scored=20, count=9, begin=256)
  with pytest.raises(InputError, match="--context=20"):
    paged.needles(TEXT, tokenizing.of_bytes(), context=20, count=2)
  with pytest.raises(InputError, match="choice=best"):
    paged.Reading(keep=0.5, choice="best")
