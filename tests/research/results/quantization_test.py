from research.results import quantization


def rows(method, value):
  common = {"model": "m", "method": method, "what": "text", "bytes": 2_500_000}
  values = {
    "perplexity": 10 * value,
    "ratio": value,
    "decoding_ratio": value,
    "kl_16": 0.25,
    "repetition": 0.5,
  }
  return [
    common | {"metric": k, "value": v, "low": v - 0.01, "high": v + 0.01}
    for k, v in values.items()
  ]


def test_a_line_is_a_recipe():
  table = quantization.table([*rows("float", 1.0), *rows("w4a16", 1.05)])
  heading, _, first, second = table.strip().splitlines()
  assert "KL at 16" in heading and "model" not in heading
  assert "+0.00% [-1.00, +1.00]" in first
  assert "+5.00% [+4.00, +6.00]" in second
  assert "| 2.5 " in second and "| 10.50 " in second
