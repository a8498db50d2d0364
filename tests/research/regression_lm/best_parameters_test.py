import jax
import numpy as np
import pytest

from models.errors import InputError
from research.regression_lm.best_parameters import Best
from tests.research.regression_lm import toy


def test_the_best_is_kept_also_over_a_restart(tmp_path):
  path = tmp_path / "best.safetensors"
  model = toy.model()
  first, second, third = (toy.params(model, seed) for seed in range(3))
  best = Best(path)
  assert best.loss is None
  best.offer(10, 0.1 + 0.2, first)
  best.offer(20, 0.5, second)
  again = Best(path)
  assert again.loss == 0.1 + 0.2
  step, found = again.load(third)
  assert step == 10
  jax.tree.map(np.testing.assert_array_equal, found, first)
  # The same evaluation once more changes nothing; a better one does.
  again.offer(10, 0.1 + 0.2, second)
  assert again.load(third)[0] == 10
  again.offer(30, 0.2, second)
  jax.tree.map(np.testing.assert_array_equal, again.load(third)[1], second)
  assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_damage_and_other_models_are_told(tmp_path):
  path = tmp_path / "best.safetensors"
  Best(path).offer(1, 1.0, toy.params(toy.model()))
  other = toy.params(toy.model(encoder_layers=2))
  with pytest.raises(InputError, match="is of another model"):
    Best(path).load(other)
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(InputError, match="is damaged"):
    Best(path)


def test_the_best_of_another_run_is_found_out(tmp_path):
  path = tmp_path / "best.safetensors"
  (tmp_path / "flags.json").write_text('{"seed": 0}')
  Best(path).offer(1, 1.0, toy.params(toy.model()))
  assert Best(path).loss == 1.0
  (tmp_path / "flags.json").write_text('{"seed": 1}')
  with pytest.raises(InputError, match="is of a run with other flags"):
    Best(path)
