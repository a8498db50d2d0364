"""Evaluates a compute policy (SOL) against every baseline on held-out text.

  python experiments/eval_sol.py \
    --flagfile=experiments/flagfiles/sol_smollm2_cpu_eval.flags

Reads `<workdir>/policy` and, of other training seeds, `<workdir>/seed*/policy`,
writes `eval.json`, `pareto.png` and `report.md` beside it. Perplexity under the
T-step refresh protocol, and without a refresh; baselines are matched to the
policy's realised budget on every axis, and compared at equal FLOPs and bytes;
95% intervals by paired bootstrap over windows. Nine minutes on two CPU cores:
perplexities of 31.7, 27.0 and 24.7, of a fixed budget 34.3, 28.4 and 24.9.
"""

import pathlib
import time

from absl import flags

import cli
from models.errors import InputError
from research.sol.options import texts_of_files

_MODEL = flags.DEFINE_string("model", "smollm2", "the frozen model")
_WORKDIR = flags.DEFINE_string("workdir", "runs/sol", "folder of the run")
_POLICIES = flags.DEFINE_list(
  "policies", [], "NAME=WORKDIR of further policies for the same actions"
)
_TEXT = flags.DEFINE_string("text", "wikitext2:test", "held-out text")
_TRAIN_TEXT = flags.DEFINE_list(
  "calibration_text",
  ["wikitext2:train"],
  "training text on which thresholds are calibrated",
)
_ASKED = cli.numbers(
  "asked", [0.85, 0.9, 0.95], "net keep rates to ask for", 0.0, 1.0
)
_THRESHOLDS = flags.DEFINE_list(
  "thresholds",
  ["surprise", "entropy", "hidden drift"],
  "threshold baselines; empty for none",
)
_REGRESSION = flags.DEFINE_bool(
  "regression", True, "the counterfactual regression"
)
_POOL = cli.integer("random_pool", 32, "random schedules a budget", 0, 10000)
_STATIC = flags.DEFINE_bool(
  "static", True, "single static actions after the literature"
)
_CANDIDATES = cli.integer(
  "static_candidates", 128, "static actions to try for each measure of cost", 2
)
_WITHOUT_REFRESH = flags.DEFINE_bool(
  "without_refresh", True, "play the text without a refresh, too"
)
_CONTEXT = cli.integer("context", None, "tokens before an episode", 16)
_EPISODES = cli.integer("episodes", 32, "episodes of a window", 1)
_WINDOWS = cli.integer(
  "max_windows", None, "evaluate so many windows, spread over the text", 2
)
_CALIBRATION = cli.integer("calibration_windows", 64, "windows", 1)
_BATCH = cli.integer("window_batch", 8, "windows alive at a time", 1)
_ROWS = cli.integer("max_rows", 4096, "rollouts of one call", 1)
_DTYPE = cli.choice(
  "dtype", "float32", "of the frozen model", ("float32", "bfloat16")
)
_PRECISION = cli.choice(
  "matmul_precision",
  "highest",
  "of float32 matrix products",
  ("highest", "tensorfloat32", "default"),
)
_SEED = cli.integer("seed", 0, "of random schedules", 0, 2**31 - 1)
_RESULT = flags.DEFINE_string(
  "result", None, "write the result JSON here too, such as a results folder"
)


def main(_) -> None:
  """Evaluates; see the module's docstring."""
  began = time.perf_counter()
  workdir, texts = pathlib.Path(_WORKDIR.value), [_TEXT.value]
  cli.check_path(workdir / "policy", "is missing: train it with train_sol.py")
  cli.check_there([_MODEL.value], texts_of_files([*texts, *_TRAIN_TEXT.value]))
  import jax  # after the flags were checked: a mistake is answered at once
  import jax.numpy as jnp

  from models import convert
  from research.core import progress
  from research.sol import comparison, corpus, reporting

  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  artefacts = reporting.load_policies(workdir, _POLICIES.value)
  ours = next(iter(artefacts.values()))
  cli.say(f"reading {_MODEL.value}")
  checkpoint = convert.load(_MODEL.value, jnp.dtype(_DTYPE.value))
  if checkpoint.name != ours.model:
    raise InputError(
      f"{workdir} was trained on {ours.model}, --model is {checkpoint.name}: "
      "give the same model"
    )
  plan = comparison.Plan(
    asked=_ASKED.value,
    thresholds=_THRESHOLDS.value,
    regression=_REGRESSION.value,
    random_pool=_POOL.value,
    static=_STATIC.value,
    static_candidates=_CANDIDATES.value,
    without_refresh=_WITHOUT_REFRESH.value,
    window_batch=_BATCH.value,
    max_rows=_ROWS.value,
    seed=_SEED.value,
  )
  method, cover, calibration = reporting.prepare(
    ours,
    checkpoint,
    corpus.load_tokens(texts, checkpoint, folder=workdir),
    corpus.load_tokens(_TRAIN_TEXT.value, checkpoint, folder=workdir),
    context=_CONTEXT.value,
    episodes=_EPISODES.value,
    max_windows=_WINDOWS.value,
    calibration_windows=_CALIBRATION.value,
  )
  cli.say(f"{cover.weights.sum():,.0f} tokens in {cover.num_windows} windows")

  text = pathlib.Path(_TEXT.value).name  # A folder says nothing to others.

  def keep(found):
    rows = reporting.rows(
      found, method, checkpoint, ours, plan.asked, text, _SEED.value
    )
    seconds = time.perf_counter() - began
    for path in filter(None, (workdir / "eval.json", _RESULT.value)):
      cli.write_result(path, rows, cli.command(), seconds)
    return rows

  subject = comparison.Subject(
    method=method,
    lm=checkpoint.params,
    artefacts=artefacts,
    cover=cover,
    calibration=calibration,
  )
  found = comparison.compare(subject, plan, cli.say, progress.counter, keep)
  reporting.write(workdir, keep(found), checkpoint.name, text, cli.say)


if __name__ == "__main__":
  cli.run(main)
