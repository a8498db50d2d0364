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


JUDGED = (
  *COMMON, "--text=wikitext2:valid", "--scored_windows=4", "--rows=2",
  "--tokens=32", "--at=4,16", "--plant=2", "--name=stories",
  "--recipes=rtn_w8a16,llama_cpp_q8_0",
)  # fmt: skip


def rows_of(path):
  found = json.loads(path.read_text())
  assert found["complete"]
  return found["rows"]


def test_recipes_beside_each_other(tmp_path):
  plot, result = tmp_path / "plot.png", tmp_path / "result.json"
  given = (*JUDGED, f"--workdir={tmp_path / 'run'}", f"--result={result}")
  code, out, err = scripts.run("eval_quantized", *given, f"--plot={plot}")
  assert code == 0, err
  assert plot.exists() and "| rtn_w8a16 " in out
  found = rows_of(result)
  rows = {(row["method"], row["metric"]): row for row in found}
  assert list(dict.fromkeys(method for method, _ in rows)) == [
    "float", "rtn_w8a16", "llama_cpp_q8_0"
  ]  # fmt: skip
  assert rows["float", "ratio"]["value"] == 1
  for method in ("rtn_w8a16", "llama_cpp_q8_0"):
    one = rows[method, "decoding_ratio"]
    assert one["low"] <= one["value"] <= one["high"]
    assert abs(one["value"] - 1) < 0.05
    assert 0 <= rows[method, "kl_16"]["value"] < 0.01
    assert one["bytes"] < 0.7 * rows["float", "ratio"]["bytes"]
    assert one["model"] == "stories"
  # What is done is read; what is not runs again, and comes out the same.
  (tmp_path / "run" / "llama_cpp_q8_0.json").unlink()
  code, out, err = scripts.run("eval_quantized", *given)
  assert code == 0, err
  assert "rtn_w8a16: done before" in out
  assert "llama_cpp_q8_0: done before" not in out
  assert rows_of(result) == found
  code, _, err = scripts.run("eval_quantized", *given, "--plant=3")
  assert code == 2 and "--plant is 3" in err


def test_seeds_have_rows_of_their_own_and_a_mean_whatever_the_processes(
  tmp_path,
):
  items = [
    {"text": f"The cat sat on the mat, and the dog on {end}"}
    for end in ("the mat", "a cat", "the dog", "it all")
  ]
  lines = "".join(f"{json.dumps(item)}\n" for item in items)
  (tmp_path / "lambada_test.jsonl").write_text(lines)
  result = tmp_path / "result.json"
  code, out, err = scripts.run(
    "eval_quantized", *JUDGED, "--model=tiny,tiny", "--recipes=rtn_w4a16",
    "--workers=2", "--tasks=lambada", f"--data={tmp_path}",
    f"--result={result}",
  )  # fmt: skip
  assert code == 0, err
  assert "| lambada " in out
  rows = {
    (row["method"], row["metric"], row.get("seed")): row
    for row in rows_of(result)
  }
  for metric in ("ratio", "kl_16", "lambada_acc", "lambada_change"):
    first, second, mean = (
      rows["rtn_w4a16", metric, seed] for seed in (0, 1, None)
    )
    assert (first["seeds"], mean["seeds"]) == (1, 2)
    # Both models are the same here.
    assert first["value"] == second["value"]
    assert mean["value"] == pytest.approx(first["value"])
    assert mean["bytes"] == first["bytes"]


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
    ("eval_quantized", ("--tasks=lambada",), ("--data",)),
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
