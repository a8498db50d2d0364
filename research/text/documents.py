"""Texts are cut into documents, by one of several rules."""

import re

_ALONE = r"(?:\r?\n)?(?<![^\n]){}(?:\r?\n|\Z)"
# Where documents are cut, by rule: separators and their lines go.
_PATTERNS = {
  "record": _ALONE.format(r"\x1e"),
  "endoftext": _ALONE.format(r"<\|endoftext\|>") + r"|<\|endoftext\|>",
  "wikitext": r"(?<![^\n])(?= = [^=\r\n]+ = ?(?:\r?\n|\Z))",
}
_CUTS = {
  "auto": re.compile("|".join(_PATTERNS.values())),
  **{rule: re.compile(pattern) for rule, pattern in _PATTERNS.items()},
}
DOCUMENTS = (*_CUTS, "whole")


def split(text: str, rule: str = "auto") -> list[str]:
  """Cuts a text into documents; empty ones are dropped.

  Lines may end with CRLF; a document keeps its own line ends.

  Args:
    text: of one file.
    rule: "record" cuts at lines that hold U+001E alone; "endoftext" at every
      `<|endoftext|>`; "wikitext" before every heading of the first level
      (` = Title = `); "auto" at all of these; "whole" nowhere.

  Raises:
    ValueError: the rule is unknown.
  """
  if rule not in DOCUMENTS:
    raise ValueError(f"rule {rule!r}: one of {DOCUMENTS}")
  parts = [text] if rule == "whole" else _CUTS[rule].split(text)
  return [part for part in parts if part.strip()]
