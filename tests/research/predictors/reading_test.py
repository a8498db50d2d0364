"""Files as users bring them: the right rows, or one line with their place."""

import bz2
import gzip
import lzma

import numpy as np
import pytest

from models.errors import InputError
from research.predictors import reading, tables
from research.predictors.tables import Layout


@pytest.fixture
def write(tmp_path):
  def write(content, name="a.csv"):
    path = tmp_path / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data)
    return path

  return write


PLAIN = "lr,acc\n0.1,0.9\n0.2,0.8\n"
TEXTS = ["lr: 0.1", "lr: 0.2"]


@pytest.mark.parametrize(
  "content, layout",
  [
    (PLAIN, {}),
    ("\ufeff" + PLAIN, {}),
    ('\ufeff"lr","acc"\n"0.1","0.9"\n"0.2","0.8"\n', {}),
    (PLAIN.encode("utf-16"), {}),
    (PLAIN.replace("\n", "\r\n"), {}),
    (PLAIN.replace("\n", "\r"), {}),
    (PLAIN.replace(",", ";"), {}),
    (PLAIN.replace(",", "\t"), {}),
    (PLAIN.replace(",", "~"), {"delimiter": "~"}),
    (PLAIN.replace(",", " , "), {}),
    ("# run of May\n" + PLAIN, {}),
    ("sep=;\n" + PLAIN.replace(",", ";"), {}),
    ("\n\n" + PLAIN.replace("\n", "\n\n"), {}),
    (gzip.compress(PLAIN.encode(), mtime=0), {}),
    (bz2.compress(PLAIN.encode()), {}),
    (lzma.compress(PLAIN.encode()), {}),
    # Columns without a name, and commas at the end of rows.
    (",lr,acc\n0,0.1,0.9\n1,0.2,0.8\n", {}),
    ("Unnamed: 0,lr,acc\n0,0.1,0.9\n1,0.2,0.8\n", {}),
    ("lr,acc,\n0.1,0.9,\n0.2,0.8,\n", {}),
    ("lr,acc\n0.1,0.9,\n0.2,0.8,\n", {}),
    ("lr,when,acc\n0.1,x,0.9\n0.2,y,0.8\n", {"leave_out": ("when",)}),
    ("lr,when,acc\n0.1,x,0.9\n0.2,y,0.8\n", {"columns": ("lr",)}),
  ],
)
def test_one_table_however_it_is_written(write, content, layout):
  found = tables.read_csv(write(content), ["acc"], Layout(**layout))
  assert found.texts == TEXTS
  assert found.values.tolist() == [[0.9], [0.8]]
  assert found.features.tolist() == [[0.1], [0.2]]
  assert found.feature_names == ["lr"]


def test_columns_without_a_name_are_told(write):
  found = tables.read_csv(write(",lr,acc,\n0,1,2,\n"), ["acc"])
  assert found.notes == ["2 columns without a name left out"]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.xz", "a.txt"])
def test_the_first_bytes_say_how_a_file_is_packed(write, name):
  for data in (PLAIN.encode(), gzip.compress(PLAIN.encode(), mtime=0)):
    assert tables.read_csv(write(data, name), ["acc"]).texts == TEXTS


@pytest.mark.parametrize(
  "content, words",
  [
    (gzip.compress(PLAIN.encode(), mtime=0)[:-9], "cut short"),
    (b"\x28\xb5\x2f\xfd....", "is Zstandard, which is not read"),
    (b"PK\x03\x04....", "a ZIP archive or a spreadsheet"),
    (b"PAR1....", "is Parquet"),
    (b"lr,acc\n1,2\ngr\xfc\xdfe,1\n", "line 3: is not UTF-8"),
    ("lr,acc,acc\n1,2,3\n", "two columns are named 'acc'"),
    ("a,a,acc\n1,2,3\n", "two columns are named 'a'"),
    ("acc\n1\n", "has no column beside acc"),
    ("lr;acc\n0,1;0,9\n", "line 2: acc is '0,9': give --decimal=,"),
    ('lr,acc\n"0,1","0,9"\n', "line 2: acc is '0,9': give --decimal=,"),
    ('lr,acc\n"0,1",1\n', "line 2: lr is '0,1': give --decimal=,"),
    ("lr,acc\n1,~\n", "line 2: acc is '~', which is no number: .*--missing"),
    ("lr,acc\n\n1,2\n\n1\n", "line 5: has 1 cells, the heading 2"),
    ('lr,acc\n"a\nb\nc",1\n"d\ne",f\n', "lines 5 to 6: acc is 'f'"),
    ('lr,acc\n"a,0.5\nb,0.6\n', "lines 2 to 3: .* or close its quotes"),
    ("lr,Acc\n1,2\n", "no target 'acc', but lr, Acc: mend --targets"),
    ("lr acc\n1 2\n", "name what stands between the columns"),
    ("lr,acc\n1,1_000\n", "acc is '1_000', which is no number"),
    ("lr,acc\n1,true\n", "acc is 'true', which is no number"),
  ],
)
def test_mistakes_in_csv_are_told_with_their_place(write, content, words):
  with pytest.raises(InputError, match=words) as caught:
    tables.read_csv(write(content), ["acc"])
  assert "\n" not in str(caught.value)


