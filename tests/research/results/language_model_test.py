from research.results import language_model as result_tables

SPEED = {
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
  table = result_tables.decoding([SPEED, SPEED | peer]).splitlines()
  assert "ms / peer ms" in table[0]
  assert "p, graph" in table[3] and "0.50" in table[3]
  assert "p, graph" not in table[2] and "50.0%" in table[2]


def test_updates_say_what_their_time_goes_to():
  kernels = [
    {"name": "nvjet_sm90", "ms": 1.0, "launches": 2.0},
    {"name": "ssd_forward_kernel", "ms": 0.5, "launches": 2.0},
    {"name": "input_reduce_fusion", "ms": 0.2, "launches": 2.0},
  ]
  row = SPEED | {"kernels": kernels, "busy_ms": 1.9}
  text = result_tables.updates([row])
  assert (
    "m, ms by kind of kernel: matrix products 1.0; scans 0.5; "
    "norms, gates, sums and all else 0.4." in text
  )
  assert "by kind" not in result_tables.updates([SPEED])


def test_runs_without_a_known_peak_have_no_mfu():
  row = {
    "model": "ours",
    "budget": 2_500_000,
    "value": 12.345,
    "seconds": 60.0,
    "tokens_per_second": 41666.7,
    "mfu": None,
  }
  line = result_tables.runs([row]).splitlines()[2]
  for cell in ("ours", "2.5M", "12.3", "41,667"):
    assert cell in line
