"""Joins results of one device into one, naming the model of each.

python launch/reproduce/merge_rows.py OUT.json NAME=FILE.json ...
"""

import json
import pathlib
import sys


def main(out: str, *named: str) -> None:
  """Writes the rows of all files; commits are named one after the other."""
  rows, seconds, commits, first = [], 0.0, {}, None
  for pair in named:
    name, _, path = pair.partition("=")
    result = json.loads(pathlib.Path(path).read_text())
    first = first or result
    for key in ("device", "versions"):
      if result[key] != first[key]:
        sys.exit(f"{path}: its {key} differs from that of the first file")
    rows += [row | {"model": name} for row in result["rows"]]
    seconds += result["seconds"]
    commits[result["commit"]] = None
  joined = first | {
    "command": "launch/reproduce/merge_rows.py of: " + first["command"],
    "commit": ", ".join(map(str, commits)),
    "seconds": seconds,
    "rows": rows,
  }
  pathlib.Path(out).write_text(json.dumps(joined, indent=1) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
