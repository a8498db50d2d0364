"""Times google-deepmind/regress-lm, the PyTorch peer of regression LMs.

Runs as a process of its own, so that both sides have the device's memory:

  python -m research.bench.peers.regress_lm CHECKOUT '{"train": [...], ...}'

prints a JSON object a line. It imports torch and the checkout, and not jax.

What is timed is what its users call: an update is that of its `Trainer`
(compiled, as it is by default; the mean loss, backward, Muon beside AdamW), a
draw is `decode` of its model. Settings: "float32", as it is released; "tf32",
with TensorFloat-32 products; "bfloat16", under autocast.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

SETTINGS = ("float32", "tf32", "bfloat16")
Row = dict[str, Any]


def main() -> None:
  """Prints a row for every entry of the plan."""
  checkout, plan = sys.argv[1], json.loads(sys.argv[2])
  sys.path.insert(0, checkout)
  for work in plan["train"]:
    print(json.dumps(_update(work, plan)), flush=True)
  for work in plan["sample"]:
    print(json.dumps(_draws(work, plan)), flush=True)


def _model(work: Row, plan: Row) -> Any:
  from regress_lm import rlm, vocabs

  class Numbered(vocabs.EncoderVocab):
    """Texts are token ids with spaces between."""

    pad_id = 0

    def to_token_ids(self, text):
      return [int(word) for word in text.split()]

    def __len__(self):
      return plan["vocab_size"]

  return rlm.RegressLM.from_scratch(
    d_model=work["d_model"],
    num_encoder_layers=work["encoder_layers"],
    num_decoder_layers=work["decoder_layers"],
    max_input_len=work["length"],
    encoder_vocab=Numbered(),
  ).model


@contextlib.contextmanager
def _precision(setting: str) -> Iterator[None]:
  """TensorFloat-32 and autocast, by the setting."""
  import torch

  high = "highest" if setting == "float32" else "high"
  torch.set_float32_matmul_precision(high)
  kind = "cuda" if torch.cuda.is_available() else "cpu"
  with torch.autocast(kind, torch.bfloat16, enabled=setting == "bfloat16"):
    yield


def _inputs(model: Any, work: Row, plan: Row, texts: int) -> Row:
  import torch

  shape = texts, work["length"]
  tokens = torch.randint(1, plan["vocab_size"], shape)
  lengths = torch.full(shape[:1], work["length"])
  return {"encoder_input": tokens, "input_token_lens": lengths}


def _wait() -> None:
  import torch

  if torch.cuda.is_available():
    torch.cuda.synchronize()


def _median(call: Any, repeats: int) -> float:
  """Median seconds of a call, what it started included."""
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    call()
    _wait()
    times.append(time.perf_counter() - began)
  return statistics.median(times)


def _update(work: Row, plan: Row) -> Row:
  import torch

  reason = None
  if plan["compile"]:
    try:
      return _timed_update(work, plan, True)
    except Exception as error:  # Of the compiler: whatever it lacks here.
      reason = " ".join(str(error).split())[:200]
      torch._dynamo.reset()
  return _timed_update(work, plan, False) | {"not_compiled": reason}


def _timed_update(work: Row, plan: Row, compiled: bool) -> Row:
  import torch
  from regress_lm.pytorch import optimizers, training

  model = _model(work, plan)
  targets = [[0.1 + 0.01 * i] for i in range(work["batch"])]
  vocab = model.cfg.decoder_vocab
  ids = torch.tensor([vocab.to_token_ids(y) for y in targets])
  pad = torch.full((work["batch"], 1), vocab.bos_pad_id)
  batch = _inputs(model, work, plan, work["batch"]) | {
    "decoder_input": torch.cat([pad, ids], 1),
    "decoder_target": torch.cat([ids, pad], 1),
  }
  if torch.cuda.is_available():
    batch = {name: x.pin_memory() for name, x in batch.items()}
  trainer = training.Trainer(
    model,
    optimizers.muon_adamw,
    lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    [0],
    1,
    compile_model=compiled,
  )

  def update():
    # The step is that of `Trainer.run_train_step`, with autocast around the
    # forward pass alone.
    trainer.training_wrapper.train()
    with _precision(work["setting"]):
      losses, _ = trainer.training_wrapper.forward(batch)
    losses.mean().backward()
    trainer.optimizer.step()
    trainer.scheduler.step()
    trainer.optimizer.zero_grad(set_to_none=True)

  began = time.perf_counter()
  update()
  _wait()
  warm = time.perf_counter() - began
  for _ in range(2):
    update()
  _wait()

  def several():
    for _ in range(4):
      update()

  seconds = _median(several, plan["repeats"]) / 4
  return {
    **work,
    "work": "update",
    "seconds": seconds,
    "compiled": compiled,
    "first_seconds": warm,
    "params": sum(p.numel() for p in model.parameters()),
    "peak_bytes": _peak(),
    "torch": torch.__version__,
  }


def _draws(work: Row, plan: Row) -> Row:
  import torch

  model = _model(work, plan)
  if torch.cuda.is_available():
    model = model.cuda()
  model.eval()
  a_call = min(plan["peer_texts"], work["texts"])
  inputs = _inputs(model, work, plan, a_call)

  def draw():
    with _precision(work["setting"]):
      model.decode(inputs, work["draws"])

  draw()
  _wait()
  seconds = _median(draw, plan["repeats"])
  return {
    **work,
    "work": "draws",
    "seconds": seconds * work["texts"] / a_call,
    "timed_texts": a_call,
    "params": sum(p.numel() for p in model.parameters()),
    "peak_bytes": _peak(),
    "torch": torch.__version__,
  }


def _peak() -> int | None:
  import torch

  if not torch.cuda.is_available():
    return None
  peak = torch.cuda.max_memory_allocated()
  torch.cuda.empty_cache()
  torch.cuda.reset_peak_memory_stats()
  return peak


if __name__ == "__main__":
  main()
