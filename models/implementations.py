"""Which implementation of each op a pass takes."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementations:
  """A name of each op's implementation; None is the best that runs.

  Attributes:
    scan: of `ops.selective_scan`, `ops.ssd` and their steps.
    conv: of `ops.causal_conv1d` and its step.
    norm: of `ops.rms_norm` in Mamba, where tokens are many.
    step: of `ops.mamba2_step`, one token through all Mamba-2 layers of a run;
      "xla" for the steps of `scan` and `conv`, layer by layer. And of
      `ops.transformer_step`, the next tokens through all layers; and of
      `ops.chunked_attention_step`, where it is named and not "xla".
    attention: of `jax.nn.dot_product_attention`, in a pass that reads no cache:
      "xla" or "cudnn".
    chunked: of `ops.chunked_attention`, likewise.
    head: of `ops.quantized_matmul`, where a step of Mamba scores tokens by a
      table in a number format.
  """

  scan: str | None = None
  conv: str | None = None
  norm: str | None = None
  step: str | None = None
  attention: str | None = None
  chunked: str | None = None
  head: str | None = None
