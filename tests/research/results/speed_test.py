from research.results import speed, training

SPEED = {
  "op": "decode",
  "model": "m",
  "shape": "B1",
  "implementation": "xla",
  "ms": 2.0,
  "tokens_per_second": 500.0,
  "floor_ms": 1.0,
  "share": 0.5,
  "error": 1e-3,
  "peer": None,
  "peer_detail": None,
  "peer_ms": None,
}


def test_decoding_beside_a_peer():
  peer = {"peer": "p", "peer_detail": "graph", "peer_ms": 4.0}
  table = speed.table([SPEED, SPEED | peer]).splitlines()
  assert "ms / peer ms" in table[2]
  assert "p, graph" in table[5] and "0.50" in table[5]
  assert "p, graph" not in table[4] and "50.0%" in table[4]


def test_what_binds_and_the_dtype_of_a_state_are_named():
  row = SPEED | {"dtype": "bfloat16", "floor_bytes_ms": 0.25}
  scan = row | {"op": "scan", "bound": "exponentials"}
  step = row | {"bound": "bytes", "state_dtype": "float32"}
  text = speed.table([scan, step])
  head, _, first, second = text.splitlines()[2:]
  cells = lambda line: [cell.strip() for cell in line.split("|")]
  found = dict(zip(cells(head), cells(first), strict=True))
  assert found["floor of"] == "exponentials" and found["dtype"] == "bfloat16"
  assert found["floor of bytes, ms"] == "0.250"
  found = dict(zip(cells(head), cells(second), strict=True))
  assert found["floor of"] == "bytes" and found["floor of bytes, ms"] == "–"
  assert found["dtype"] == "bfloat16, state float32"
  text = speed.table([step, step | {"state_format": "bfloat16"}])
  assert "floor of bytes." in text and "floor of bytes, ms" not in text


def test_updates_say_what_their_time_goes_to():
  kernels = [
    {"name": "nvjet_sm90", "ms": 1.0, "launches": 2.0},
    {"name": "ssd_forward_kernel", "ms": 0.5, "launches": 2.0},
    {"name": "input_reduce_fusion", "ms": 0.2, "launches": 2.0},
  ]
  row = SPEED | {"kernels": kernels, "busy_ms": 1.9}
  text = speed.table([row])
  assert (
    "decode of m, B1, xla, ms by kind of kernel: matrix products 1.00; "
    "scans 0.50; norms, gates, sums and all else 0.40." in text
  )
  assert "by kind" not in speed.table([SPEED])
  # A case beside two peers is told once, and one of no model, too.
  short = row | {"ms": 0.1, "model": None, "peer": "a", "peer_ms": 1.0}
  text = speed.table([short, short | {"peer": "b"}])
  assert text.count("decode of B1, xla, ms by kind of kernel:") == 1
  assert "scans 0.5000" in text


def test_runs_without_a_known_peak_have_no_mfu():
  row = {
    "model": "ours",
    "budget": 2_500_000,
    "value": 12.345,
    "seconds": 60.0,
    "tokens_per_second": 41666.7,
    "mfu": None,
  }
  line = training.table([row]).splitlines()[2]
  for cell in ("ours", "2.5M", "12.3", "41,667"):
    assert cell in line


def test_rows_that_regression_lms_had_once_stand_beside_the_peer():
  shared = {"work": "draws", "model": "m", "shape": "B1"}
  peer = {"system": "regress-lm", "examples_per_second": 1.0, "seconds": 3.0}
  rows = [
    shared | peer | {"dtype": "float32", "setting": "tf32", "compiled": False},
    shared | {"system": "frugax", "dtype": "float32", "setting": "tf32",
     "attention": "xla", "seconds": 2.0, "examples_per_second": 1.5,
     "floor_seconds": 1.0, "share": 0.5},
    shared | peer | {"dtype": "bfloat16", "setting": "bfloat16",
     "timed_texts": 16, "texts": 512},
    shared | peer | {"work": "update", "dtype": "bfloat16",
     "setting": "bfloat16", "timed_texts": 16, "texts": 16},
  ]  # fmt: skip
  beside, alone, whole = speed.table(rows).splitlines()[4:]
  cells = [cell.strip() for cell in beside.split("|")]
  assert "float32, tf32" in cells and "xla attention" in cells
  assert "regress-lm, tf32, not compiled" in cells
  assert {"2,000.000", "3,000.000", "0.67", "1,000.000", "50.0%"} < {*cells}
  assert "regress-lm, bfloat16, scaled up from 16 texts" in alone
  assert "scaled up" not in whole
