from research.core import report


def test_a_table_aligns_numbers_and_escapes_text():
  rows = [
    {"method": "a|b", "value": 1.23456, "count": 12},
    {"method": "c", "value": None, "count": 3, "unused": 1},
  ]
  table = report.markdown_table(
    rows, {"method": "method", "value": "ppl", "count": "n"}
  )
  assert table == (
    "| method |   ppl |   n |\n"
    "| ------ | ----: | --: |\n"
    "| a\\|b   | 1.235 |  12 |\n"
    "| c      |     – |   3 |\n"
  )
  assert report.markdown_table([], ["a"]) == "|   a |\n| --: |\n"


def test_cells():
  cells = [12345.6, 0.00001234, True, 7, "x\ny"]
  assert [report.format_cell(cell) for cell in cells] == [
    "12,346",
    "1.234e-05",
    "yes",
    "7",
    "x y",
  ]


def test_a_report_is_a_page(tmp_path):
  path = tmp_path / "report.md"
  report.write_report(
    path, "Run", ["Text.", report.picture("P", tmp_path / "p.png")]
  )
  assert path.read_text() == "# Run\n\nText.\n\n![P](p.png)\n"
