import numpy as np
import pytest

from models.transformer_config import TransformerConfig
from research.cost import decode_step
from research.sol import actions

SMOLLM2 = TransformerConfig.smollm2_135m()
LLAMA_1B = TransformerConfig.llama3_2_1b()


def read(config, kappa=1.0, rho=1.0, context=1024, page_size=16, **options):
  return float(
    decode_step.bytes_per_token(
      config, kappa, rho, context, page_size=page_size, **options
    )
  )


def flops(config, kappa=1.0, rho=1.0, context=1024, page_size=16, **options):
  return float(
    decode_step.flops_per_token(
      config, kappa, rho, context, page_size=page_size, **options
    )
  )


# Rows of a table that was worked out apart from this code: weights in GB, and
# shares of a step's bytes in percent.
@pytest.mark.parametrize(
  ("config", "gigabytes", "kv_bytes"),
  [(SMOLLM2, 0.269, 23040), (LLAMA_1B, 2.471, 32768)],
)
def test_weights_and_cache(config, gigabytes, kv_bytes):
  weights = read(config, context=0)
  assert round(weights / 1e9, 3) == gigabytes
  assert read(config, context=1) - weights == kv_bytes


@pytest.mark.parametrize(
  ("config", "context", "share", "saved"),
  [
    (SMOLLM2, 1024, 8.1, 5.5),
    (SMOLLM2, 8192, 41.2, 28.4),
    (SMOLLM2, 32768, 73.7, 50.7),
    (LLAMA_1B, 1024, 1.3, 0.9),
    (LLAMA_1B, 8192, 9.8, 6.7),
    (LLAMA_1B, 32768, 30.3, 20.8),
  ],
)
def test_share_of_the_cache(config, context, share, saved):
  dense = read(config, context=context)
  cache = dense - read(config, context=0)
  assert round(100 * cache / dense, 1) == share
  sparse = read(config, kappa=0.25, context=context)
  assert round(100 * (1 - sparse / dense), 1) == saved


@pytest.mark.parametrize(
  ("config", "rho", "published", "structured"),
  [
    (SMOLLM2, 0.4, 23.7, 35.5),
    (SMOLLM2, 0.6, 15.8, 23.7),
    (SMOLLM2, 0.8, 7.9, 11.8),
    (LLAMA_1B, 0.4, 26.1, 39.1),
    (LLAMA_1B, 0.6, 17.4, 26.1),
    (LLAMA_1B, 0.8, 8.7, 13.0),
  ],
)
def test_share_of_pruned_weights(config, rho, published, structured):
  weights = read(config, context=0)
  saved = {
    prune: 100 * (1 - read(config, rho=rho, context=0, prune=prune) / weights)
    for prune in ("input", "oracle_intermediate", "intermediate")
  }
  # Whole channels are kept, which moves the share by up to one in 576.
  assert saved["input"] == pytest.approx(published, abs=0.1)
  assert saved["oracle_intermediate"] == pytest.approx(structured, abs=0.1)
  assert saved["intermediate"] == pytest.approx(structured / 3, abs=0.1)


@pytest.mark.parametrize("prune", ["input", "intermediate"])
def test_flops_by_hand(prune):
  c = TransformerConfig.tiny()
  # d_model 32, d_ff 48, 4 query and 2 kv heads of 8, 2 layers, 64 tokens.
  projections = 32 * 32 + 2 * 32 * 16 + 32 * 32
  channels = {
    "input": 2 * 13 * 48 + 48 * 32,
    "intermediate": 2 * 32 * 48 + 20 * 32,
  }
  # 40% of 100 tokens: 40, in 5 pages of 8; 13 pages are scored.
  attention = 2 * 32 * 40 + 2 * 32 * 13
  expected = 2 * (2 * (projections + channels[prune] + attention) + 64 * 32 + 7)
  found = flops(
    c, 0.4, 0.4, context=100, page_size=8, prune=prune, policy_params=7
  )
  assert found == expected


def test_dense_costs_no_selection_and_selection_is_charged():
  dense, nearly = flops(SMOLLM2), flops(SMOLLM2, kappa=0.999)
  assert nearly > dense
  assert read(SMOLLM2, kappa=0.999) > read(SMOLLM2)


def test_policy_and_word_sizes():
  extra = read(SMOLLM2, policy_params=1000) - read(SMOLLM2)
  assert extra == 2000
  assert read(SMOLLM2, context=0, weight_bytes=1) * 2 == read(
    SMOLLM2, context=0
  )
  extra = read(SMOLLM2, kv_bytes=4) - read(SMOLLM2)
  assert extra == 1024 * 23040


def test_heads_that_disagree_read_more():
  together = read(SMOLLM2, kappa=0.25)
  apart = read(SMOLLM2, kappa=0.25, page_union=3.0)
  assert apart - together == 2 * 256 * 23040
  everything = read(SMOLLM2, kappa=0.5, page_union=3.0)
  assert everything - read(SMOLLM2) == 64 * 23040


def test_budgets_never_cost_more_when_smaller():
  table = actions.preset("J-FL")
  kappa, rho = (np.asarray(table.levels(axis)) for axis in ("kappa", "rho"))
  grid = np.meshgrid(kappa[:-1], rho, indexing="ij")
  for count in (decode_step.flops_per_token, decode_step.bytes_per_token):
    values = count(LLAMA_1B, *grid, 1024, page_size=8)
    for axis in range(2):
      assert (np.diff(values, axis=axis) >= 0).all()


def test_refresh_by_hand():
  c = TransformerConfig.tiny()
  params = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
  found = decode_step.refresh_cost(c, 10, 3)
  # The three tokens see 11, 12 and 13.
  assert found.flops == 2 * (3 * params + 2 * 2 * 32 * 36)
  assert found.bytes == 2 * params + 13 * 2 * 2 * 16 * 2


def test_refresh_is_about_a_dense_step_a_token():
  refresh = decode_step.refresh_cost(LLAMA_1B, 1024, 16)
  head = 2 * LLAMA_1B.vocab_size * LLAMA_1B.d_model
  step = flops(LLAMA_1B, context=1033) - head
  assert refresh.flops / 16 == pytest.approx(step, rel=1e-3)
  assert refresh.bytes < 2 * read(LLAMA_1B)


def test_sliding_layers_see_their_window_alone():
  c = TransformerConfig.tiny_gemma(behind=15)
  # Of three layers two see 16 tokens, in 2 pages of 8; at 40%, 7 of them.
  one = 2 * 2 * 2 * 8
  assert read(c, context=100) - read(c, context=0) == one * (100 + 2 * 16)
  sparse = read(c, 0.4, context=100, page_size=8) - read(c, context=0)
  assert sparse == one * (40 + 13 + 2 * (8 + 2))
  products = flops(c, context=100) - flops(c, context=0)
  assert products == 2 * 2 * 32 * (100 + 2 * 16)
  refresh = decode_step.refresh_cost(c, 10, 3)
  plain = decode_step.refresh_cost(TransformerConfig.tiny(num_layers=3), 10, 3)
  assert refresh == plain
  refresh = decode_step.refresh_cost(c, 100, 3)
  params = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
  assert refresh.bytes == 2 * params + one * (103 + 2 * 18)
  seen = 101 + 102 + 103 + 2 * 3 * 16
  assert refresh.flops == 2 * (3 * params + 2 * 32 * seen)


def test_unknown_pruning_is_named():
  with pytest.raises(ValueError, match="'output'"):
    flops(SMOLLM2, prune="output")
