"""The script on small models: in a process of its own, and in this one."""

import json
import shutil

import jax
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from models import mamba, transformer
from models.convert import save_safetensors
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.text import tokenizing
from tests.experiments import processes, scripts


def run(*arguments):
  return scripts.run("generate", *arguments)


def test_one_prompt_streams_and_speeds_are_told(tmp_path):
  code, out, err = processes.run(
    tmp_path,
    ["experiments/generate.py"],
    "--prompt=Once upon a time",
    "--max_tokens=12",
    "--steps=3",
  )
  assert code == 0, err
  assert out.startswith("Once upon a time, there was a little")
  assert "prefill 5 tokens" in err
  assert "decode 11 tokens" in err
  assert "tokens/s" in err


def test_several_prompts_from_flags_and_a_file(tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text('{"prompt": "Lily and"}\n{"prompt": "One day Tom"}\n')
  output = tmp_path / "made/texts.jsonl"
  code, out, err = run(
    "--prompt=Once upon a time",
    f"--prompt_file={prompts}",
    "--max_tokens=20",
    "--temperature=0.8",
    "--top_p=0.9",
    "--top_k=50",
    "--seed=3",
    "--stop=a",
    "--stop=\\n",
    f"--output={output}",
  )
  assert code == 0, err
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  names = ["Once upon a time", "Lily and", "One day Tom"]
  assert [row["prompt"] for row in rows] == names
  for row in rows:
    assert row["tokens"] <= 20 and "a" not in row["text"]
    assert row["reason"] in ("stop string", "max_tokens", "end token")
    assert f"=== {row['prompt']!r}" in out


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
  """A model of 257 tokens, without a tokenizer."""
  folder = tmp_path_factory.mktemp("model")
  config = TransformerConfig.tiny(vocab_size=257, max_position=24)
  save_safetensors(folder, config, transformer.init(config, jax.random.key(0)))
  return folder


def test_a_model_without_a_tokenizer_is_given_one(bare):
  flags = (f"--model={bare}", "--prompt=日本", "--max_tokens=4")
  code, _, err = run(*flags)
  assert code == 2 and "--tokenizer" in err
  code, out, err = run(*flags, "--tokenizer=bytes", "--temperature=1e-38")
  assert code == 0 and out.startswith("日本") and "decode" in err
  assert out == run(*flags, "--tokenizer=bytes")[1]


def test_a_pattern_that_takes_too_long_is_told_in_one_line(
  bare, tmp_path, monkeypatch
):
  backend = tokenizing.of_bytes().backend
  pattern = tokenizers.Regex("^(([a-z])+.)+[A-Z]([a-z])+$")
  backend.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
  path = tmp_path / "tokenizer.json"
  backend.save(str(path))
  monkeypatch.setenv("RUST_BACKTRACE", "1")
  code, out, err = processes.run(
    tmp_path,
    ["experiments/generate.py"],
    f"--model={bare}",
    f"--tokenizer={path}",
    f"--prompt={'a' * 60}",
  )
  assert code == 2 and not out
  (line,) = err.splitlines()
  assert line.startswith(f"error: {path}: its pattern takes too long on 'aaa")
  assert line.endswith(": get another tokenizer.json")


def test_a_state_of_few_bits_is_asked_for(tmp_path):
  config = MambaConfig.tiny(vocab_size=257, vocab_multiple=1)
  save_safetensors(tmp_path, config, mamba.init(config, jax.random.key(0)))
  flags = (f"--model={tmp_path}", "--tokenizer=bytes", "--max_tokens=4")
  texts = {
    run(*flags, "--prompt=ab", *state)
    for state in ((), ("--state_format=int8+stochastic+conv=int8",))
  }
  assert all(code == 0 and out.startswith("ab") for code, out, _ in texts)
  code, _, err = run(*flags, "--prompt=ab", "--state_format=int8:5")
  assert code == 2 and "state_format=int8:5: quantize: groups of 5" in err


@pytest.fixture(scope="module")
def talker(bare, tmp_path_factory):
  """A model of bytes with a template of chats; writes it anew."""
  model = shutil.copytree(bare, tmp_path_factory.mktemp("chat") / "model")
  tokenizing.of_bytes().backend.save(str(model / "tokenizer.json"))

  def write(template):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template}))
    return f"--model={model}"

  return write


def test_a_chat_has_the_models_own_form(talker):
  model = talker(
    "{% for m in messages %}{{ raise_exception(m.content) }}{% endfor %}"
  )
  code, _, err = run(model, "--prompt=Hi you", "--chat")
  assert code == 2 and "template fails (Hi you)" in err
  assert "SmolLM" not in err
  code, _, err = run(model, "--prompt=Hi", "--system=Be brief.", "--chat")
  assert code == 2 and "template fails (Be brief.)" in err


def test_chats_of_several_turns_come_from_a_file(talker, tmp_path):
  model = talker(
    "{% for m in messages %}{{ m.role[0] ~ m.content }}{% endfor %}"
  )
  path, output = tmp_path / "chats.jsonl", tmp_path / "o.jsonl"
  turns = [
    {"role": role, "content": word}
    for role, word in (("user", "a"), ("assistant", "b"), ("user", "c"))
  ]
  rows = [{"messages": turns}, {"prompt": "d"}]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = (model, f"--prompt_file={path}", "--max_tokens=4")
  code, out, err = run(*flags, "--chat", "--system=s", f"--output={output}")
  assert code == 0, err
  assert "=== 'c' (" in out and "=== 'd' (" in out
  # Of "ss", "ua", "ab" and "uc", and of "ss" and "ud".
  assert "prefill 12 tokens" in err
  found = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row["prompt"] for row in found] == [turns, "d"]
  code, _, err = run(*flags)
  assert code == 2 and "line 1 is a chat" in err
  for messages in ([], "a", [{"role": "user"}], [{"role": 1, "content": "a"}]):
    path.write_text(json.dumps({"messages": messages}))
    code, _, err = run(*flags, "--chat")
    assert code == 2 and '"messages" is no list' in err


def test_the_last_line_break_of_a_file_is_no_part_of_its_prompt(tmp_path):
  path = tmp_path / "prompt"
  outputs = set()
  for end in (b"", b"\n", b"\r\n"):
    path.write_bytes(b"Once\n\na" + end)
    code, out, err = run(f"--prompt_file={path}", "--max_tokens=1")
    assert code == 0 and "prefill 5 tokens" in err, err
    outputs.add(out)
  assert len(outputs) == 1 and outputs.pop().startswith("Once\n\na")


def test_a_long_prompt_is_told_on_a_line_of_its_own():
  code, out, err = run("--prompt=a b", "--max_tokens=600")
  assert code == 2 and out == "a b\n"
  assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
  "flags, parts",
  [
    ((), ("--prompt", "--prompt_file")),
    (("--prompt=a", "--max_tokens=600"), ("512", "max_tokens")),
    (("--prompt=a", "--state_format=int7"), ("state_format=int7", "int8:32")),
    (("--prompt=a", "--state_format=int8"), ("no recurrent state",)),
    (("--prompt=a", "--keep_pages=2"), ("--keep_pages",)),
    (("--prompt=a", "--keep_pages=0"), ("--keep_pages",)),
    (("--prompt=a", "--chat"), ("--chat", "im_start")),
    (("--prompt=a", "--system=b"), ("--system", "--chat")),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, parts):
  code, _, err = run(*flags)
  assert code == 2
  (line,) = [s for s in err.splitlines() if s.startswith("error: ")]
  assert "Traceback" not in err
  for part in parts:
    assert part in line
