"""All options of a SOL run as one frozen dataclass, with two named modes.

Scripts make a flag of every field; a field that is None takes its value from
the mode. `published` is the released method (arXiv 2605.10875 and its
configs); `frugal` is Frugax's own.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from models.errors import InputError
from models.transformer_config import TransformerConfig
from research.core.options import option

if TYPE_CHECKING:
  from research.sol.learn import Method

# Begins the name of a text that the model samples itself, see `corpus`.
SAMPLES = "samples:"


def texts_of_files(names: Sequence[str]) -> list[str]:
  """Those of the texts that no model samples."""
  return [name for name in names if not name.startswith(SAMPLES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of a run; every attribute is described by its metadata."""

  preset: str | None = option(None, "action table, see research/sol/actions.py")
  begin: int | None = option(
    None,
    "token that every window begins with; -1 leaves the text's own, but with "
    "Gemma 3, whose begin token it then is",
    lower=-1,
    upper=2**31 - 1,
  )
  page_size: int | None = option(
    None, "tokens a key page; the preset's by default", lower=1, upper=256
  )
  sink: bool | None = option(None, "always keep the first and the current page")
  shared_pages: bool | None = option(
    None, "query heads that share a key head share its pages, too"
  )
  prune: str | None = option(
    None, "MLP channels that rho drops", choices=("input", "intermediate")
  )
  context: int | None = option(
    None,
    "tokens before an episode; the preset's by default",
    lower=16,
    upper=131072,
  )
  horizon: int | None = option(
    None, "steps of an episode; the preset's by default", lower=1, upper=1024
  )
  windows: int | None = option(None, "windows an update", lower=1, upper=4096)
  episodes: int | None = option(None, "episodes a window", lower=1, upper=256)
  group_size: int | None = option(
    None, "rollouts of an episode; the preset's by default", lower=2, upper=1024
  )
  updates: int | None = option(None, "GRPO updates", lower=0, upper=10**7)
  learning_rate: float | None = option(None, "of GRPO", lower=0.0, upper=1.0)
  schedule: str | None = option(
    None, "of the learning rate", choices=("constant", "cosine")
  )
  clip_norm: float | None = option(
    None, "of the gradient", lower=0.0, upper=1e6
  )
  inner_epochs: int | None = option(
    None, "optimizer steps on each batch of rollouts", lower=1, upper=64
  )
  warm_windows: int | None = option(
    None,
    "windows whose tokens the policy is fitted to before GRPO",
    lower=0,
    upper=10**7,
  )
  warm_epochs: int | None = option(
    None, "passes of the warm start over its tokens", lower=1, upper=1000
  )
  warm_batch: int | None = option(
    None,
    "episodes of an optimizer step of the warm start",
    lower=1,
    upper=10**6,
  )
  warm_learning_rate: float | None = option(
    None, "of the warm start", lower=0.0, upper=1.0
  )
  budget: str | None = option(
    None,
    "what the policy is asked for: a price a unit of cost, or mean targets",
    choices=("price", "targets"),
  )
  gamma: float | None = option(
    None, "discount of the reward to go", lower=0.0, upper=1.0
  )
  reward: str | None = option(
    None,
    "of a step: the true token's log-likelihood, or minus the divergence from "
    "the dense model's prediction, which has far less noise",
    choices=("label", "divergence"),
  )
  level: str | None = option(
    None,
    "group baseline at each step or for the episode",
    choices=("process", "outcome"),
  )
  normalise: str | None = option(
    None,
    "of advantages within the group; gdpo takes the z-scores of the language "
    "model's reward and of the budget's apart",
    choices=("center", "zscore", "gdpo"),
  )
  whiten: bool | None = option(None, "whiten advantages over the batch")
  credit: str | None = option(
    None,
    "reward to go, or with later actions' own effects taken out; the same at "
    "gamma=0",
    choices=("return", "residual"),
  )
  clip_low: float | None = option(
    None,
    "ratio clip below 1; how often it acts is logged as clip_share",
    lower=0.0,
    upper=1.0,
  )
  clip_high: float | None = option(
    None, "ratio clip above 1; likewise", lower=0.0, upper=10.0
  )
  entropy_coef: float | None = option(
    None, "weight of the entropy bonus", lower=0.0, upper=10.0
  )
  kl_coef: float | None = option(
    None,
    "weight of the k3 divergence from the policy before GRPO",
    lower=0.0,
    upper=100.0,
  )
  temperature: float | None = option(
    None, "of the policy's softmax", lower=1e-4, upper=100.0
  )
  width: int | None = option(None, "of the policy", lower=8, upper=8192)
  policy: str | None = option(
    None,
    "the network, the nine scalars through a small MLP, or the same with a "
    "low-rank head on a hidden state",
    choices=("large", "scalars", "head"),
  )
  policy_rank: int | None = option(
    None, "rank of --policy=head", lower=1, upper=1024
  )
  policy_source: str | None = option(
    None,
    "what --policy=head reads: the last hidden state of the token before, or "
    "the embedding of the token just read",
    choices=("hidden", "embed"),
  )
  policy_bits: int | None = option(
    None, "of a light policy's weights: 8 or 16", lower=8, upper=16
  )
  hold: int | None = option(
    None, "tokens that a decision holds for", lower=1, upper=1024
  )
  budget_unit: str | None = option(
    None,
    "what budgets and prices are of: the net keep rate, or a share of the "
    "dense step's FLOPs, bytes or measured time, with the policy's own cost "
    "and the refresh's",
    choices=("net_keep", "flops", "bytes", "ms"),
  )
  profile: str | None = option(
    None, "measured times of actions, for --budget_unit=ms: a file"
  )
  refresh: str | None = option(
    None,
    "every:N replays every N tokens densely, which is the horizon; none never "
    "does",
  )
  drop_dead: bool | None = option(
    None, "groups whose rollouts do not differ count in no mean"
  )
  variance_share: float | None = option(
    None,
    "share of the episodes of an update that count, those whose rewards vary "
    "the most",
    lower=0.0,
    upper=1.0,
  )
  surprise: bool | None = option(
    None, "the policy sees surprise and entropy of the last tokens"
  )
  standardise: bool | None = option(
    None, "standardise the policy's inputs by training text"
  )
  cached_windows: int | None = option(
    None,
    "train on this many windows whose prefix is computed once and kept; 0 "
    "takes fresh windows at every update",
    lower=0,
    upper=10**6,
  )

  def filled(self, mode: str) -> Self:
    """Fills what is None from the mode, then from the preset.

    Raises:
      InputError: the mode or the preset is unknown.
    """
    if mode not in MODES:
      raise InputError(f"mode={mode!r} is unknown: take one of {list(MODES)}")
    given = {k: v for k, v in vars(self).items() if v is not None}
    merged = MODES[mode] | given
    from research.sol import actions

    table = actions.preset(merged["preset"])
    published = {
      "page_size": table.page_size,
      "context": table.context,
      "horizon": table.horizon,
      "group_size": table.group_size,
      "windows": table.batch_size,
    }
    if merged["refresh"].startswith("every:"):
      merged["horizon"] = _every(merged["refresh"], merged.get("horizon"))
    filled = type(self)(**(published | merged))
    if filled.refresh == "every":
      refresh = f"every:{filled.horizon}"
      filled = dataclasses.replace(filled, refresh=refresh)
    return filled

  def method(
    self,
    config: TransformerConfig,
    attention: str | None,
    action_costs: Sequence[float] = (),
  ) -> "Method":
    """The method these (filled) options describe.

    Args:
      config: of the frozen LLM.
      attention: implementation of its dense attention.
      action_costs: A numbers in the budget's unit; empty for net keep.

    Raises:
      InputError: options do not fit each other or the LLM.
    """
    from research.sol import actions
    from research.sol.learn import Method
    from research.sol.policy import PolicyConfig
    from research.sol.rollout import Setup
    from research.sol.windows import Layout

    table = actions.preset(self.preset)
    layout = Layout(
      context=self.context, horizon=self.horizon, episodes=self.episodes
    )
    layout.check(self.page_size)
    if layout.length > config.max_position:
      raise InputError(
        f"context={self.context} with episodes={self.episodes} needs "
        f"{layout.length} positions, the model has {config.max_position}: "
        "take a shorter context"
      )
    if self.warm_windows and self.budget == "targets":
      raise InputError(
        "warm_windows needs budget=price: it knows no targets; set "
        "warm_windows=0"
      )
    if self.warm_windows and self.reward == "label":
      raise InputError(
        "warm_windows needs reward=divergence, which it is fitted to; set "
        "warm_windows=0"
      )
    begin = None if self.begin in (None, -1) else self.begin
    if begin is not None and begin >= config.vocab_size:
      raise InputError(
        f"begin={self.begin}: the model has {config.vocab_size} tokens"
      )
    self._check_policy()
    heads = 4 if self.width % 4 == 0 else 1
    return Method(
      setup=Setup(
        config=config,
        table=table,
        horizon=self.horizon,
        page_size=self.page_size,
        keep_sink_and_current=self.sink,
        shared_pages=self.shared_pages,
        prune=self.prune,
        attention=attention,
        begin=begin,
      ),
      policy=PolicyConfig(
        table=table,
        lm_width=config.d_model,
        horizon=self.horizon,
        head="gain" if self.budget == "price" else "published",
        width=self.width,
        num_heads=heads,
        surprise=self.surprise,
        temperature=self.temperature,
        kind=self.policy,
        rank=self.policy_rank,
        source=self.policy_source,
        hold=self.hold,
        weight_bits=self.policy_bits,
        action_costs=tuple(float(x) for x in action_costs),
      ),
      layout=layout,
      group_size=self.group_size,
      reward=self.reward,
      budget=self.budget,
      gamma=self.gamma,
      level=self.level,
      normalise=self.normalise,
      drop_dead=self.drop_dead,
      variance_share=self.variance_share,
      whiten=self.whiten,
      credit=self.credit,
      clip_low=self.clip_low,
      clip_high=self.clip_high,
      entropy_coef=self.entropy_coef,
      kl_coef=self.kl_coef,
      inner_epochs=self.inner_epochs,
      target_low=table.target_low,
    )

  def _check_policy(self) -> None:
    """Raises InputError where policy, budget and refresh do not fit."""
    light = self.policy != "large"
    if light and self.budget == "targets":
      raise InputError(
        f"policy={self.policy} needs budget=price: its head predicts damages"
      )
    if not light and (self.hold > 1 or self.policy_bits < 16):
      raise InputError("hold and policy_bits are of policy=scalars or head")
    if self.policy_bits not in (8, 16):
      raise InputError(f"policy_bits={self.policy_bits} is neither 8 nor 16")
    if self.horizon % self.hold:
      raise InputError(
        f"horizon={self.horizon} is no multiple of hold={self.hold}"
      )
    if self.budget_unit != "net_keep" and self.reward != "divergence":
      raise InputError("budget_unit needs budget=price and reward=divergence")
    if (self.budget_unit == "ms") != bool(self.profile):
      raise InputError("budget_unit=ms and profile=FILE need each other")
    if not 0 < self.variance_share:
      raise InputError("variance_share=0 leaves no episode")
    if self.refresh != "none" and not self.refresh.startswith("every"):
      raise InputError(f"refresh={self.refresh!r} is neither none nor every:N")


