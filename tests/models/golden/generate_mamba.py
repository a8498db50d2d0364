"""Writes the Mamba golden files: logits of small random models.

By the slow path of transformers' MambaForCausalLM and Mamba2ForCausalLM, in
the environment that `generate.py` describes:

  golden_env/bin/python tests/models/golden/generate_mamba.py

Each file holds `config` (config.json as text), one array a tensor under its
Hugging Face name, `tokens` (B, T) and `logits` (B, T, V), all float32.
"""

import pathlib

import numpy as np
import torch
import transformers

_COMMON = {
  "num_hidden_layers": 2,
  "hidden_size": 32,
  "layer_norm_epsilon": 1e-5,
}
_CONFIGS = {
  "mamba1": transformers.MambaConfig(
    **_COMMON, vocab_size=88, state_size=16, time_step_rank=3
  ),
  # Chunks of 16 tokens: states pass between chunks, and the last is not full.
  "mamba2": transformers.Mamba2Config(
    **_COMMON,
    vocab_size=88,
    state_size=16,
    num_heads=8,
    head_dim=8,
    n_groups=1,
    chunk_size=16,
    tie_word_embeddings=True,
  ),
  "mamba2_groups": transformers.Mamba2Config(
    **_COMMON,
    vocab_size=72,
    state_size=8,
    num_heads=16,
    head_dim=4,
    n_groups=8,
    chunk_size=16,
    tie_word_embeddings=False,
  ),
}
_BATCH, _LENGTH = 2, 40


def _randomise(model: torch.nn.Module) -> None:
  """Weights at which every term tells, and states last for some tokens."""
  for name, weight in model.named_parameters():
    noise = torch.randn_like(weight)
    if "norm" in name or name.endswith("mixer.D"):
      weight.data = 1.0 + 0.3 * noise
    elif name.endswith("A_log"):
      weight.data = 0.7 * noise
    elif name.endswith(("dt_bias", "dt_proj.bias")):
      weight.data = noise - 1.0
    elif name.endswith("bias") or "embed" in name:
      weight.data = noise
    elif "conv1d" in name:
      weight.data = 0.7 * noise
    else:
      weight.data = 1.5 * noise / weight.shape[1] ** 0.5


def main() -> None:
  """Writes every golden file beside this script."""
  for name, config in _CONFIGS.items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.float32
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
