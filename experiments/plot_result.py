"""Draws a result file.

  python experiments/plot_result.py --kind=speed \
    --result=experiments/results/h200/ops_chunked_attention.json \
    --plot=docs/chunked_attention.png

--kind=speed: ms of one op of bench.py's suite `ops` over the length of texts, a
panel a pass, a line an implementation or peer. --kind=scaling: efficiency of
training over devices, of scaling.sh, a panel each for weak and strong scaling.
--kind=recipes: what recipes of eval_quantized.py lose, over bytes.
"""

import pathlib

from absl import flags

import cli
from models.errors import InputError

_KINDS = ("speed", "scaling", "recipes")
_KIND = flags.DEFINE_enum("kind", None, _KINDS, "of picture")
_RESULT = flags.DEFINE_string("result", None, "result file")
_TITLE = flags.DEFINE_string("title", None, "of the picture of speed; the op")
_PLOT = flags.DEFINE_string("plot", "runs/result.png", "PNG to write")


def main(_) -> None:
  """Draws; see the module's docstring."""
  if not _KIND.value:
    raise InputError(f"--kind: not given: name one of {', '.join(_KINDS)}")
  if not _RESULT.value:
    raise InputError("--result: not given: name a result file")
  cli.check_path(_RESULT.value)
  source, path = pathlib.Path(_RESULT.value), pathlib.Path(_PLOT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  if _KIND.value == "speed":
    from research.bench import speed_plot

    speed_plot.plot(path, source, _TITLE.value)
  elif _KIND.value == "scaling":
    from research.bench import scaling_plot

    scaling_plot.plot(path, source)
  else:
    from research.quantization import picture

    picture.plot_result(path, source)
  print(f"plot: {path}")


if __name__ == "__main__":
  cli.run(main)
