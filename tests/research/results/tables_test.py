"""Tables of pages: made from result files of a kind, and their errors."""

import json
import re
from pathlib import Path

import pytest

from models.errors import InputError
from research.results import tables

EMPTY = "above\n<!-- table: {} {} -->\n<!-- end -->\nbelow\n"
HEADER = {"command": "python x.py", "commit": "abc", "device": "cpu x1"}
COMMON = {
  "model": "tiny",
  "data": "text",
  "preset": "J-FL",
  "tokens": 12345,
  "kappa": 0.4,
  "rho": 0.5,
  "bits": 6.25,
  "flops": 0.7,
  "bytes": 0.8,
}
BENCH = {
  "shape": "W1 S64",
  "dtype": "bfloat16",
  "matmul_precision": "default",
  "matmul_tflops": 700.0,
  "copy_gb_per_s": 4000.0,
  "ms": 4.0,
  "tokens_per_second": 16000.0,
  "floor_ms": 1.0,
  "share": 0.25,
}


OPS = {
  "op": "ssd",
  "shape": "B8 L2048 H24",
  "dtype": "bfloat16",
  "pass": "fwd",
  "implementation": "mosaic_gpu",
  "ms": 0.5,
  "floor_ms": 0.125,
  "share": 0.25,
  "error": 0.0021,
  "error_full": None,
  "peer": "mamba_ssm",
  "peer_detail": "chunk 128",
  "peer_ms": 0.8,
}


def row(method, role, asked, budget, value, difference=None):
  made = COMMON | {"method": method, "role": role, "asked": asked}
  made |= {"budget": budget, "value": value}
  if difference is not None:
    ends = zip(("", "_low", "_high"), difference)
    made |= {f"policy_minus_method{end}": number for end, number in ends}
  return made


QUALITY = [
  row("dense", "reference", None, 1.0, 20.0),
  row("SOL policy", "ours", 0.4, 0.405, 30.0),
  row("SOL policy", "ours", 0.6, 0.61, 25.0),
  row("warm start only", "ours", 0.4, 0.42, 31.0),
  row("fixed", "baseline", 0.4, 0.405, 32.0, (-0.06, -0.07, -0.05)),
  row("fixed", "baseline", 0.6, 0.61, 24.0, (0.04, 0.03, 0.05)),
  row("best static", "baseline", 0.4, 0.405, 30.0, (0.0, -0.01, 0.01)),
  # At another budget: shown with it, and not counted.
  row("best static", "baseline", 0.6, 0.7, 26.0, (-0.04, -0.05, -0.03)),
  row("per-token oracle", "oracle", 0.4, 0.405, 28.0, (0.07, 0.06, 0.08)),
  row("Quest@50", "static", None, 0.833, 21.0),
  {"method": "random trials", "role": "distribution", "value": [1.0, 2.0]},
]


def write(folder, kind, rows, **more):
  """A page of `folder` with the table of these rows, filled."""
  page = folder / "page.md"
  page.write_text(EMPTY.format(kind, "found.json"))
  result = HEADER | {"seconds": 61.0, "rows": rows} | more
  (folder / "found.json").write_text(json.dumps(result))
  return tables.fill(page)


def lines_of(text):
  """First cell to the other cells of every line of the table."""
  cells = [
    line.strip("| ").split("|") for line in text.splitlines() if line[:1] == "|"
  ]
  return {first.strip(): [c.strip() for c in rest] for first, *rest in cells}


def test_an_evaluation_has_a_line_a_method_and_a_column_a_budget(tmp_path):
  text = write(tmp_path, "quality", QUALITY)
  lines = lines_of(text)
  assert lines["method"] == [
    "net keep 0.405 (asked 0.4)",
    "net keep 0.610 (asked 0.6)",
  ]
  assert lines["SOL policy"] == ["30.000", "25.000"]
  assert lines["warm start only"] == ["31.000 at 0.420", "–"]
  assert lines["fixed"] == [
    "32.000; -0.0600 [-0.0700, -0.0500]",
    "24.000; +0.0400 [+0.0300, +0.0500]",
  ]
  assert lines["best static"][1].startswith("26.000 at 0.700; -0.0400")
  # Names of older files are told as what they stand for.
  assert "true gains of the schedules (sees labels)" in lines
  assert lines["SOL policy: kappa, rho, bits"] == ["0.400, 0.500, 6.250"] * 2
  assert lines["SOL policy: flops, bytes"] == ["0.700, 0.800"] * 2
  assert "dense" not in lines and "random trials" not in lines
  assert "12,345 tokens, actions J-FL; dense perplexity 20.000" in text
  assert "Of 3 comparisons" in text and "better in 1 and worse in 1" in text
  assert "Quest variant, half of the pages: 21.000 at 0.833" in text
  assert "of an older evaluation, and lacks: the refresh in FLOPs" in text
  assert "[found.json](found.json): cpu x1, 61 s, commit abc" in text
  assert text.startswith("above\n") and text.endswith("<!-- end -->\nbelow\n")


