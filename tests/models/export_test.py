"""Exports are opened by the rules of transformers 5, which need no PyTorch.

Where transformers is not installed, what it gave stands in for it.
"""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from models import control_tokens, encoding, export, language_model
from models.convert import Checkpoint, load
from models.mamba_config import MambaConfig
from models.tokenizer import load_tokenizer
from models.transformer_config import TransformerConfig
from research.text import tokenizing

# 257 tokens in tables of 384 rows.
CONFIGS = {
  "llama": TransformerConfig.tiny(
    vocab_size=257, vocab_multiple=128, tie_embeddings=False, num_layers=1
  ),
  "mamba2": MambaConfig.tiny(vocab_size=257, vocab_multiple=128, num_layers=1),
}
TEXT = "ab é.  <|endoftext|>"
# Of `AutoTokenizer.from_pretrained(folder)(TEXT)`, and its special ids.
GOLDEN = {
  "ids": [97, 98, 32, 195, 169, 46, 32, 32, 256],
  "bos": 256,
  "eos": 256,
  "tokens": 257,
  "decoded": TEXT,
}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(request, tmp_path_factory):
  config, rng = CONFIGS[request.param], np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    language_model.abstract_params(config),
  )
  folder = tmp_path_factory.mktemp("exported") / "model"
  export.save(folder, config, params, tokenizing.of_bytes())
  return folder, config, params


def read(folder, name):
  return json.loads((folder / f"{name}.json").read_text())


def test_every_file_names_the_token_between_texts(exported):
  folder, config, _ = exported
  for name in ("config", "generation_config"):
    described = read(folder, name)
    assert described["bos_token_id"] == described["eos_token_id"] == 256
  assert read(folder, "config")["vocab_size"] == 257
  described = read(folder, "tokenizer_config")
  assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert described["eos_token"] == described["bos_token"] == "<|endoftext|>"
  assert described.get("model_max_length") == config.max_position


def test_rows_that_are_no_tokens_are_left_out(exported):
  folder, config, params = exported
  found = load(folder)
  assert found.config.padded_vocab_size == found.config.vocab_size == 257
  tokens = np.array([[5, 6, 256, 7]])
  run = jax.jit(language_model.forward, static_argnums=0)
  np.testing.assert_allclose(
    run(found.config, found.params, tokens),
    run(config, params, tokens),
    rtol=1e-5,
    atol=1e-5,
  )


def test_the_same_files_are_read_back(exported):
  tokenizer = load_tokenizer(load(exported[0]))
  assert tokenizer.vocab_size == 257
  assert control_tokens.end_ids(tokenizer) == (256,)
  assert control_tokens.start_id(tokenizer) == 256


def test_transformers_opens_it(exported):
  folder = exported[0]
  if importlib.util.find_spec("transformers") is None:
    # Its rules: of a PreTrainedTokenizerFast tokenizer.json counts, and the
    # special tokens of tokenizer_config.json are added where they are missing.
    described = read(folder, "tokenizer_config")
    backend = load_tokenizer(load(folder)).backend
    backend.add_special_tokens([described["bos_token"], described["eos_token"]])
    ids = backend.encode(TEXT).ids
    found = {
      "ids": ids,
      "bos": backend.token_to_id(described["bos_token"]),
      "eos": backend.token_to_id(described["eos_token"]),
      "tokens": backend.get_vocab_size(),
      "decoded": backend.decode(ids, skip_special_tokens=False),
    }
  else:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT)["input_ids"]
    found = {
      "ids": ids,
      "bos": tokenizer.bos_token_id,
      "eos": tokenizer.eos_token_id,
      "tokens": len(tokenizer),
      "decoded": tokenizer.decode(ids),
    }
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.eos_token_id) == (257, 256)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == generation.bos_token_id == 256
  assert found == GOLDEN


def test_a_model_that_chats_keeps_its_form(exported, tmp_path):
  """Template, names, all ends, and the begin token of a text."""
  _, config, params = exported
  backend = tokenizing.of_bytes().backend
  backend.add_special_tokens(["<b>", "<e>", "<|im_end|>"])
  encoding.put_begin(backend, 257)
  template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
  tokenizer = encoding.Tokenizer(
    backend=backend,
    vocab_size=260,
    bos_id=257,
    end_ids=(258,),
    chat_template=template,
    names={"bos_token": "<b>", "eos_token": "<e>", "pad_token": "no token"},
  )
  export.save(tmp_path / "m", config, params, tokenizer)
  found = load_tokenizer(
    Checkpoint(
      config=dataclasses.replace(config, vocab_size=260),
      params={},
      name="m",
      path=tmp_path / "m",
    )
  )
  assert (found.chat_template, found.bos_id) == (template, 257)
  assert found.names == {"bos_token": "<b>", "eos_token": "<e>"}
  ends = control_tokens.end_ids(tokenizer)
  assert set(control_tokens.end_ids(found)) == {257, *ends} > {258, 259}
  generation = read(tmp_path / "m", "generation_config")
  assert generation["bos_token_id"] == 257
  assert generation["eos_token_id"] == [257, *ends]
