"""Times training updates and ops over long rows on meshes of devices.

  python experiments/time_mesh.py --case=mamba2_130m:8x1024@data:1 \
    --case=mamba2_130m:8x1024@fsdp:2 --case=sol=llama3_2_1b:8x512@data:2

Weights are random. A case is MODEL:BxL@MESH, a language model's update; others
begin with a kind: `sol=MODEL:WINDOWSxCONTEXT`, `rlm=WIDTH/ENCODER+DECODER:BxL`,
gradients of an op `ssd=HEADSxWIDTHxSTATE:BxL` and `attention=HEADSxWIDTH:BxL`,
and `losses=MODEL:BxL`, which compares losses of one device and many, and a run
that goes on on half of them. `weak.lm=MODEL:BxL` is of the group `weak` of a
table; a group is compiled before the first of its cases is timed. A case that
fails, say for lack of memory, is a row that says so. Cases that --result holds
already are left as they are. `launch/reproduce/scaling.sh` holds the cases of
`docs/scale.md`.
"""

import json
import pathlib
import time

from absl import flags

import cli

_CASES = flags.DEFINE_multi_string(
  "case", [], "[[GROUP.]KIND=]WORK:BxL@MESH, once for each of them"
)
_DTYPE = cli.choice(
  "dtype", "bfloat16", "of activations", ("float32", "bfloat16")
)
_ATTENTION = cli.choice(
  "attention", None, "implementation of attention", ("xla", "cudnn")
)
_MEASURE = cli.number("measure", 1.0, "seconds of a measurement, of three", 0)
_UPDATES = cli.integer("updates", 50, "of losses=", 2)
_SECONDS = cli.integer("seconds", 3600, "after which no case begins", 1)
_RESULT = flags.DEFINE_string("result", None, "JSON file of the rows")


def main(_) -> None:
  """Times; see the module's docstring."""
  began = time.perf_counter()
  from research.bench.mesh_cases import Case

  cases = [Case.parse(text) for text in _CASES.value]
  rows, before, last = _before()
  done = {row["case"] for row in rows}
  cases = [case for case in cases if case.text not in done]
  # A case that ended its process is tried again when all others are done.
  cases.sort(key=lambda case: case.text == last)

  from research.bench import mesh_runs

  keep = lambda **more: cli.keep(_RESULT.value, rows, began - before, **more)
  left_out = []
  for case, row in mesh_runs.rows(
    cases,
    dtype=_DTYPE.value,
    attention=_ATTENTION.value,
    seconds=_MEASURE.value,
    updates=_UPDATES.value,
    left=lambda: _SECONDS.value - (time.perf_counter() - began),
    begin=lambda case: keep(complete=False, begun=case.text),
  ):
    if row is None:
      left_out.append(case.text)
      continue
    rows.append(row)
    cli.say(f"[{time.perf_counter() - began:.0f} s] {case.text}: {row}")
  for text in left_out:
    cli.say(f"no time was left for {text}")
  keep(complete=not left_out, left_out=left_out)


def _before() -> tuple[list, float, str | None]:
  """Rows and seconds of an earlier call, and the case that it ended in."""
  path = _RESULT.value and pathlib.Path(_RESULT.value)
  if not path or not path.exists():
    return [], 0.0, None
  from models import input_files

  with input_files.errors_at(path, "remove it", "is no result of time_mesh.py"):
    found = json.loads(path.read_bytes())
    return found["rows"], float(found["seconds"]), found.get("begun")


if __name__ == "__main__":
  cli.run(main)
