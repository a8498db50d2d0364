"""Writes random JAX programs, compiles and times them: a data set of its own.

  JAX_PLATFORMS=cpu python experiments/make_program_metrics.py --count=12000 \
    --workers=15 --workdir=runs/programs --output=runs/programs.jsonl.xz \
    --result=runs/programs.json

Each row has a program as source (plain, and with shapes as comments), jaxpr and
StableHLO; FLOPs, bytes and memory as its compiler counts them; and the least of
many times of it, twice. About 0.3 s a program and core. Interrupted, the same
command goes on; with a larger --count, or where --seconds were over, it adds to
what is there. Every process has a core of its own, and XLA so one thread: leave
a core to the system. On a GPU: --workers=1.
"""

import collections
import dataclasses
import pathlib
import time

from absl import flags

import cli
from models.errors import InputError

_COUNT = cli.integer("count", 12000, "programs, before duplicates go", 1, 10**7)
_SEED = cli.integer("seed", 0, "of the programs", 0)
_WORKERS = cli.integer("workers", 1, "processes, each on its core", 1, 4096)
_LIMIT = cli.number("limit", 30.0, "seconds of one program at most", 0.1)
_SECONDS = cli.number(
  "seconds", None, "after which no program is begun; the set is those before", 0
)
_REPEATS = cli.integer("repeats", 30, "times, of which the least counts", 1)
_AGAIN = cli.number(
  "again", 0.05, "share of programs that another process times too", 0.0, 1.0
)
_WORKDIR = flags.DEFINE_string(
  "workdir", "runs/programs", "what is done so far"
)
_VIEWS = flags.DEFINE_list(
  "views",
  ["source", "typed", "jaxpr", "stablehlo"],
  "texts of a row in --output: without the last two it is a seventh as large",
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "file to write: .jsonl, .jsonl.gz or .jsonl.xz"
)
_RESULT = flags.DEFINE_string("result", None, "JSON file of the summary")


def main(_) -> None:
  """Measures; see the module's docstring."""
  began = time.perf_counter()
  if not _OUTPUT.value:
    raise InputError("--output: give the file to write, such as x.jsonl.xz")
  from research.program_metrics import dataset  # Mistakes are told at once.

  output = pathlib.Path(_OUTPUT.value)
  dataset.check_name(output)
  dataset.check_views(_VIEWS.value)
  workdir = pathlib.Path(_WORKDIR.value)

  from research.core import workdir as workdir_lib
  from research.program_metrics import collect, grammar, measure, worker

  plan = collect.Plan(
    seed=_SEED.value,
    count=_COUNT.value,
    workers=_WORKERS.value,
    limit=_LIMIT.value,
    timing=measure.Timing(repeats=_REPEATS.value),
    seconds=_SECONDS.value,
  )
  given = {"seed": plan.seed, "limit": plan.limit, "again": _AGAIN.value}
  given |= {"repeats": plan.timing.repeats, "grammar": grammar.VERSION}
  workdir_lib.claim(workdir, given)
  rows = collect.collect(plan, workdir / "programs")
  failures = collections.Counter(
    row["failure"] for row in rows if "failure" in row
  )
  measured = [row for row in rows if "failure" not in row]
  kept = dataset.without_duplicates(measured)
  if not kept:
    raise InputError(f"no program of {len(rows)} could be measured: {failures}")
  only = tuple(
    row["index"] for row in kept if dataset.in_share(row, "again", _AGAIN.value)
  )
  other = dataclasses.replace(plan, only=only, seconds=None)
  again = collect.collect(other, workdir / "again", "again")
  times = {row["index"]: row.get("latency_us") for row in again}
  kept = dataset.with_splits(
    [row | {"latency_process_us": times.get(row["index"])} for row in kept]
  )
  cli.say(f"packing {len(kept)} programs")
  dataset.write(output, dataset.with_views(kept, _VIEWS.value))
  lines = dataset.summary(
    kept, (*measure.COUNTS, "latency_us", "compile_seconds")
  )
  ceilings = dataset.ceilings(kept)
  parts = {
    split: collections.Counter(row[dataset.column(split)] for row in kept)
    for split in dataset.SPLITS
  }
  cli.show(lines)
  print(f"ceilings: {ceilings}")
  print(
    f"{output}: {len(kept)} programs; {sum(failures.values())} failed, "
    f"{len(measured) - len(kept)} duplicates"
  )
  cli.keep(
    _RESULT.value, lines, began,
    machine=worker.machine_of(kept[0]), programs=len(kept), asked=len(rows),
    duplicates=len(measured) - len(kept), failures=failures, parts=parts,
    ceilings=ceilings, held_out=dataset.HELD_OUT,
    largest_of_training_bytes=dataset.largest_of_training(kept),
  )  # fmt: skip


if __name__ == "__main__":
  cli.run(main)
