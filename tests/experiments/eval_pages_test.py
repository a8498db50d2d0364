"""The script on a small model, in this process."""

import json

import jax
import pytest

from models import export, language_model
from models.transformer_config import TransformerConfig
from research.text import tokenizing
from tests.experiments import scripts


def run(*arguments):
  return scripts.run("eval_pages", *arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A random model of bytes, of one layer."""
  folder = tmp_path_factory.mktemp("pages") / "model"
  config = TransformerConfig.tiny(
    vocab_size=257, vocab_multiple=8, num_layers=1, max_position=256
  )
  params = language_model.init(config, jax.random.key(0))
  export.save(folder, config, params, tokenizing.of_bytes())
  return folder


def test_each_choice_of_pages_is_beside_all_of_them(model, tmp_path):
  result = tmp_path / "result.json"
  code, out, err = run(
    f"--model={model}",
    "--text=gutenberg:slice",
    "--context=100",
    "--scored=24",
    "--windows=3",
    "--needles=2",
    "--batch=3",
    "--keep_pages=1,.25",
    "--page_size=8",
    "--choices=moments",
    "--dtype=float32",
    f"--result={result}",
  )
  assert code == 0, err
  assert "| needles " in out
  rows = json.loads(result.read_text())["rows"]
  found = [(row["task"], row["method"], row["budget"]) for row in rows]
  assert found == [
    (task, method, keep)
    for task in ("perplexity", "needles")
    for method, keep in (("all pages", 1), ("moments", 0.25))
  ]
  keys = "system model data method budget metric value low high seeds context"
  assert all(set(keys.split()) <= row.keys() for row in rows)
  # An untrained model knows nothing of 257 tokens.
  assert 200 < rows[0]["value"] < 330
  assert rows[1]["nats_more"] != 0


@pytest.mark.parametrize(
  "flags, part",
  [
    (("--keep_pages=0",), "--keep_pages"),
    (("--choices=best",), "--choices"),
    (("--context=500", "--tokenizer=bytes"), "--context=500"),
    (("--context=200", "--windows=9999999"), "--windows"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, flags, part):
  code, _, err = run(f"--model={model}", *flags)
  assert code == 2 and "Traceback" not in err
  (line,) = [s for s in err.splitlines() if s.startswith("error: ")]
  assert part in line
