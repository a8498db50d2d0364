"""Joins results of one kind of device into one.

python -m research.results.merging OUT.json [NAME=]FILE.json ...

NAME is the model of all rows of its file; without it rows stay as they are. Of
devices that differ in number alone the largest is named. Absolute paths are
left as `files.write_result` would have them: of one file alone this is all that
changes.
"""

import json
import pathlib
import shlex
import sys

from research.results import files


def main(out: str, *named: str) -> None:
  """Writes the rows of all files; commands and commits are named in a row."""
  rows, seconds, commits, counts, first = [], 0.0, {}, [], None
  commands, complete = {}, []
  for pair in named:
    name, named_so, path = pair.rpartition("=")
    result = json.loads(pathlib.Path(path).read_text())
    kind, _, count = result["device"].rpartition(" x")
    counts.append(int(count))
    result["device"] = kind
    first = first or result
    for key in ("device", "versions"):
      if result[key] != first[key]:
        print(f"{path}: its {key} differs from that of the first file",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    more = {"model": name} if named_so else {}
    rows += [row | more for row in result["rows"]]
    seconds += result["seconds"]
    commits[result["commit"]] = None
    complete.append(result.get("complete", True))
    words = map(files.without_places, shlex.split(result["command"]))
    commands[shlex.join(words)] = None
  joined = first | {
    "command": f"research/results/merging.py of: {'; '.join(commands)}",
    "commit": ", ".join(map(str, commits)),
    "device": f"{first['device']} x{max(counts)}",
    "seconds": seconds,
    "complete": all(complete),
    "rows": rows,
  }
  files.write(out, joined)


if __name__ == "__main__":
  main(*sys.argv[1:])
