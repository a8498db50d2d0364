"""Searches a format for each part of each layer, at equal bit operations.

  python experiments/search_precision.py \
    --flagfile=experiments/flagfiles/precision_tiny.flags \
    --result=precision_tiny.json

Every method gets the same bit operations, those of weights in --uniform
throughout, scales, zero points and choices included: that format for all
(uniform), random points, a genetic search, a policy's gradient (reinforce, as
FLIQS), greedy steps, and the exact optimum of what each decision costs by
itself (exact, an integer program). Points are judged by --search_text, and what
is found by --text: nats a token, with the change from uniform. Its 95% interval
is that of windows in the file, and in the table of several seeds Student's t of
their changes. Weights are rounded to nearest.
"""

import time

from absl import flags

import cli

_MODEL = flags.DEFINE_string(
  "model", "tiny", "tiny, smollm2, a checkpoint's path or a hub id"
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, a path, a hub id")
_FORMATS = flags.DEFINE_list(
  "formats", ["bitmod3", "bitmod4", "int6", "int8"], "to choose among"
)
_UNIFORM = flags.DEFINE_string(
  "uniform", "bitmod4", "of --formats, whose bit operations all methods get"
)
_INPUTS = cli.integer("input_bits", 16, "of inputs, for bit operations", 1, 32)
_METHODS = flags.DEFINE_list(
  "methods", ["random", "genetic", "reinforce"], "of research.search"
)
_BUDGET = cli.integer("budget", 200, "genomes that each of them evaluates", 1)
_SEEDS = cli.integer("seeds", 3, "of each of them", 1, 100)
_SEARCH_TEXT = flags.DEFINE_string(
  "search_text", "wikitext2:valid", "text that points are judged by"
)
_TEXT = flags.DEFINE_string("text", "wikitext2:test", "held-out text")
_WINDOWS = cli.integer("windows", 8, "windows of the former", 1)
_SCORED = cli.integer("scored_windows", 64, "windows of the latter", 2)
_LENGTH = cli.integer("length", 256, "tokens of a window", 16)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def main(_) -> None:
  """Searches; see the module's docstring."""
  began = time.perf_counter()
  texts = [_TEXT.value, _SEARCH_TEXT.value]
  cli.check_there([_MODEL.value], texts, tokenizer=_TOKENIZER.value)

  from models.convert import load
  from models.text import load_text
  from research.core import intervals, progress
  from research.quantization import calibration, precision
  from research.results import formats as tables
  from research.text.tokenizing import of_checkpoint

  checkpoint = load(_MODEL.value)
  tokenizer = of_checkpoint(checkpoint, _TOKENIZER.value)
  search, held_out = (
    calibration.batches_of(
      load_text(text), tokenizer, windows=count, length=_LENGTH.value
    )
    for text, count in (
      (_SEARCH_TEXT.value, _WINDOWS.value),
      (_TEXT.value, _SCORED.value),
    )
  )
  model = precision.Mixed(
    checkpoint.config,
    checkpoint.params,
    _FORMATS.value,
    input_bits=_INPUTS.value,
  )
  plan = model.plan
  first = precision.uniform(plan, _UNIFORM.value)
  budget = plan.cost(first)
  each = len(plan.formats) - 1
  costs = precision.sensitivities(
    model, search, progress.counter("decisions", len(plan.names))
  )
  # Methods with a seed, the point they find, and how many losses they computed.
  evaluated = 1 + len(plan.names) * each
  found = [
    ("uniform", 0, first, 0),
    ("greedy", 0, precision.greedy(plan, costs, budget), evaluated),
    ("exact", 0, precision.exact(plan, costs, budget), evaluated),
  ]
  for method in _METHODS.value:
    for seed in range(_SEEDS.value):
      point, count = precision.searched(
        model, search, budget, method, evaluations=_BUDGET.value, seed=seed
      )
      found.append((method, seed, point, count))
      print(f"{method}, seed {seed}: done", flush=True)
  base = model.losses(first, held_out).ravel()
  rows = []
  for method, seed, point, count in found:
    losses = model.losses(point, held_out).ravel()
    common = {
      "system": "precision",
      "model": checkpoint.name,
      "data": _TEXT.value,
      "method": method,
      "seed": seed,
      "evaluations": count,
      "decisions": len(plan.names),
      "search_loss": float(model.losses(point, search).mean()),
      "bit_operations": plan.cost(point),
      **precision.described(plan, point),
    }
    for metric, values in (("loss", losses), ("change", losses - base)):
      interval = intervals.paired_mean(values)._asdict()
      rows.append({**common, "metric": metric, **interval})
  print(tables.precision(rows), end="")
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
