"""Costs of tokens, and texts whose chunks they end."""

import jax
import numpy as np
import pytest

from models import chunks, language_model
from models.attamba_config import AttambaConfig
from models.chunks import COST_OF_CHUNK
from research.language_model import chunk_costs
from research.text import tokenizing

TEXT = b"A word, or two.\nIt was the end of it. " * 30


def table_of(boundaries):
  config = AttambaConfig.tiny(
    vocab_size=257, vocab_multiple=8, boundaries=boundaries
  )
  counts = np.bincount(np.frombuffer(TEXT, np.uint8), minlength=257)
  table = chunk_costs.table(config, tokenizing.of_bytes(), counts)
  assert table.shape == (257,) and table.dtype == np.float32
  assert 0 <= table.min() and table.max() <= 1
  return config, table, counts


def ends_of(config, table):
  tokens = np.frombuffer(TEXT, np.uint8)[None].astype(np.int32)
  costs = chunks.token_costs(table, tokens)
  places = np.arange(tokens.size, dtype=np.int32)[None]
  zero = np.zeros(1, np.int32)
  closed, _, _ = chunks.closed_by_cost(
    config, config.runs[0], costs, places, zero, zero
  )
  return np.flatnonzero(closed[0])


def test_a_class_of_tokens_ends_chunks():
  config, table, _ = table_of("token_class")
  costly = {chr(i) for i in np.flatnonzero(table[:128])}
  assert set(" ,.\n") <= costly and not costly & set("aAzZ09")
  ends = ends_of(config, table)
  # But for the first token and chunks that became too long.
  text = np.frombuffer(TEXT, np.uint8)
  sizes = np.diff(ends)
  assert sizes.min() == 2 and sizes.max() <= 8
  at_class = table[text[ends[1:]]] > 0
  # Of two tokens, the first may be the one.
  behind = (table[text[ends[1:] - 1]] > 0) & (sizes == 2)
  assert (at_class | behind | (sizes == 8)).all() and at_class.mean() > 0.6


def test_surprise_is_alike_in_all_chunks():
  config, table, counts = table_of("surprise")
  used = counts > 0
  order = np.argsort(counts[used])
  assert (np.diff(table[used][order]) <= 0).all()
  assert table[ord("z")] >= table[used].max()
  # P tokens on average: the text is what the table was made of.
  sizes = np.diff(ends_of(config, table))
  assert 3.9 < sizes.mean() < 4.1 and len(set(sizes)) > 2


@pytest.mark.parametrize("boundaries", ["surprise", "token_class"])
def test_a_model_has_a_table(boundaries):
  config, table, _ = table_of(boundaries)
  params = language_model.init(config, jax.random.key(0))
  assert params["chunk_costs"].shape == table.shape
  found = chunks.token_costs(params["chunk_costs"], np.arange(257))
  np.testing.assert_array_equal(found, COST_OF_CHUNK // 4)
