"""Times models of Long Range Arena, and finds dense ones of FABNet's size.

  python experiments/time_lra.py --task=image --dtype=bfloat16 --batch=128 \
    --sizes=runs/lra_sizes --result=runs/lra_times_image.json

An update of --batch sequences and passes of --batches, one model after the
other with nothing beside it; parameters and work of the blocks beside them.
Then dense Transformers: one with as many parameters in its blocks as FABNet,
and the largest whose update takes as long as FABNet's. Their flags are written
to --sizes as TASK_dense_parameters.flags and TASK_dense_time.flags, for
train_lra.py.
"""

import pathlib
import time

from absl import flags

import cli
import option_flags
from models import files
from models.errors import InputError
from research.lra.options import Options

_NAMES = flags.DEFINE_list(
  "models",
  ["fabnet", "transformer", "low_rank", "block_diagonal"],
  "that are timed; fabnet is always",
)
_BATCHES = cli.integers(
  "batches", [1, 256], "sequences of a pass", lower=1, upper=1 << 20
)
_DEPTHS = cli.integers(
  "depths", [1, 2], "of dense Transformers that are tried", lower=1, upper=64
)
_WIDTHS = cli.integers(
  "widths", [16, 32, 64, 96, 128], "likewise, multiples of 8", lower=8
)
_BUTTERFLY = flags.DEFINE_string(
  "butterfly", None, "implementation of butterfly_matmul in passes; None: best"
)
_SIZES = flags.DEFINE_string("sizes", None, "folder of flagfiles to write")
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")
_OPTIONS = option_flags.define(Options)


def main(_) -> None:
  """Times; see the module's docstring."""
  began = time.perf_counter()
  options = Options(**{name: flag.value for name, flag in _OPTIONS.items()})

  from research.lra import architectures, timing

  known = architectures.VARIANTS
  for name in _NAMES.value:
    if name not in known:
      raise InputError(f"--models={name}: take some of {', '.join(known)}")
  names = dict.fromkeys(["fabnet", *_NAMES.value])
  models = {name: architectures.variant(options, name) for name in names}
  ours = models["fabnet"]
  size = architectures.block_parameters(ours)
  depths, widths = _DEPTHS.value, _WIDTHS.value
  models["dense_parameters"] = architectures.dense_with_parameters(
    ours, size, depths
  )
  family = {
    f"dense {one.num_layers} x {one.d_model}": one
    for one in architectures.dense_family(ours, depths, widths)
  }
  tried = timing.cases({"fabnet": ours} | family, [])
  rows = timing.measure(tried, options, say=cli.say)
  fast = timing.as_fast(rows, "fabnet", family)
  models["dense_time"] = family[fast]
  cli.say(f"as fast as FABNet: {fast}")
  for name in ("dense_parameters", "dense_time") if _SIZES.value else ():
    one = models[name]
    lines = [
      "--model=transformer",
      f"--d_model={one.d_model}",
      f"--d_ff={one.d_ff}",
      f"--layers={one.num_layers}",
      f"--heads={one.num_heads}",
    ]
    path = pathlib.Path(_SIZES.value) / f"{options.task}_{name}.flags"
    files.write_text(path, "\n".join(lines) + "\n")
  found = timing.measure(
    timing.cases(models, _BATCHES.value),
    options,
    butterfly=_BUTTERFLY.value,
    say=cli.say,
  )
  columns = ["model", "pass", "batch", "ms", "sample_ms", "block_parameters"]
  cli.show(found, columns)
  cli.keep(_RESULT.value, found, began, tried=rows)


if __name__ == "__main__":
  cli.run(main)
