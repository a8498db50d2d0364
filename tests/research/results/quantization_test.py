from research.results import quantization


def rows(method, value):
  common = {"model": "m", "method": method, "what": "text", "bytes": 2_500_000}
  values = {
    "perplexity": 10 * value,
    "ratio": value,
    "decoding_ratio": value,
    "kl_16": 0.25,
    "repetition": 0.5,
    "piqa_acc": 0.5 * value,
    "piqa_change": value - 1,
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


def test_of_several_seeds_the_mean_is_a_line_and_each_is_told():
  of = lambda seed, value: [
    row | {"seed": seed, "bytes": 9} for row in rows("w4a16", value)
  ]
  table = quantization.table([*of(0, 1.04), *of(1, 1.06), *rows("w4a16", 1.05)])
  heading, _, line = table.strip().splitlines()
  assert "of each seed" in heading and "| +4.00, +6.00 " in line
  assert "+5.00% [+4.00, +6.00]" in line and "| 2.5 " in line


def test_answers_of_tasks_and_their_change():
  table = quantization.tasks([*rows("float", 1.0), *rows("w4a16", 0.9)])
  heading, _, _, line = table.strip().splitlines()
  assert "piqa, change" in heading
  assert "| 45.0% [44.0, 46.0] | -10.0 [-11.0, -9.0] |" in line