def _every(refresh: str, horizon: int | None) -> int:
  """N of "every:N"; raises InputError where it is no horizon."""
  number = refresh.removeprefix("every:")
  if not number.isdecimal() or not 1 <= int(number) <= 1024:
    raise InputError(f"refresh={refresh!r}: N of every:N is 1 to 1024")
  if horizon is not None and horizon != int(number):
    raise InputError(f"refresh={refresh} contradicts horizon={horizon}")
  return int(number)


_COMMON: dict[str, Any] = {
  "begin": -1,
  "shared_pages": False,
  "prune": "input",
  "policy": "large",
  "policy_rank": 4,
  "policy_source": "hidden",
  "policy_bits": 16,
  "hold": 1,
  "budget_unit": "net_keep",
  "profile": "",
  "refresh": "every",
  "drop_dead": False,
  "variance_share": 1.0,
  "episodes": 1,
  "clip_norm": 2.0,
  "level": "process",
  "normalise": "center",
  "whiten": True,
  "clip_low": 0.2,
  "clip_high": 0.2,
  "kl_coef": 0.0,
  "gamma": 0.85,
  "width": 512,
  "cached_windows": 0,
}

MODES: dict[str, dict[str, Any]] = {
  "published": _COMMON
  | {
    "preset": "J-FL",
    "sink": False,
    "updates": 10000,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "inner_epochs": 1,
    "warm_windows": 0,
    "warm_epochs": 3,
    "warm_batch": 16,
    "warm_learning_rate": 1e-3,
    "budget": "targets",
    "reward": "label",
    "credit": "return",
    "entropy_coef": 0.05,
    "temperature": 1.3,
    "surprise": False,
    "standardise": False,
  },
  "frugal": _COMMON
  | {
    "preset": "J-FL",
    "sink": True,
    "updates": 1000,
    "learning_rate": 3e-4,
    "schedule": "cosine",
    "inner_epochs": 2,
    "warm_windows": 256,
    "warm_epochs": 3,
    "warm_batch": 16,
    "warm_learning_rate": 1e-3,
    "budget": "price",
    "reward": "divergence",
    "credit": "residual",
    "gamma": 0.0,
    "entropy_coef": 0.0,
    "temperature": 0.02,
    "surprise": True,
    "standardise": True,
  },
}
