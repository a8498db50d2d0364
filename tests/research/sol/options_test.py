import dataclasses

import pytest

from models.errors import InputError
from models.transformer_config import TransformerConfig
from research.sol import actions
from research.sol.options import MODES, Options

LLAMA = TransformerConfig.llama3_2_1b()
TINY = TransformerConfig.tiny()


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_fills_every_option(mode):
  options = Options().filled(mode)
  missing = [name for name, value in vars(options).items() if value is None]
  assert not missing
  assert options.filled(mode) == options
  options.method(LLAMA, None)


@pytest.mark.parametrize("mode", MODES)
def test_modes_name_only_options_and_keep_their_bounds(mode):
  fields = {field.name: field for field in dataclasses.fields(Options)}
  assert MODES[mode].keys() <= fields.keys()
  for name, value in vars(Options().filled(mode)).items():
    bounds = fields[name].metadata["bounds"]
    assert fields[name].metadata["text"]
    if "choices" in bounds:
      assert value in bounds["choices"]
    if "lower" in bounds:
      assert bounds["lower"] <= value <= bounds["upper"]


def test_the_published_mode_is_the_released_method():
  options = Options().filled("published")
  method = options.method(LLAMA, None)
  assert (options.context, options.horizon) == (1024, 16)
  assert (options.windows, options.group_size, options.page_size) == (8, 32, 8)
  assert (options.learning_rate, options.schedule) == (1e-4, "constant")
  assert (options.clip_norm, options.inner_epochs) == (2.0, 1)
  assert options.warm_windows == 0 and not options.standardise
  assert (method.clip_low, method.clip_high) == (0.2, 0.2)
  assert (method.entropy_coef, method.kl_coef) == (0.05, 0.0)
  assert (method.gamma, method.level) == (0.85, "process")
  assert (method.normalise, method.whiten) == ("center", True)
  assert method.credit == "return" and method.budget == "targets"
  assert method.penalty_weights == (100.0, 100.0, 200.0)
  assert method.tolerance == 0.02
  assert method.target_low == (0.1, 0.4, 5 / 16)
  assert method.setup.table.size == 1560
  assert method.setup.prune == "input"
  assert not method.setup.keep_sink_and_current
  policy = method.policy
  assert (policy.head, policy.width, policy.num_heads) == ("published", 512, 4)
  assert policy.temperature == 1.3 and not policy.surprise
  assert policy.lm_width == 2048


@pytest.mark.parametrize(
  "preset", ["J-2L", "FL-R64", "3B", "reasoning", "Q5Q16"]
)
def test_what_is_not_given_comes_from_the_preset(preset):
  table = actions.preset(preset)
  options = Options(preset=preset).filled("published")
  assert options.page_size == table.page_size
  assert options.context == table.context
  assert options.horizon == table.horizon
  assert options.group_size == table.group_size
  assert options.windows == table.batch_size


def test_what_is_given_wins():
  options = Options(
    preset="J-2L", horizon=32, gamma=0.0, whiten=False, warm_windows=0
  ).filled("frugal")
  assert (options.horizon, options.gamma, options.whiten) == (32, 0.0, False)
  assert options.warm_windows == 0
  method = options.method(LLAMA, "xla")
  assert method.setup.horizon == method.policy.horizon == 32
  assert method.layout.horizon == 32
  assert method.setup.attention == "xla"


def test_unknown_names_list_the_valid_ones():
  with pytest.raises(InputError) as error:
    Options().filled("fast")
  assert all(mode in str(error.value) for mode in MODES)
  with pytest.raises(InputError, match="J-2L, J-3L, J-FL"):
    Options(preset="J-4L").filled("frugal")


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"context": 30}, "context=30 is no multiple of the page size 4"),
    ({"horizon": 6}, "horizon=6 is no multiple"),
    ({"context": 256}, "the model has 256"),
    ({"episodes": 50}, "episodes=50"),
    ({"warm_windows": 5}, "knows no targets; set warm_windows=0"),
    ({"warm_windows": 5, "budget": "price"}, "needs reward=divergence"),
  ],
)
def test_what_does_not_fit_together_is_told(changes, says):
  given = {"preset": "J-2L", "context": 32, "horizon": 8}
  options = Options(**(given | changes)).filled("published")
  with pytest.raises(InputError, match=says):
    options.method(TINY, None)


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"hold": 3, "policy": "head"}, "horizon=8 is no multiple of hold=3"),
    ({"hold": 2}, "hold and policy_bits are of policy=scalars or head"),
    ({"policy_bits": 9, "policy": "head"}, "neither 8 nor 16"),
    ({"budget_unit": "ms"}, "need each other"),
    ({"profile": "times.json"}, "need each other"),
    ({"refresh": "drift"}, "neither none nor every:N"),
    ({"variance_share": 0.0}, "leaves no episode"),
  ],
)
def test_policies_that_do_not_fit_are_told(changes, says):
  given = {"preset": "J-2L", "context": 32, "horizon": 8}
  options = Options(**(given | changes)).filled("frugal")
  with pytest.raises(InputError, match=says):
    options.method(TINY, None)


def test_a_published_policy_has_targets_in_net_keep_and_a_network():
  for changes in ({"policy": "head"}, {"budget_unit": "flops"}):
    options = Options(preset="J-2L", context=32, horizon=8, **changes)
    with pytest.raises(InputError, match="budget=price"):
      options.filled("published").method(TINY, None)


def test_a_refresh_sets_the_horizon():
  options = Options(preset="J-2L", refresh="every:32").filled("frugal")
  assert options.horizon == 32
  options = Options(preset="J-2L").filled("frugal")
  assert options.refresh == f"every:{options.horizon}"
  for refresh in ("every:x", "every:0", "every:4096"):
    with pytest.raises(InputError, match="N of every:N is 1 to 1024"):
      Options(preset="J-2L", refresh=refresh).filled("frugal")
  with pytest.raises(InputError, match="contradicts horizon=8"):
    Options(preset="J-2L", refresh="every:4", horizon=8).filled("frugal")


def test_a_narrow_policy_has_a_head_that_divides_it():
  for width, heads in ((16, 4), (10, 1)):
    options = Options(preset="J-2L", context=32, horizon=8, width=width)
    method = options.filled("published").method(TINY, None)
    assert method.policy.num_heads == heads
