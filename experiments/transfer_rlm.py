"""Few numbers of one task, many of others: regression LMs beside their peers.

  python experiments/transfer_rlm.py --path=nasbench201.csv.gz \
    --flagfile=experiments/flagfiles/rlm_latency.flags --result=latency.json

A model begins at random ("scratch"), or learns the numbers of --sources first
("pretrained"). Settings come from the flags, or from the best results of other
targets (--settings_from): no tested row has a say. Errors on --folds of the few
numbers widen 90% intervals. Parts stay in --workdir: a killed run goes on, and
models and peers of several machines (--peers=none, --models=none) are joined in
one folder. Half an hour on a CPU core; flagfiles say what to expect.
"""

import dataclasses
import pathlib
import time

from absl import flags

import cli
import option_flags
from models.errors import InputError
from research.regression_lm.transfer.options import Settings, Tried
from research.results import files as artefacts

_SETS = ("nasbench201", "kernel_tuner", "csv")
_DATA = cli.choice("data", "nasbench201", "set", _SETS)
_PATH = flags.DEFINE_string("path", None, "file of the set")
_PROXIES = flags.DEFINE_string("proxies", None, "JSON of zero-cost proxies")
_MADE_UP = cli.integer(
  "made_up", 0, "columns made_up_0, ... drawn from the first target's form", 0
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/transfer", "folder of the run")
_TARGETS = flags.DEFINE_list("targets", [], "columns, as name or name:form")
_SOURCES = flags.DEFINE_list("sources", [], "likewise; lat_* takes all such")
_SIZES = cli.numbers("sizes", [20], "numbers of examples", 2, 1e6)
_SEEDS = cli.integer("seeds", 3, "splits", 1, 1000)
_TESTS = cli.integer("tests", 3000, "test rows at most", 2)
_SOURCE_ROWS = cli.integer(
  "source_rows", 0, "rows whose sources are known, none tested; 0 for all", 0
)
_MODELS = flags.DEFINE_list(
  "models", ["scratch"], "scratch, pretrained, or none"
)
_PEERS = flags.DEFINE_list("peers", ["XGBoost"], "beside the models, or none")
_FROM = flags.DEFINE_list(
  "settings_from", [], "results: take the settings of the best of them"
)
_MEASURE = cli.choice("measure", "kendall", "best by", ("kendall", "spearman"))
_JUDGED = flags.DEFINE_string(
  "judged", None, "method whose measure is the score; all models if not given"
)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
_OPTIONS = option_flags.define(Settings)


def _settings() -> tuple[Settings, dict]:
  """The settings, and how they were chosen."""
  flagged = Settings(**{name: flag.value for name, flag in _OPTIONS.items()})
  present = {
    name: flag.value
    for name, flag in _OPTIONS.items()
    if flags.FLAGS[name].present
  }
  found = {}
  for name in _FROM.value:
    tried = Tried.of_result(name)
    if set(tried.targets) & {t.partition(":")[0] for t in _TARGETS.value}:
      raise InputError(f"{name}: is of the target, which must have no say")
    found[pathlib.Path(name).name] = tried
  if not found:
    return flagged, {"how": "as the flags say"}
  best = max(found, key=lambda name: found[name].score)
  # Flags that are given beside the results, such as a larger ensemble, win.
  return dataclasses.replace(found[best].settings, **present), {
    "how": f"best mean {_MEASURE.value} on other targets",
    "best": best,
    "tried": {
      name: {
        "score": tried.score,
        "targets": tried.targets,
        **dataclasses.asdict(tried.settings),
      }
      for name, tried in found.items()
    },
  }


def main(_) -> None:
  """Runs; see the module's docstring."""
  began = time.perf_counter()
  if not _PATH.value or not _TARGETS.value:
    raise InputError("give --path, the file of the set, and --targets")
  from research.predictors import peers, text_forms
  from research.regression_lm.transfer import names

  others = peers.asked(_PEERS.value, names.PEERS)
  models = peers.asked(_MODELS.value, names.MODELS, "model")
  settings, chosen = _settings()
  cli.check_path(_PATH.value)
  from research.core import workdir as workdir_lib
  from research.regression_lm.transfer import run as transfer_run
  from research.regression_lm.transfer import setup as transfer_setup
  from research.results import predictions

  known = _TARGETS.value + _SOURCES.value
  facts = text_forms.load(_DATA.value, _PATH.value, _PROXIES.value, known)
  targets = transfer_setup.tasks(facts, _TARGETS.value)
  facts = text_forms.with_made_up(facts, targets[0].form, _MADE_UP.value)
  setup = transfer_setup.make(
    settings,
    targets=targets,
    sources=transfer_setup.tasks(facts, _SOURCES.value, _TARGETS.value),
    sizes=[int(size) for size in _SIZES.value],
    seeds=_SEEDS.value,
    tests=_TESTS.value,
    source_rows=_SOURCE_ROWS.value,
  )
  workdir = pathlib.Path(_WORKDIR.value)
  deciding = {"data": _DATA.value, "tests": setup.tests}
  deciding |= {"source_rows": setup.source_rows, "largest": max(setup.sizes)}
  deciding["targets"] = _TARGETS.value
  workdir_lib.claim(workdir, deciding)
  for model in models:
    workdir_lib.claim(workdir / model, dataclasses.asdict(settings))
  rows = transfer_run.run(setup, facts, workdir, models, others, cli.say)
  lines = predictions.means_over_seeds(rows)
  columns = "target train method kendall spearman crps".split()
  covered = ["coverage of 0.9", "coverage of 0.9, calibrated"]
  cli.show(lines, columns + covered)
  seconds = time.perf_counter() - began
  how = {"settings": dataclasses.asdict(settings), "chosen": chosen,
         "device": artefacts.device(), "seconds": seconds}  # fmt: skip
  transfer_run.keep(workdir, models, how)
  if _RESULT.value:
    judged = [_JUDGED.value] if _JUDGED.value else transfer_run.methods(models)
    score = transfer_run.score(lines, judged, _MEASURE.value)
    print(f"score: {score}")
    cli.keep(
      _RESULT.value, rows, began, summary=lines, score=score,
      settings=how["settings"], models=transfer_run.kept(workdir),
    )  # fmt: skip


if __name__ == "__main__":
  cli.run(main)
