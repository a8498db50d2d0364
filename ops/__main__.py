"""Prints which implementation of each op runs here: `python -m ops`."""

from ops import dispatch


def main() -> None:
  """Prints one line for each op and implementation."""
  rows = [("op", "implementation", "usable")]
  rows += [(op, name, why or "yes") for op, name, why in dispatch.table()]
  widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
  for op, name, usable in rows:
    print(f"{op:{widths[0]}}  {name:{widths[1]}}  {usable}")


if __name__ == "__main__":
  main()