def test_a_benchmark_leaves_out_the_breakdown(tmp_path):
  names = "block", "scan/policy", "scan/dense", "scan/dense/headless"
  text = write(tmp_path, "speed", [BENCH | {"op": name} for name in names])
  lines = lines_of(text)
  assert lines["block"] == ["4.000", "16,000", "1.000", "25.0%"]
  assert lines["scan/policy"] == lines["block"]
  assert "scan/dense" not in text
  assert "All rows: shape W1 S64, dtype bfloat16, default.\n" in text
  assert "Ceilings: 700 TFLOP/s, 4,000.0 GB/s (bfloat16, default)" in text


def test_ops_are_compared_with_peers(tmp_path):
  alone = {"op": "token_logprob", "error": None, "error_full": 0.003}
  alone |= {"peer": None, "peer_detail": None, "peer_ms": None}
  plain = {"op": "conv", "peer": "plain", "peer_detail": None, "ms": 1234.5}
  text = write(tmp_path, "speed", [OPS, OPS | alone, OPS | plain])
  lines = lines_of(text)
  shared = "shape B8 L2048 H24, dtype bfloat16, pass fwd"
  assert f"All rows: {shared}, implementation mosaic_gpu." in text
  peer = ["mamba_ssm, chunk 128", "0.800", "0.62"]
  floor = ["0.125", "25.0%"]
  assert lines["op"] == [
    *("ms", "peer", "peer ms", "ms / peer ms", "floor ms", "share"),
    *("error", "error, full"),
  ]
  assert lines["ssd"] == ["0.500", *peer, *floor, "2.1e-03", "–"]
  none = ["–"] * 3
  assert lines["token_logprob"] == ["0.500", *none, *floor, "–", "3.0e-03"]
  assert lines["conv"][:2] == ["1,234.500", "plain"]


def test_what_was_not_measured_is_said(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(EMPTY.format("speed", "no.json"))
  assert tables.fill(page) == EMPTY.format("speed", "no.json").replace(
    "<!-- end", "not measured yet\n<!-- end"
  )


def test_what_a_result_lacks_is_said(tmp_path):
  commit = "0123456789abcdef0123456789abcdef01234567"
  text = write(
    tmp_path, "speed", [OPS], commit=f"{commit}+dirty", complete=False
  )
  assert (
    "61 s, commit 0123456789ab, of which the code that ran differed; the run "
    "ended before its last row\n" in text
  )
  assert "61 s, commit abc\n" in write(tmp_path, "speed", [OPS], complete=True)


@pytest.mark.parametrize(
  ("page", "result", "words"),
  [
    ("<!-- table: speed found.json -->\n", "{}", "above an `<!-- end -->`"),
    ("<!-- table: found.json -->\n<!-- end -->\n", "{}", "is no `<!-- table"),
    (EMPTY.format("sped", "found.json"), "{}", "valid: speed, quality"),
    (EMPTY.format("speed", "found.json"), '{"rows": [', "write it anew"),
    (EMPTY.format("speed", "found.json"), '{"rows": [1]}', "write it anew"),
    (EMPTY.format("quality", "found.json"), '{"rows": [{}]}', "kind quality"),
    (EMPTY.format("training", "found.json"), '{"rows": []}', "write it anew"),
  ],
)
def test_a_mistake_names_the_file(tmp_path, page, result, words):
  (tmp_path / "page.md").write_text(page)
  (tmp_path / "found.json").write_text(result)
  with pytest.raises(InputError) as caught:
    tables.fill(tmp_path / "page.md")
  assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_contributing_lists_the_kinds():
  text = (Path(__file__).resolve().parents[3] / "CONTRIBUTING.md").read_text()
  assert re.findall(r"^  \| `(\w+)` \|", text, re.MULTILINE) == [*tables.KINDS]


def test_what_endurance_saw_is_one_line_a_check():
  rows = [
    {"check": "kills", "trainer": "lm", "times": 50, "faults": 0, "ends": 9},
    {
      "check": "soak",
      "trainer": "lm",
      "times": 1000,
      "faults": 1,
      "compiled_first": 22,
      "compiled_later": 1,
      "memory_mb": 400.2,
      "grown_mb": 1.26,
    },
  ]
  kills, soak = tables.KINDS["endurance"](rows).splitlines()[2:]
  assert re.fullmatch(
    r"\| kills +\| lm +\| +50 \| +0 \| 9 runs ended +\|", kills
  )
  assert (
    "22 programs compiled in the first fifth, 1 later; 400 MB, +1.3" in soak
  )
