"""Published claims on FABNet's accelerator beside what its cycle model gives.

  python experiments/check_fabnet_claims.py --result=claims.json

Latencies, times faster and energies: as published, as the released model
counts cycles, and with all that it leaves out. All are of models: no FPGA ran.
Seconds.
"""

import time

from absl import flags

import cli

_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def main(_) -> None:
  """Computes; see the module's docstring."""
  began = time.perf_counter()
  from research.codesign import claims
  from research.results import codesign

  rows = claims.rows()
  print(codesign.claims(rows), end="")
  cli.keep(_RESULT.value, rows, began)


if __name__ == "__main__":
  cli.run(main)
