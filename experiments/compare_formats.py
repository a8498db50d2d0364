"""Puts number formats beside each other: what rounding costs, at true bits.

  python experiments/compare_formats.py --result=formats.json
  python experiments/compare_formats.py --model=runs/mamba2_tiny/model

Decibels of signal over the noise of rounding to nearest, and bits a number with
scales and all, of drawn numbers, or of every kernel of --model; of the kernels
also how heavy their tails are: the degrees of freedom of the likeliest t
distribution, and the distance to it and to a normal one, with --plot as a
picture, layer by layer (--formats=none: these alone). --codebooks tells how
much more than the best codebook of each t distribution others err.
`eval_quantized.py --recipes=nf4,sf4,bitmod4` judges models by such weights. A
minute on two CPU cores.
"""

import itertools
import pathlib
import time

from absl import flags

import cli
from models.errors import InputError
from research.quantization.recipes import BY_FORMAT

_MODEL = flags.DEFINE_string("model", None, "whose kernels; draws if not given")
_FORMATS = flags.DEFINE_list(
  "formats", [], "names; all of 3 and 4 bits if not given"
)
_SIZE = cli.integer("size", 512, "drawn rows of 4,096 numbers", 1, 1 << 16)
_SEED = cli.integer("seed", 0, "of the draw", 0)
_CODEBOOKS = flags.DEFINE_boolean(
  "codebooks", False, "4-bit codebooks against Lloyd-Max, of t distributions"
)
_PLOT = flags.DEFINE_string("plot", None, "PNG of tails; with --model")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
# What --codebooks compares, all in blocks of 128.
_COMPARED = (
  "nf4",
  "sf4",
  "sf4_fit",
  "lloyd4",
  "fp4",
  "apot4_sp",
  "nf4+clipped",
)
_COMPARED += ("sf4+clipped", "lloyd4+clipped")


def main(_) -> None:
  """Compares; see the module's docstring."""
  began = time.perf_counter()
  names = _FORMATS.value or [*BY_FORMAT, "razer4_inputs"]
  if names == ["none"] and _MODEL.value:
    names = []
  unknown = [n for n in names if n not in (*BY_FORMAT, "razer4_inputs")]
  if unknown:
    raise InputError(
      f"--formats={unknown[0]}: no such format; there are "
      f"{', '.join(BY_FORMAT)}, razer4_inputs"
    )
  if _MODEL.value is not None:
    cli.check_there(models=[_MODEL.value])
  if _PLOT.value and not _MODEL.value:
    raise InputError("--plot: draws the kernels of a model: give --model")
  if _CODEBOOKS.value and (_MODEL.value or _FORMATS.value):
    raise InputError("--codebooks: goes with neither --model nor --formats")
  from research.quantization import format_errors
  from research.results import formats

  if _CODEBOOKS.value:
    arrays = format_errors.t_draws(_SEED.value, _SIZE.value)
    rows = list(format_errors.over_lloyd_max(arrays, _COMPARED))
    print(formats.codebooks(rows), end="")
    cli.keep(_RESULT.value, rows, began)
    return
  if _MODEL.value is None:
    arrays = format_errors.draws(_SEED.value, _SIZE.value)
    tails = []
  else:
    from models.convert import load

    arrays = format_errors.kernels(load(_MODEL.value).params)
    tails = format_errors.tails(arrays)
  rows = list(itertools.chain(format_errors.rows(arrays, names), tails))
  if names:
    print(formats.table(rows), end="")
  if _MODEL.value is not None:
    print(formats.tails(rows), end="")
  if _PLOT.value:
    from research.quantization import tails_picture

    tails_picture.plot(
      _PLOT.value, rows, f"Kernels of {pathlib.Path(_MODEL.value).stem}"
    )
    print(f"plot: {_PLOT.value}")
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
