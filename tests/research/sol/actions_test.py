import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from research.sol import actions

SIZES = {
  "J-2L": 8,
  "J-3L": 27,
  "J-FL": 1560,
  "FL-R4": 336,
  "FL-R16": 336,
  "FL-R64": 336,
  "3B": 1560,
  "8B": 1560,
  "reasoning": 11,
  "K10": 2,
  "K20": 2,
  "K40": 2,
  "S30": 2,
  "S40": 2,
  "S50": 2,
  "Q5Q10": 2,
  "Q5Q16": 2,
  "Q6Q16": 2,
  "KR-FL": 130,
  "S-FL": 13,
  "J-INT": 27,
}


@pytest.mark.parametrize("name", SIZES)
def test_every_preset(name):
  table = actions.preset(name)
  assert table.name == name
  assert table.size == SIZES[name]
  triples = list(zip(table.kappa, table.rho, table.bits))
  assert len(set(triples)) == table.size
  assert triples == sorted(triples)
  assert hash(table) == hash(actions.preset(name))
  if name != "Q5Q10":
    assert triples[table.full_index] == (1.0, 1.0, 16.0)


def test_the_list_is_complete():
  with pytest.raises(InputError) as error:
    actions.preset("J-4L")
  assert str(error.value).endswith("valid: " + ", ".join(SIZES))


def test_published_set_up():
  published = {
    name: actions.preset(name) for name in ("J-FL", "3B", "8B", "reasoning")
  }
  found = {
    name: (t.page_size, t.horizon, t.context, t.group_size, t.batch_size)
    for name, t in published.items()
  }
  assert found == {
    "J-FL": (8, 16, 1024, 32, 8),
    "3B": (8, 16, 512, 16, 4),
    "8B": (8, 16, 512, 16, 2),
    "reasoning": (16, 64, 1024, 16, 2),
  }
  assert published["J-FL"].group_size * 8 * 16 == 4096
  assert actions.preset("J-2L").page_size == 4
  assert actions.preset("FL-R64").horizon == 64


def test_levels_and_targets():
  table = actions.preset("J-FL")
  assert table.levels("kappa") == tuple(i / 10 for i in range(1, 11))
  assert table.levels("rho")[:3] == (0.4, 0.45, 0.5)
  assert table.levels("bits") == tuple(range(5, 17))
  assert table.target_low == (0.1, 0.4, 5 / 16)
  assert actions.preset("J-INT").levels("bits") == (4, 8, 16)
  with pytest.raises(InputError, match="'width'"):
    table.levels("width")


def test_product_order_and_arrays():
  table = actions.ActionTable.product("x", (0.5, 1), (0.4, 1), (8, 16))
  kappa, rho, bits = table.arrays()
  assert kappa.dtype == rho.dtype == bits.dtype == jnp.float32
  np.testing.assert_array_equal(bits, [8, 16] * 4)
  np.testing.assert_allclose(rho, [0.4, 0.4, 1, 1] * 2)
  np.testing.assert_allclose(kappa, [0.5] * 4 + [1] * 4)
  assert table.full_index == 7


def test_bad_tables_are_refused():
  with pytest.raises(InputError, match="no dense action"):
    _ = actions.preset("Q5Q10").full_index
  for axis, levels in (
    ("kappa=0", ((0,), (1,), (16,))),
    ("rho=1.5", ((1,), (1.5,), (16,))),
    ("bits=1", ((1,), (1,), (1,))),
    ("whole", ((1,), (1,), (4.5,))),
  ):
    with pytest.raises(InputError, match=axis):
      actions.ActionTable.product("x", *levels)
  with pytest.raises(InputError, match="differ in length"):
    actions.ActionTable(name="x", kappa=(1.0,), rho=(), bits=(16.0,))
