"""Writes the golden files: logits of small random models by transformers.

Needs PyTorch and transformers, which nothing else here does; run it in an
environment of its own:

  python3 -m venv golden_env
  golden_env/bin/pip install torch==2.13.0 transformers==5.24.0 numpy
  golden_env/bin/python tests/models/golden/generate.py gemma3

for gemma3; the other files are of version 5.23.0. Without names all are
written. Each file holds `config` (config.json as text), one array a tensor
under its Hugging Face name, `tokens` (B, T) and `logits` (B, T, V), all
float32.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

_COMMON = {
  "num_hidden_layers": 2,
  "max_position_embeddings": 128,
}
_CONFIGS = {
  "llama3": transformers.LlamaConfig(
    **_COMMON,
    vocab_size=88,
    hidden_size=40,
    intermediate_size=56,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    # Bands at 16 and 64 positions: of the 8 wavelengths one is kept, one lies
    # between, and the others are scaled.
    rope_parameters={
      "rope_type": "llama3",
      "rope_theta": 500000.0,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64,
    },
  ),
  "smollm2": transformers.LlamaConfig(
    **_COMMON,
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=6,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
  ),
  "qwen2": transformers.Qwen2Config(
    **_COMMON,
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=6,
    num_key_value_heads=3,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
  ),
  "qwen3": transformers.Qwen3Config(
    **_COMMON,
    vocab_size=88,
    hidden_size=40,
    intermediate_size=56,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
  ),
  # Texts are longer than the window by far, and the divisor of the scores is
  # not the size of a head.
  "gemma3": transformers.Gemma3TextConfig(
    **(_COMMON | {"num_hidden_layers": 4}),
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=20,
    sliding_window=7,
    layer_types=[
      "sliding_attention",
      "sliding_attention",
      "full_attention",
      "sliding_attention",
    ],
    rope_parameters={
      "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
      "full_attention": {
        "rope_type": "linear",
        "rope_theta": 1000000.0,
        "factor": 8.0,
      },
    },
  ),
}
_BATCH, _LENGTH = 2, 40


def _randomise(model: torch.nn.Module) -> None:
  """Weights at which heads attend sharply and every term tells."""
  for name, weight in model.named_parameters():
    noise = torch.randn_like(weight)
    if "norm" in name:
      # Norms of Gemma add 1 to their weights.
      is_gemma = model.config.model_type.startswith("gemma")
      weight.data = (0.0 if is_gemma else 1.0) + 0.3 * noise
    elif name.endswith("bias") or "embed" in name:
      weight.data = noise
    else:
      weight.data = 1.5 * noise / weight.shape[1] ** 0.5


def main() -> None:
  """Writes the golden files that are named, or all, beside this script."""
  for name in sys.argv[1:] or _CONFIGS:
    config = _CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
      config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    _randomise(model)
    tokens = torch.randint(config.vocab_size, (_BATCH, _LENGTH))
    with torch.no_grad():
      logits = model(tokens, use_cache=False).logits
    weights = {k: v.detach().numpy() for k, v in model.named_parameters()}
    np.savez_compressed(
      pathlib.Path(__file__).parent / f"{name}.npz",
      config=config.to_json_string(),
      tokens=tokens.numpy().astype(np.int32),
      logits=logits.numpy(),
      **weights,
    )


if __name__ == "__main__":
  main()
