"""Checkpoint folders of small random T5Gemma models, from the golden files."""

import json
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, processors

_GOLDEN = pathlib.Path(__file__).parent / "golden"


def write(name, directory, rename=None, drop=(), **changes):
  """A checkpoint folder of a golden file, and what transformers computes."""
  with np.load(_GOLDEN / f"{name}.npz") as file:
    arrays = dict(file)
  hf = json.loads(str(arrays.pop("config")))
  text = hf["encoder"].get("text_config", hf["encoder"])
  text.update(changes)
  for key in drop:
    text.pop(key, None)
  (directory / "config.json").write_text(json.dumps(hf))
  golden = [arrays.pop(key) for key in ("tokens", "lengths", "hidden")]
  rename = rename or (lambda name: name)
  tensors = {rename(name): array for name, array in arrays.items()}
  safetensors.numpy.save_file(
    {name: array for name, array in tensors.items() if name},
    directory / "model.safetensors",
  )
  return golden


def write_tokenizer(directory):
  """Characters behind a begin token, and a picture behind the last id."""
  letters = "abcdefghijklmnopqrstuvwxyz0123456789 .,:=-+"
  vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
  vocab |= {letter: len(vocab) + i for i, letter in enumerate(letters)}
  vocab |= {f"<unused{i}>": i for i in range(len(vocab), 64)}
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
  )
  backend.post_processor = processors.TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", 2)]
  )
  backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<image_soft_token>"])
  backend.save(str(directory / "tokenizer.json"))
