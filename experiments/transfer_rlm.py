"""Few numbers of one task, many of others: regression LMs beside their peers.

  python experiments/transfer_rlm.py --path=nasbench201.csv.gz \
    --flagfile=experiments/flagfiles/rlm_latency.flags --result=latency.json

Your own few rows, after many of an older table with the same columns:

  python experiments/transfer_rlm.py --path=new.csv --source_paths=old.csv \
    --targets=ms --models=pretrained,scratch

A model begins at random ("scratch"), or learns the numbers of --sources first
("pretrained"). Settings come from the flags, or from the best results of other
targets (--settings_from): no tested row has a say. Errors on --folds of the few
numbers widen 90% intervals. Parts stay in --workdir: a killed run goes on, and
models and peers of several machines (--peers=none, --models=none) are joined in
one folder. Half an hour on a CPU core; flagfiles say what to expect. With --out
rows without numbers are predicted, and nothing is compared.
"""

import dataclasses
import pathlib
import time

from absl import flags

import cli
import transfer_flags
from models.errors import InputError
from research.results import files as artefacts

flags.adopt_module_key_flags(transfer_flags)
_PROXIES = flags.DEFINE_string("proxies", None, "JSON of zero-cost proxies")
_MADE_UP = cli.integer(
  "made_up", 0, "columns made_up_0, ... drawn from the first target's form", 0
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/transfer", "folder of the run")
_OUT = flags.DEFINE_string(
  "out", None, "of csv: file for predictions of rows whose targets are empty"
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "write over --out")
_SIZES = cli.integers("sizes", [20], "numbers of examples", 2, 1e6)
_SEEDS = cli.integer("seeds", 3, "splits", 1, 1000)
_TESTS = cli.integer("tests", 3000, "test rows at most", 2)
_SOURCE_ROWS = cli.integer(
  "source_rows", 0, "rows whose sources are known, none tested; 0 for all", 0
)
_MODELS = flags.DEFINE_list(
  "models", ["scratch"], "scratch, pretrained, or none"
)
_PEERS = flags.DEFINE_list("peers", ["XGBoost"], "beside the models, or none")
_JUDGED = flags.DEFINE_string(
  "judged", None, "method whose measure is the score; all models if not given"
)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def _predict(settings, own, out: pathlib.Path) -> None:
  """Writes predictions of the rows without numbers."""
  from research.regression_lm import written_rows
  from research.regression_lm.transfer import answers

  found = answers.predict(settings, own, cli.say)
  written_rows.write(
    out, found.rows, iter([found.lines()]), list(found.columns)
  )
  print(f"predictions of {len(found.rows)} rows: {out}")


def main(_) -> None:
  """Runs; see the module's docstring."""
  began = time.perf_counter()
  if not transfer_flags.PATH.value or not transfer_flags.TARGETS.value:
    raise InputError("give --path, the file of the set, and --targets")
  from research.predictors import peers, text_forms
  from research.regression_lm.transfer import names

  others = peers.asked(_PEERS.value, names.PEERS)
  models = peers.asked(_MODELS.value, names.MODELS, "model")
  settings, chosen = transfer_flags.settings()
  out = None
  if _OUT.value:
    from research.regression_lm import written_rows

    out = written_rows.check_out(_OUT.value, _OVERWRITE.value)
    if transfer_flags.DATA.value != transfer_flags.OWN:
      raise InputError("--out: --data=csv alone has new rows: take it")
  own = transfer_flags.own_tasks()
  if own:
    cli.say("\n".join(own.summary()))
  if out:
    _predict(settings, own, out)
    return
  from research.core import workdir as workdir_lib
  from research.regression_lm.transfer import run as transfer_run
  from research.regression_lm.transfer import setup as transfer_setup
  from research.results import predictions

  data, path = transfer_flags.DATA.value, transfer_flags.PATH.value
  named, learned = transfer_flags.TARGETS.value, transfer_flags.sources(own)
  if own:
    named, facts = own.targets, own.facts
  else:
    facts = text_forms.load(data, path, _PROXIES.value, named + learned)
  targets = transfer_setup.tasks(facts, named)
  facts = text_forms.with_made_up(facts, targets[0].form, _MADE_UP.value)
  setup = transfer_setup.make(
    settings,
    targets=targets,
    sources=transfer_setup.tasks(facts, learned, named),
    sizes=_SIZES.value,
    seeds=_SEEDS.value,
    tests=_TESTS.value,
    source_rows=_SOURCE_ROWS.value,
  )
  workdir = pathlib.Path(_WORKDIR.value)
  deciding = {"data": data, "tests": setup.tests}
  deciding |= {"source_rows": setup.source_rows, "largest": max(setup.sizes)}
  deciding["targets"] = transfer_flags.TARGETS.value
  if own:
    deciding["digest"] = own.digest()
  workdir_lib.claim(workdir, deciding)
  for model in models:
    workdir_lib.claim(workdir / model, dataclasses.asdict(settings))
  trained = transfer_run.untrained(setup, workdir, models)
  rows = transfer_run.run(setup, facts, workdir, models, others, cli.say)
  lines = predictions.means_over_seeds(rows)
  columns = "target train method kendall spearman crps".split()
  covered = ["coverage of 0.9", "coverage of 0.9, calibrated"]
  cli.show(lines, columns + covered)
  seconds = time.perf_counter() - began
  how = {"settings": dataclasses.asdict(settings), "chosen": chosen,
         "commit": artefacts.commit(), "device": artefacts.device(),
         "seconds": seconds}  # fmt: skip
  transfer_run.keep(workdir, trained, how)
  if _RESULT.value:
    judged = [_JUDGED.value] if _JUDGED.value else transfer_run.methods(models)
    score = transfer_run.score(lines, judged, transfer_flags.MEASURE.value)
    print(f"score: {score}")
    cli.keep(
      _RESULT.value, rows, began, summary=lines, score=score,
      settings=how["settings"], models=transfer_run.kept(workdir),
    )  # fmt: skip


if __name__ == "__main__":
  cli.run(main)