def test_an_empty_text_is_told_with_its_line(write):
  path = write('code,ms\n"a",0.5\n\n"",0.6\n')
  with pytest.raises(InputError, match="line 4: its text is empty"):
    tables.read_csv(path, ["ms"], Layout(text="code"))


def test_decimal_commas_are_read_when_they_are_told(write):
  path = write("lr;acc\n0,1;0,9\n0,2;1e-1\n")
  found = tables.read_csv(path, ["acc"], Layout(decimal=","))
  assert found.values.tolist() == [[0.9], [0.1]]
  assert found.features.tolist() == [[0.1], [0.2]]
  path = write("lr;acc\n0,1;3,5\n0,2;2.000\n")
  with pytest.raises(InputError, match="line 3: acc is '2.000', which is no"):
    tables.read_csv(path, ["acc"], Layout(decimal=","))
  # Commas in words are no decimals, and so is what the flag says are words.
  path = write('k,acc\n"3,3",1\n"5,5",2\n"3,3",3\n')
  found = tables.read_csv(path, ["acc"], Layout(decimal="."))
  assert found.feature_names == ["k = 3,3", "k = 5,5"]


@pytest.mark.parametrize(
  "cell", ["", "NA", "N/A", "n/a", "nan", "NaN", "null", "None", "-", "?", " "]
)
def test_usual_spellings_of_a_missing_value(write, cell):
  path = write(f"lr,acc,b\n1,{cell},1\n{cell},2,2\n")
  found = tables.read_csv(path, ["acc", "b"])
  np.testing.assert_array_equal(found.values, [[np.nan, 1], [2, 2]])
  np.testing.assert_array_equal(found.features, [[1], [np.nan]])


def test_spellings_of_a_missing_value_can_be_given(write):
  path = write("lr,acc,b\n1,failed,1\n2,2,-1\n")
  layout = Layout(missing=("failed", "-1"))
  found = tables.read_csv(path, ["acc", "b"], layout)
  np.testing.assert_array_equal(found.values, [[np.nan, 1], [2, np.nan]])


def test_long_cells_are_read_and_limits_of_others_stay(write):
  import csv

  limit = csv.field_size_limit()
  code = "x = 1\n" * 50_000
  found = tables.read_csv(
    write(f'code,ms\n"{code}",1\n"b",2\n'), ["ms"], Layout(text="code")
  )
  assert found.texts[0] == code and csv.field_size_limit() == limit
  assert found.places[1].endswith("line 50003")


@pytest.mark.parametrize(
  "content, words",
  [
    ('[{"x": "a", "y": 1}]', "give JSON lines"),
    ('[\n {\n  "x": "a",\n  "y": 1\n }\n]\n', "give JSON lines"),
    ('{\n  "x": "a",\n  "y": 1\n}\n', "give JSON lines"),
    ('{"x": "a", "y": true}\n', "line 1: y is true, .* write 1 or 0"),
    ('{"x": "a", "y": 1, "y": 2}\n', "line 1: has 'y' twice"),
    ('{"x": {"lr": 1}, "y": 1}\n', "line 1: x is {'lr': 1}, which is no text"),
    ('{"x": 5, "y": 1}\n', "line 1: x is 5, which is no text"),
    (
      '{"x": "a", "y": 1}\n{"x": "b", "Y": 2}\n',
      "line 2: has 'Y' in",
    ),
    ('{"x": "a\\ud800", "y": 1}\n', "line 1: its text has half of a surrogate"),
    ('\n{"x": "a", "y": {}}\n', "line 2: y is {}"),
    ("[" * 100_000, "give JSON lines"),
    ('{"x":' * 100_000, "line 1: is no JSON object"),
  ],
)
def test_mistakes_in_json_lines_are_told(write, content, words):
  with pytest.raises(InputError, match=words) as caught:
    tables.read_jsonl(write(content), ["y"])
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_numbers_beyond_float64_are_infinite(write):
  lines = '\ufeff{"x": "a", "y": 1%s}\n{"x": "b", "y": 1e400}\n'
  for zeros in (400, 5000):
    found = tables.read_jsonl(write(lines % ("0" * zeros)), ["y"])
    assert found.values.tolist() == [[np.inf], [np.inf]]
  line = '{"x": "a\u2028b\x85c", "y": "0.5"}\n'
  assert tables.read_jsonl(write(line), ["y"]).values.tolist() == [[0.5]]


def test_the_lines_of_a_row_are_known(write):
  rows = reading.csv_rows(write('a,b\n\n"x\ny",1\nz,2\n'))
  assert [(row.first, row.last) for row in rows] == [(3, 4), (5, 5)]
