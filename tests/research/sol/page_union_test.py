import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from ops.select_pages import select_pages_reference
from research.sol import page_union
from tests.research.sol import toy


def keys_and_queries(tokens):
  """(L, W, S, H, K) queries and (L, W, S, N, K) keys of the toy model."""

  def attend(q, k, v, _):
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed, (q, k)

  model = transformer.bind(toy.CONFIG, toy.lm())
  positions = transformer.token_positions(tokens)
  return model(model.embed(tokens), positions, attend)[1]


@pytest.mark.parametrize("sink", [False, True])
def test_the_union_is_counted_page_by_page(sink):
  setup = toy.setup(keep_sink_and_current=sink)
  windows = np.asarray(toy.windows(3))
  found = page_union.measure(
    setup, toy.lm(), windows, first=toy.CONTEXT, batch=2
  )
  # The third window fills no batch, and the last token no page.
  q, k = (
    np.asarray(x) for x in keys_and_queries(jnp.asarray(windows[:2, :40]))
  )
  union = own = 0
  for layer, w, group in np.ndindex(len(q), 2, toy.CONFIG.num_kv_heads):
    for page in range(toy.CONTEXT // toy.PAGE, 10):
      seen = (page + 1) * toy.PAGE
      pages = k[layer, w, :seen, group].reshape(page + 1, toy.PAGE, -1)
      kept = []
      for head in (2 * group, 2 * group + 1):
        query = q[layer, w, seen - 1, head]
        bound = np.maximum(query * pages.min(1), query * pages.max(1)).sum(-1)
        budget = -(-int(np.ceil(0.3 * seen)) // toy.PAGE)
        always = np.zeros(page + 1, bool)
        if sink:
          always[[0, -1]] = True
        kept.append(
          select_pages_reference(
            bound,
            np.array(budget),
            valid=np.ones(page + 1, bool),
            always=always,
          )
        )
      union += np.sum(kept[0] | kept[1])
      own += np.sum(kept) / 2
  assert found[0.3] == pytest.approx(union / own, rel=0.01)
  assert 1 < found[0.3] < 2 and found[1.0] == 1


def test_where_all_is_read_there_is_nothing_to_measure():
  table = toy.TABLE.product("rho", (1.0,), (0.5, 1.0), (16,))
  setup = toy.setup(table=table)
  found = page_union.measure(setup, None, toy.windows(1), first=16, batch=1)
  assert found == {1.0: 1.0}
