"""Decoding by mamba_ssm, the peer of our own: its model in a CUDA graph."""

import importlib

from models.mamba_config import MambaConfig
from research.bench.case import Call

_PROMPT = 8


def missing() -> str | None:
  """Says in one line why the peer is not here, or None."""
  try:
    if not importlib.import_module("torch").cuda.is_available():
      return "torch sees no CUDA device"
    importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    importlib.import_module("causal_conv1d")
  except Exception as error:  # a build for another torch fails in any way
    return f"{type(error).__name__}: {error}".splitlines()[0]
  return None


def make(config: MambaConfig, batch: int, tokens: int) -> Call:
  """Prepares greedy decoding with random bfloat16 weights.

  Its steps are replayed from a CUDA graph, as its own `generate(cg=True)` does,
  but without that function's work on the host between two steps.

  Args:
    config: of a Mamba-1 or Mamba-2 model without attention.
    batch: rows.
    tokens: decoded in a call.
  """
  torch = importlib.import_module("torch")
  simple = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
  configs = importlib.import_module("mamba_ssm.models.config_mamba")
  layer = {"mamba1": "Mamba1", "mamba2": "Mamba2"}[config.kind]
  model = simple.MambaLMHeadModel(
    configs.MambaConfig(
      d_model=config.d_model,
      n_layer=config.num_layers,
      vocab_size=config.vocab_size,
      ssm_cfg={"layer": layer},
      rms_norm=True,
      residual_in_fp32=True,
      fused_add_norm=True,
      pad_vocab_size_multiple=config.vocab_multiple,
    ),
    device="cuda",
    dtype=torch.bfloat16,
  )
  prompt = torch.full((batch, _PROMPT), 5, dtype=torch.long, device="cuda")
  # Captures the graph.
  model.generate(prompt, max_length=_PROMPT + tokens, cg=True, top_k=1)
  step = model._decoding_cache.run
  places = torch.full((batch, 1), _PROMPT, dtype=torch.long, device="cuda")

  @torch.inference_mode()
  def decode() -> None:
    current = prompt[:, :1]
    for _ in range(tokens):
      current = step(current, places, _PROMPT).argmax(-1)

  return Call(
    start=decode, wait=lambda _: torch.cuda.synchronize(), count=tokens
  )
