"""Quantizes a language model by a recipe, and writes it as a model.

  python experiments/quantize_lm.py --model=runs/mamba2_tiny/model \
    --recipe=quamba2_w8a8 --calibration_text=wikitext2:valid \
    --out=runs/mamba2_tiny_w8a8

`generate.py`, `eval_lm.py` and `bench.py` take the result as any model. The
text must not be the one that the model is judged by. Seconds for a tiny model
on two CPU cores, a minute for 60 million parameters on a GPU.
`eval_quantized.py` compares recipes.
"""

import pathlib
import time

from absl import flags

import cli
from models.errors import InputError
from research.quantization import recipes

_MODEL = flags.DEFINE_string(
  "model", "tiny", "tiny, smollm2, a checkpoint's path or a hub id"
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes, a path, a hub id")
_RECIPE = flags.DEFINE_string(
  "recipe", "w4a16", f"how to quantize: {recipes.HELP}"
)
_TEXT = flags.DEFINE_string(
  "calibration_text",
  "wikitext2:train",
  "text to calibrate on: wikitext2:train|valid, gutenberg:slice, or a file",
)
_WINDOWS = cli.integer("windows", 128, "windows of that text", 1)
_LENGTH = cli.integer("length", 512, "tokens of a window", 16)
_OUT = flags.DEFINE_string("out", None, "folder to write; must not exist")


def main(_) -> None:
  """Quantizes; see the module's docstring."""
  began = time.perf_counter()
  if _OUT.value is None:
    raise InputError("--out: is missing: name a folder to write")
  recipe = recipes.get(_RECIPE.value)
  out = pathlib.Path(_OUT.value).expanduser()
  if out.exists():
    raise InputError(f"--out={out}: exists and is not overwritten")
  cli.check_there([_MODEL.value], [_TEXT.value], tokenizer=_TOKENIZER.value)

  import jax  # after the flags were checked: a mistake is answered at once

  from models.convert import load
  from models.text import load_text
  from research.core import progress
  from research.cost import sizes
  from research.quantization import apply, artefact, calibration
  from research.text.tokenizing import of_checkpoint

  jax.config.update("jax_default_matmul_precision", "highest")
  text = load_text(_TEXT.value)
  checkpoint = load(_MODEL.value)
  tokenizer = of_checkpoint(checkpoint, _TOKENIZER.value)
  batches = None
  if recipe.is_static:
    batches = calibration.batches_of(
      text, tokenizer, windows=_WINDOWS.value, length=_LENGTH.value
    )
  layers = apply.work(checkpoint.config, recipe)
  config, params = apply.quantize(
    checkpoint.config,
    checkpoint.params,
    recipe,
    batches,
    progress.counter("layers", layers),
  )
  described = {
    "recipe": _RECIPE.value,
    "text": recipe.text,
    "model": checkpoint.name,
    "calibration_text": _TEXT.value if recipe.is_static else None,
    "calibration_tokens": 0 if batches is None else batches.size,
  }
  artefact.save(out, config, params, tokenizer, described)
  before = sizes.weight_bytes(checkpoint.config, checkpoint.params)
  after = sizes.weight_bytes(config, params)
  seconds = time.perf_counter() - began
  print(
    f"{out}: {_RECIPE.value}, {after:,} bytes of weights, where 16 bits a"
    f" number are {before:,} ({seconds:.0f} s)"
  )


if __name__ == "__main__":
  cli.run(main)
