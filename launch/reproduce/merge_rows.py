"""Joins results of one kind of device into one.

python launch/reproduce/merge_rows.py OUT.json [NAME=]FILE.json ...

NAME is the model of all rows of its file; without it rows stay as they are. Of
devices that differ in number alone the largest is named.
"""

import json
import pathlib
import sys


def main(out: str, *named: str) -> None:
  """Writes the rows of all files; commits are named one after the other."""
  rows, seconds, commits, counts, first = [], 0.0, {}, [], None
  for pair in named:
    name, named_so, path = pair.rpartition("=")
    result = json.loads(pathlib.Path(path).read_text())
    kind, _, count = result["device"].rpartition(" x")
    counts.append(int(count))
    result["device"] = kind
    first = first or result
    for key in ("device", "versions"):
      if result[key] != first[key]:
        sys.exit(f"{path}: its {key} differs from that of the first file")
    more = {"model": name} if named_so else {}
    rows += [row | more for row in result["rows"]]
    seconds += result["seconds"]
    commits[result["commit"]] = None
  joined = first | {
    "command": "launch/reproduce/merge_rows.py of: " + first["command"],
    "commit": ", ".join(map(str, commits)),
    "device": f"{first['device']} x{max(counts)}",
    "seconds": seconds,
    "rows": rows,
  }
  pathlib.Path(out).write_text(json.dumps(joined, indent=1) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
