"""Times training updates of language models on meshes of devices.

  python experiments/time_mesh.py --case=mamba2_130m:8x1024@data:1 \
    --case=mamba2_130m:8x1024@fsdp:2

Weights are random. A case that does not fit into memory is a row that says so.
`launch/reproduce/scale.sh` holds the cases of the page `docs/meshes.md`.
"""

import time

from absl import flags

import cli

_CASES = flags.DEFINE_multi_string(
  "case", [], "MODEL:BxL@MESH, once for each of them"
)
_DTYPE = cli.choice(
  "dtype", "bfloat16", "of activations", ("float32", "bfloat16")
)
_ATTENTION = cli.choice(
  "attention", None, "implementation of attention", ("xla", "cudnn")
)
_UPDATES = cli.integer("updates", 4, "of one measurement", 1)
_RESULT = flags.DEFINE_string("result", None, "JSON file of the rows")


def main(_) -> None:
  """Times; see the module's docstring."""
  began = time.perf_counter()
  from models.errors import advice_on
  from research.bench import meshes

  cases = [meshes.Case.parse(text) for text in _CASES.value]
  rows = []
  for case, text in zip(cases, _CASES.value):
    try:
      row = meshes.timed(
        case,
        dtype=_DTYPE.value,
        attention=_ATTENTION.value,
        updates=_UPDATES.value,
      )
    except Exception as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      row = {"model": case.name, "case": text, "failed": advice_on(error)}
    rows.append(row)
    cli.say(f"{text}: {row}")
    # Kept after each case, because a later one may not come to an end.
    cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
