import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from models.errors import InputError
from research.sol import artefact, load_policy, policy
from research.sol.options import Options
from research.sol.policy import InputStats
from tests.research.sol import toy


@pytest.fixture(scope="module")
def trained():
  method = toy.method("frugal")
  generator = np.random.default_rng(0)
  draw = lambda *shape: generator.normal(size=shape).astype(np.float32)
  return artefact.Artefact(
    options=Options(preset="J-2L", width=16).filled("frugal"),
    mode="frugal",
    model="toy",
    params=policy.init(method.policy, jax.random.key(0)),
    stats=InputStats(
      hidden=draw(2, 32),
      embed=draw(2, 32),
      scalars=draw(2, 9),
      damage=draw(8, 3),
    ),
    prices=draw(5),
    spent=draw(5),
    scalar_stats=draw(2, 9),
    coefficients=draw(10, 3),
  )


def test_what_is_saved_comes_back(trained, tmp_path):
  home = tmp_path / "deep" / "policy"
  artefact.save(home, trained)
  assert {p.name for p in home.iterdir()} == {
    "policy.json",
    "policy.safetensors",
  }
  found = artefact.load(home)
  for field in dataclasses.fields(trained):
    one, other = getattr(trained, field.name), getattr(found, field.name)
    if field.name in ("options", "mode", "model"):
      assert one == other
    else:
      chex.assert_trees_all_equal(other, one)
  # It is a policy as it stands.
  model = policy.bind(toy.method("frugal").policy, found.params)
  assert model.head.kernel.shape == (16, trained.params["head"]["bias"].size)


def test_a_run_and_an_older_file_are_read(trained, tmp_path):
  """Options that the file does not know take the values of its mode."""
  costs = np.linspace(0.7, 1, 8).astype(np.float32)
  kept = dataclasses.replace(trained, action_costs=costs)
  artefact.save(tmp_path / "policy", kept)
  np.testing.assert_array_equal(load_policy(tmp_path).action_costs, costs)
  path = tmp_path / "policy" / "policy.json"
  meta = json.loads(path.read_text())
  for name in ("policy", "hold", "budget_unit", "refresh"):
    del meta["options"][name]
  path.write_text(json.dumps(meta))
  found = load_policy(tmp_path / "policy").options
  assert found == trained.options and found.refresh == "every:16"


def test_a_policy_without_prices_comes_back(trained, tmp_path):
  none = np.zeros((0,), np.float32)
  artefact.save(tmp_path, dataclasses.replace(trained, prices=none, spent=none))
  found = artefact.load(tmp_path)
  assert found.prices.shape == found.spent.shape == (0,)


def test_the_same_policy_gives_the_same_bytes(trained, tmp_path):
  for name in ("a", "b"):
    artefact.save(tmp_path / name, trained)
  for name in ("policy.json", "policy.safetensors"):
    one, other = (tmp_path / run / name for run in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_a_missing_file_says_what_to_do(trained, tmp_path, name):
  artefact.save(tmp_path, trained)
  (tmp_path / name).unlink()
  with pytest.raises(InputError, match="missing: train") as error:
    artefact.load(tmp_path)
  assert name in str(error.value)


def _cut(path):
  path.write_bytes(path.read_bytes()[:-7])


def _empty(path):
  path.write_bytes(b"")


def _garble(path):
  path.write_bytes(b"\xff\xfe\x00\x01" * 40)


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
@pytest.mark.parametrize("damage", [_cut, _empty, _garble])
def test_a_damaged_file_is_named(trained, tmp_path, name, damage):
  artefact.save(tmp_path, trained)
  damage(tmp_path / name)
  with pytest.raises(InputError, match="damaged") as error:
    artefact.load(tmp_path)
  assert name in str(error.value)


@pytest.mark.parametrize(
  "change",
  [
    lambda meta: meta.pop("mode"),
    lambda meta: meta["options"].update(colour="red"),
  ],
)
def test_a_policy_of_another_version_is_damaged(trained, tmp_path, change):
  artefact.save(tmp_path, trained)
  meta = json.loads((tmp_path / "policy.json").read_text())
  change(meta)
  (tmp_path / "policy.json").write_text(json.dumps(meta))
  with pytest.raises(InputError, match="damaged"):
    artefact.load(tmp_path)
