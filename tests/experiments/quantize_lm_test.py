"""Quantizing the shipped model, and what other scripts make of the result."""

import json

import pytest

from tests.experiments import processes, scripts

COMMON = ("--windows=8", "--length=128", "--calibration_text=wikitext2:valid")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  script = ["experiments/quantize_lm.py"]
  out = folder / "tiny_w4a8"
  code, said, err = processes.run(
    folder, script, f"--out={out}", "--recipe=quamba2_w4a8", *COMMON
  )
  assert code == 0, err
  assert "bytes of weights" in said
  assert "layers: 10/10" in err
  return out


def test_the_folder_is_a_model_that_says_how_it_came_to_be(quantized):
  config = json.loads((quantized / "config.json").read_text())
  assert config["quantization_config"] == {"quant_method": "frugax"}
  described = config["frugax_recipe"]
  assert described["recipe"] == "quamba2_w4a8"
  assert described["calibration_tokens"] == 8 * 128


def test_other_scripts_take_it_as_a_model(quantized):
  code, out, err = scripts.run(
    "eval_lm", f"--model={quantized}", "--window=64", "--windows=4",
    "--text=wikitext2:valid",
  )  # fmt: skip
  assert code == 0, err
  assert "tiny_w4a8" in out and "perplexity" in out
  code, out, err = scripts.run(
    "generate", f"--model={quantized}", "--prompt=Once upon", "--max_tokens=4"
  )
  assert code == 0 and out.startswith("Once upon"), err


def test_recipes_beside_each_other(tmp_path):
  plot, result = tmp_path / "plot.png", tmp_path / "result.json"
  code, out, err = scripts.run(
    "eval_quantized", *COMMON, "--text=wikitext2:valid", "--scored_windows=4",
    "--rows=2", "--tokens=32", "--at=4,16", "--plant=2", "--name=stories",
    "--workers=2",
    "--recipes=rtn_w8a16,llama_cpp_q8_0", f"--plot={plot}",
    f"--result={result}",
  )  # fmt: skip
  assert code == 0, err
  assert plot.exists() and "| rtn_w8a16 " in out
  found = json.loads(result.read_text())
  assert found["complete"]
  rows = {(row["method"], row["metric"]): row for row in found["rows"]}
  assert {method for method, _ in rows} == {
    "float", "rtn_w8a16", "llama_cpp_q8_0"
  }  # fmt: skip
  assert rows["float", "ratio"]["value"] == 1
  for method in ("rtn_w8a16", "llama_cpp_q8_0"):
    one = rows[method, "decoding_ratio"]
    assert one["low"] <= one["value"] <= one["high"]
    assert abs(one["value"] - 1) < 0.05
    assert 0 <= rows[method, "kl_16"]["value"] < 0.01
    assert one["bytes"] < 0.7 * rows["float", "ratio"]["bytes"]
    assert one["model"] == "stories"


@pytest.mark.parametrize(
  "script, flags, parts",
  [
    ("quantize_lm", ("--out=x", "--recipe=w3a3"), ("w3a3", "quamba2_w8a8")),
    ("quantize_lm", (), ("--out",)),
    ("quantize_lm", ("--out=docs",), ("--out=docs", "exists")),
    ("quantize_lm", ("--out=x", "--model=none.gguf"), ("none.gguf",)),
    ("quantize_lm", ("--out=x", "--windows=4000"), ("longer text",)),
    ("eval_quantized", ("--recipes=w3a3",), ("w3a3", "quamba2_w8a8")),
    ("eval_quantized", ("--at=0",), ("--at=0",)),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, flags, parts):
  code, _, err = scripts.run(script, *flags)
  assert code == 2
  assert "Traceback" not in err
  for part in parts:
    assert part in err


def test_a_quantized_model_is_not_quantized_again(quantized, tmp_path):
  code, _, err = scripts.run(
    "quantize_lm",
    f"--model={quantized}",
    f"--out={tmp_path / 'again'}",
    *COMMON,
  )
  assert code == 2 and "quantized already" in err
  assert not (tmp_path / "again").exists()
