"""Which names of KernelBench are of one problem.

Problems were renamed between versions (36_LTSMHn became 36_LSTMHn), and some
are the same program twice. What is learned of one must not be asked of the
other, so a fold holds out all of them.
"""

import re
from collections.abc import Mapping, Sequence

from research.regression_lm.kernelbench.program_text import canonical

# Same program under another number, in code that is written differently.
_RENAMED = {
  "level1/50_conv_standard_2D__square_input__square_kernel.py": (
    "level1/63_conv_standard_2D__square_input__square_kernel.py"
  ),
}
# Level 4 has one model of the hub at several sizes of its input.
_SIZES = re.compile(r"^(level4/)\d+_(.*)_bs\d+_seq\d+\.py$")
_NUMBER = re.compile(r"^(level\d+/\d+)_")


def name(row: Mapping[str, str]) -> str:
  """The name of a timing's problem in its version."""
  return f"{row['level']}/{row['name']}"


def of_rows(
  rows: Sequence[Mapping[str, str]], codes: Mapping[str, str]
) -> dict[str, str]:
  """The problem of every name: the first of the names that are of one.

  Names are of one problem if they have the same level and number, since a
  problem keeps both when it is renamed; if a program of one is a program of
  the other in canonical form; if they differ in the size of the input alone;
  or if a table says so.

  Args:
    rows: timings with "level", "name" and "src".
    codes: src -> program.
  """
  parent: dict[str, str] = {}

  def root(key: str) -> str:
    while parent.setdefault(key, key) != key:
      key = parent[key]
    return key

  written = {src: f"code {canonical(code)}" for src, code in codes.items()}
  for row in rows:
    own = name(row)
    keys = [written[row["src"]], _RENAMED.get(own, own)]
    for pattern in (_SIZES, _NUMBER):
      if found := pattern.match(own):
        keys.append(" ".join(found.groups()))
        break
    for key in keys:
      parent[root(key)] = root(own)
  members: dict[str, list[str]] = {}
  for own in sorted({name(row) for row in rows}):
    members.setdefault(root(own), []).append(own)
  return {own: several[0] for several in members.values() for own in several}
