"""Decoding by Hugging Face transformers, the peer of our Transformers.

A static cache that is filled to the context, and a decoding step that is
compiled and replayed from a CUDA graph: no work on the host between two steps.
Needs transformers 5 and a torch with CUDA.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from models.convert import hf_config
from models.transformer_config import TransformerConfig
from research.bench.case import Call

# One graph that is captured by hand of the compiled step. The graphs that
# torch.compile makes itself check their guards between two steps: they were
# never the faster, and take as long to compile again.
WAY = "compiled, CUDA graph"

# Calls before a graph is captured: compilation and first allocations.
_WARM = 3


def missing() -> str | None:
  """Says in one line why the peer is not here, or None."""
  try:
    if not importlib.import_module("torch").cuda.is_available():
      return "torch sees no CUDA device"
    version = importlib.import_module("transformers").__version__
  except Exception as error:  # A build for another torch fails in any way.
    return f"{type(error).__name__}: {error}".splitlines()[0]
  if int(version.partition(".")[0]) < 5:
    return f"transformers is {version}, not 5 or later"
  return None


def make(
  config: TransformerConfig, batch: int, tokens: int, context: int
) -> Call:
  """Prepares greedy decoding with random bfloat16 weights.

  Args:
    config: of the model; its family decides about the peer's module.
    batch: rows.
    tokens: decoded in a call.
    context: tokens in the cache before every call.
  """
  torch = importlib.import_module("torch")
  model = _model(config)
  cache = _filled(model, config, batch, context, context + tokens)
  current = torch.full((batch, 1), 5, dtype=torch.long, device="cuda")
  place = torch.full((1,), context, dtype=torch.long, device="cuda")
  for tensor in (current, place):
    # Else a graph could not write to them.
    torch._dynamo.mark_static_address(tensor)
  names = inspect.signature(type(model).forward).parameters
  own = {"cache" if "cache" in names else "past_key_values": cache}
  if "cache_position" in names:
    own["cache_position"] = place

  def step() -> None:
    scores = model(
      input_ids=current, position_ids=place[None], use_cache=True, **own
    ).logits
    current.copy_(scores[:, -1:].argmax(-1))
    place.add_(1)

  def rewind() -> tuple:
    place.fill_(context)
    for layer in cache.layers:
      if hasattr(layer, "cumulative_length"):
        layer.cumulative_length.fill_(context)
    torch.cuda.synchronize()
    return ()

  # Programs of other sizes are forgotten, because the next one would else be
  # compiled for any size.
  torch._dynamo.reset()
  step = _captured(torch, torch.compile(step, dynamic=False), rewind)

  def decode() -> None:
    with torch.no_grad():
      for _ in range(tokens):
        step()

  return Call(
    start=decode,
    wait=lambda _: torch.cuda.synchronize(),
    inputs=rewind,
    count=tokens,
    columns=lambda _: {
      "peer_version": importlib.import_module("transformers").__version__,
      "peer_torch": torch.__version__,
    },
  )


def _model(config: TransformerConfig) -> Any:
  """The peer's model of these sizes on the device, weights as it draws them."""
  torch = importlib.import_module("torch")
  transformers = importlib.import_module("transformers")
  fields = hf_config.to_hf(config, "bfloat16")
  for name in ("architectures", "torch_dtype"):
    del fields[name]
  with torch.device("cuda"):
    model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**fields), dtype=torch.bfloat16
    )
  return model.eval()


def _filled(
  model: Any, config: TransformerConfig, batch: int, context: int, size: int
) -> Any:
  """A static cache of `size` slots, the first `context` of them random."""
  torch = importlib.import_module("torch")
  transformers = importlib.import_module("transformers")
  cache = transformers.StaticCache(config=model.config, max_cache_len=size)
  cache.early_initialization(
    batch_size=batch,
    num_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    dtype=torch.bfloat16,
    device=torch.device("cuda"),
  )
  for layer in cache.layers:
    for tensor in (layer.keys, layer.values):
      tensor[:, :, :context].normal_()
  return cache


def _captured(
  torch: Any, step: Callable[[], None], rewind: Callable[[], tuple]
) -> Callable[[], None]:
  """Captures one step in a CUDA graph; returns its replay.

  The replay reads weights where they lay, so it holds `step`: memory of weights
  that nothing holds is given to others.
  """
  aside = torch.cuda.Stream()
  with torch.no_grad():
    with torch.cuda.stream(aside):
      for _ in range(_WARM):
        rewind()
        step()
    torch.cuda.current_stream().wait_stream(aside)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      step()

  def replay(_held=step) -> None:
    graph.replay()

  return replay
