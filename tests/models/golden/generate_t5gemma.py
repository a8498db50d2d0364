"""Writes the T5Gemma golden files: hidden states of small random encoders.

By the eager path of transformers, and by two versions of it, since none does
for both models: T5Gemma by 4.57.6, whose sliding layers see less than
`sliding_window` tokens to each side, as at its release (version 5 sees one
more), T5Gemma-2 by 5.24.0:

  python3 -m venv golden_env4
  golden_env4/bin/pip install torch==2.13.0 transformers==4.57.6 numpy
  golden_env4/bin/python tests/models/golden/generate_t5gemma.py

and the same with golden_env5 and transformers==5.24.0. Each writes one file: it
holds `config` (config.json as text), one array a tensor under the name that
`save_pretrained` gives it, decoder and tower included, `tokens` (B, T),
`lengths` (B,) and `hidden` (B, T, D), all float32.
"""

import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

_LENGTHS = (29, 17, 3)
_TEXT = {
  "vocab_size": 64,
  "hidden_size": 24,
  "intermediate_size": 32,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "query_pre_attn_scalar": 20,
  "sliding_window": 6,
  "max_position_embeddings": 64,
}
_DECODER = _TEXT | {"num_hidden_layers": 1}
# Embeddings are large and the cap low, so that the cap is felt.
_CAP = 5.0


def _t5gemma() -> torch.nn.Module:
  config = transformers.T5GemmaConfig(
    encoder=_TEXT | {"attn_logit_softcapping": _CAP},
    decoder=_DECODER | {"attn_logit_softcapping": _CAP},
    vocab_size=_TEXT["vocab_size"],
    attn_implementation="eager",
  )
  return transformers.T5GemmaForConditionalGeneration(config)


def _t5gemma2() -> torch.nn.Module:
  kinds = ["sliding_attention", "sliding_attention", "full_attention"]
  rope = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
      "rope_type": "linear",
      "rope_theta": 1000000.0,
      "factor": 8.0,
    },
  }
  vision = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 4,
    "patch_size": 2,
  }
  config = transformers.T5Gemma2Config(
    encoder={
      "text_config": _TEXT
      | {
        "layer_types": [*kinds, "sliding_attention"],
        "rope_parameters": rope,
      },
      "vision_config": vision,
      "mm_tokens_per_image": 1,
      "eoi_token_index": 5,
    },
    decoder=_DECODER | {"layer_types": kinds[2:], "rope_parameters": rope},
    image_token_index=6,
    attn_implementation="eager",
  )
  return transformers.T5Gemma2ForConditionalGeneration(config)


def _randomise(model: torch.nn.Module) -> None:
  """Weights at which every term tells; norms add 1 to theirs."""
  for name, weight in model.named_parameters():
    noise = torch.randn_like(weight)
    if "norm" in name:
      weight.data = 0.3 * noise
    elif "embed" in name or weight.ndim < 2:
      weight.data = noise
    else:
      weight.data = 1.5 * noise / weight.shape[1] ** 0.5


def main() -> None:
  """Writes the file that this version of transformers is for."""
  is_first = transformers.__version__.startswith("4.")
  name, make = ("t5gemma", _t5gemma) if is_first else ("t5gemma2", _t5gemma2)
  torch.manual_seed(0)
  model = make().eval()
  _randomise(model)
  tokens = torch.randint(1, _TEXT["vocab_size"], (len(_LENGTHS), _LENGTHS[0]))
  if name == "t5gemma2":
    tokens[0, 4] = model.config.encoder.eoi_token_index
  mask = torch.arange(_LENGTHS[0])[None] < torch.tensor(_LENGTHS)[:, None]
  with torch.no_grad():
    encoder = model.get_encoder()
    hidden = encoder(tokens, attention_mask=mask.long()).last_hidden_state
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    folder = pathlib.Path(folder)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    config = (folder / "config.json").read_text(encoding="utf-8")
  np.savez_compressed(
    pathlib.Path(__file__).parent / f"{name}.npz",
    config=config,
    tokens=tokens.numpy().astype(np.int32),
    lengths=np.array(_LENGTHS, np.int32),
    hidden=hidden.numpy(),
    **weights,
  )


if __name__ == "__main__":
  main()
