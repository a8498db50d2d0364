"""What decoding loses that reads some pages of a Transformer's cache alone.

  python experiments/eval_pages.py --model=smollm2 --context=1024 \
    --keep_pages=.5,.25,.125 --result=runs/pages.json

Contexts are read whole, as prompts are. Behind each, tokens are read one by
one by steps that keep a share of the pages, and the next token is scored: of
windows of a text, and of numbers that stand somewhere in a text and are asked
for.
Every choice of pages is compared with all pages on the same tokens: by the
minima and maxima of a page's keys ("bounds"), by their mean and deviation
("moments"), and, whatever the query, the first and the latest pages. Some 15
minutes for the table of docs/language_models.md on two CPU cores that do
nothing else; a minute with --model=tiny --context=256.
"""

import functools
import time

from absl import flags

import cli
from models.errors import InputError

_MODEL = flags.DEFINE_string("model", "tiny", "tiny, smollm2, a path, a hub id")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, a path, a hub id")
_TEXT = flags.DEFINE_string(
  "text",
  "wikitext2:test",
  "wikitext2:train|valid|test, gutenberg:slice, or a file",
)
_KEEP = cli.numbers(
  "keep_pages", [0.5, 0.25, 0.125], "shares beside all pages", 1e-6, 1
)
_CHOICES = flags.DEFINE_multi_enum(
  "choices",
  ["bounds", "moments", "latest"],
  ["bounds", "moments", "latest"],
  "how pages are chosen; may be given again",
)
_PAGE = cli.integer("page_size", 16, "tokens of a page", 1)
_CONTEXT = cli.integer("context", 1024, "tokens that are read whole", 16)
_SCORED = cli.integer("scored", 32, "tokens scored behind a context", 1)
_WINDOWS = cli.integer("windows", 16, "of the text; 0: none", 0)
_NEEDLES = cli.integer("needles", 16, "numbers to be found; 0: none", 0)
_BATCH = cli.integer("batch", 8, "contexts read together", 1)
_DTYPE = cli.choice(
  "dtype", "float32", "of the weights", ("float32", "bfloat16")
)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
_COLUMNS = "task method budget cache_bytes metric value low high nats_more "
_COLUMNS += "nats_more_low nats_more_high items"


def main(_) -> None:
  """Evaluates; see the module's docstring."""
  began = time.perf_counter()
  from models.text import load_text

  cli.check_there([_MODEL.value], tokenizer=_TOKENIZER.value)
  if not _WINDOWS.value and not _NEEDLES.value:
    raise InputError("--windows=0 with --needles=0: nothing is left to score")
  text = load_text(_TEXT.value)
  import jax.numpy as jnp  # after the flags were checked

  from models.convert import load
  from research.core import progress
  from research.evaluation import paged
  from research.text.tokenizing import of_checkpoint

  reading = functools.partial(paged.Reading, page_size=_PAGE.value)
  readings = [reading(keep=1.0)]
  for keep in dict.fromkeys(_KEEP.value):
    for choice in dict.fromkeys(_CHOICES.value):
      if keep < 1:
        readings.append(reading(keep=keep, choice=choice))
  checkpoint = load(_MODEL.value, jnp.dtype(_DTYPE.value))
  config = checkpoint.config
  longest = config.max_position or 8192
  if _CONTEXT.value + _SCORED.value > longest:
    raise InputError(
      f"--context={_CONTEXT.value} and --scored={_SCORED.value}: the model "
      f"reads {longest} tokens"
    )
  tokenizer = of_checkpoint(checkpoint, _TOKENIZER.value)
  tokens = tokenizer.encode(text)
  tasks = {}
  if _WINDOWS.value:
    tasks["perplexity"] = paged.windows(
      tokens,
      context=_CONTEXT.value,
      scored=_SCORED.value,
      count=_WINDOWS.value,
      begin=tokenizer.bos_id,
    )
  if _NEEDLES.value:
    tasks["needles"] = paged.needles(
      tokens, tokenizer, context=_CONTEXT.value, count=_NEEDLES.value
    )
  common = {"system": config.family, "model": checkpoint.name, "seeds": 1}
  common |= {"data": _TEXT.value, "dtype": _DTYPE.value}
  rows = []
  for name, subject in tasks.items():
    scores = paged.score(
      config,
      checkpoint.params,
      subject,
      readings,
      batch=_BATCH.value,
      advance=progress.counter(name, len(subject.tokens)),
    )
    found = paged.result_rows(name, subject, readings, scores)
    rows += [common | row for row in found]
  cli.show(rows, tuple(_COLUMNS.split()))
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
