"""What the flags of suites may say: names and shapes, told apart without JAX.

Scripts check them before they import what takes seconds.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from models.attamba_config import AttambaConfig
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.language_model.options import Options

DTYPES = ("bfloat16", "float32")
PASSES = ("fwd", "bwd", "fwd+bwd")
OPS = (
  "selective_scan",
  "ssd",
  "causal_conv1d",
  "rms_norm",
  "token_logprob",
  "quantized_matmul_bf16",
  "quantized_matmul_w8a16",
  "quantized_matmul_w4a16",
  "quantized_matmul_w8a8",
  "quantized_matmul_w4a8",
  "quantized_matmul_w4a8_columns",
  "quantized_matmul_nf4",
  "quantized_matmul_fp4_ea",
  "quantized_matmul_bitmod4",
  "quantized_matmul_mxfp4",
  "quantized_matmul_razer4",
  "butterfly_matmul",
  "butterfly_ffn",
  "monarch_matmul",
  "fourier_mix",
  "chunked_attention",
  "chunked_attention_step",
  "paged_sparse_attention",
  "selective_scan_step",
  "ssd_step",
  "causal_conv1d_step",
)
IMPLEMENTATIONS = (
  "xla",
  "xla_dense",
  "xla_merged",
  "xla_radix2",
  "xla_fft",
  "xla_dft",
  "mosaic_gpu",
  "mosaic_tpu",
)
OP_PEERS = (
  "plain",
  "mamba_ssm",
  "causal_attention",
  "sliding_window",
  "cudnn_attention",
  "xla_attention",
)
STEPS = ("xla", "mosaic_gpu", "mosaic_gpu_whole")
# Of products of float32.
PRECISIONS = ("highest", "tensorfloat32", "default")
LM_PEERS = ("mamba_ssm", "transformers")
# The types of `language_model.FAMILIES`, whose modules need JAX.
CONFIGS = (TransformerConfig, MambaConfig, AttambaConfig)
type Config = TransformerConfig | MambaConfig | AttambaConfig
# Tokens in the vocabulary of a model that is updated.
VOCAB = 32768
# Of a regression LM, which the peer fixes.
HEADS = 8

_SIZE = r"(?P<d_model>\d+)/(?P<encoder_layers>\d+)\+(?P<decoder_layers>\d+)"
_REGRESSION = {
  "train": rf"{_SIZE}:(?P<batch>\d+)x(?P<length>\d+):(?P<dtype>\w+)",
  "sample": (
    rf"{_SIZE}:(?P<texts>\d+)x(?P<length>\d+)x(?P<draws>\d+):(?P<dtype>\w+)"
  ),
}


def check_names(flag: str, values: Iterable[str], valid: Iterable[str]) -> None:
  """Raises InputError where one of `values` of --`flag` is not valid."""
  valid = list(valid)
  for value in values:
    if value not in valid:
      raise InputError(f"{flag}={value}: take from {', '.join(valid)}")


def decoded(spec: str) -> tuple[str, Config, int, int]:
  """The model, its config, batch and context of "MODEL:BATCH[xCONTEXT]".

  Args:
    spec: the context is of models whose state grows with it; else it is 0.

  Raises:
    InputError: it is not written so, or there is no such model.
  """
  name, _, shape = spec.partition(":")
  named = models()
  config = named[name]() if name in named else None
  numbers = shape.split("x")
  whole = all(number.isdigit() and int(number) > 0 for number in numbers)
  if not whole or config is None or len(numbers) != _numbers(config):
    raise InputError(
      f"decode={spec}: write MODEL:BATCH, such as mamba2_130m:1, or of a "
      "Transformer or an Attamba MODEL:BATCHxCONTEXT, such as "
      f"llama3_2_1b:1x512, with MODEL one of {', '.join(named)}"
    )
  batch, context = (*map(int, numbers), 0)[:2]
  return name, config, batch, context


def prompted(spec: str) -> tuple[str, Config, int, int]:
  """The model, its config, rows and tokens of "MODEL:BATCHxTOKENS".

  Raises:
    InputError: it is not written so, or there is no such model.
  """
  name, _, shape = spec.partition(":")
  named, numbers = models(), shape.split("x")
  whole = all(number.isdigit() and int(number) > 0 for number in numbers)
  if name not in named or not whole or len(numbers) != 2:
    raise InputError(
      f"prefill={spec}: write MODEL:BATCHxTOKENS, such as mamba2_130m:1x1024, "
      f"with MODEL one of {', '.join(named)}"
    )
  return name, named[name](), *map(int, numbers)


def _numbers(config: Config) -> int:
  """What keeps its context is asked for by batch and context, else by batch."""
  return 2 if config.keeps_context else 1


def models() -> Mapping[str, Callable[[], Config]]:
  """The published sizes, and tiny ones, by name."""
  found = {
    "tiny_mamba1": functools.partial(MambaConfig.tiny, "mamba1"),
    "tiny_mamba2": functools.partial(MambaConfig.tiny, "mamba2"),
    "tiny_transformer": TransformerConfig.tiny,
    "tiny_attamba": AttambaConfig.tiny,
  }
  for kind in CONFIGS:
    for name, value in vars(kind).items():
      if isinstance(value, classmethod) and name[0] != "_" and name != "tiny":
        found[name] = getattr(kind, name)
  return found


def trained(spec: str) -> Options:
  """The options of "ARCH/PRESET:BxL".

  Raises:
    InputError: it is not written so, or there is no such model.
  """
  model, _, shape = spec.partition(":")
  arch, _, preset = model.partition("/")
  batch, _, length = shape.partition("x")
  if not (batch.isdigit() and length.isdigit()):
    raise InputError(
      f"train={spec}: write ARCH/PRESET:BxL, such as mamba2/60m:64x1024"
    )
  return Options(
    arch=arch,
    preset=preset or None,
    batch=int(batch),
    length=int(length),
    vocab_size=VOCAB,
    document_mask=False,
  )


def regression(name: str, spec: str) -> dict[str, Any]:
  """The numbers of an update or of draws of a regression LM.

  Args:
    name: "train" or "sample".
    spec: see `suites.regression_lm.Suite`.

  Raises:
    InputError: it is not written so.
  """
  found = re.fullmatch(_REGRESSION[name], spec)
  work = found and {
    key: value if key == "dtype" else int(value)
    for key, value in found.groupdict().items()
  }
  if (
    not work
    or 0 in work.values()
    or work["dtype"] not in DTYPES
    or work["d_model"] % (2 * HEADS)
  ):
    shape = "BATCHxLENGTH" if name == "train" else "TEXTSxLENGTHxDRAWS"
    raise InputError(
      f"{name}={spec}: write WIDTH/ENCODER+DECODER:{shape}:DTYPE, such as "
      f"512/2+2:{'64x2048' if name == 'train' else '512x2048x64'}:bfloat16, "
      f"with WIDTH a multiple of {2 * HEADS}"
    )
  return work


def pair(
  dtype: Sequence[str], precisions: Sequence[str]
) -> list[tuple[str, str]]:
  """Pairs a precision with each dtype; where one is single, it serves all.

  Raises:
    InputError: a name is unknown, or the lengths differ.
  """
  for name, values, valid in (
    ("dtype", dtype, DTYPES),
    ("matmul_precision", precisions, PRECISIONS),
  ):
    check_names(name, values or ("",), valid)
  most = max(len(dtype), len(precisions))
  if {len(dtype), len(precisions)} - {1, most}:
    raise InputError(
      f"{len(dtype)} values of dtype do not pair with {len(precisions)} of "
      "matmul_precision: give one for all, or as many"
    )
  repeat = lambda values: [*values] * (most // len(values))
  return list(zip(repeat(dtype), repeat(precisions)))


def check(suite: str, options: Mapping[str, Any]) -> None:
  """Checks options of a suite and of its plan, as far as it goes without JAX.

  Raises:
    InputError: a name does not exist, or a shape is not written so.
  """
  _CHECKS.get(suite, lambda **options: None)(**options)


def check_ops(
  *, ops=(), shapes=(), dtype=(), implementations=(), passes=(), peers=(), **_
) -> None:
  """Checks names of the suite of ops; raises InputError."""
  alone = [shape.split("=")[0] for shape in shapes if "=" in shape]
  check_names("ops", ops, OPS)
  check_names("shapes", alone, OPS)
  check_names("dtype", dtype, DTYPES)
  check_names("passes", passes, PASSES)
  check_names("implementations", implementations, IMPLEMENTATIONS)
  check_names("peers", peers, OP_PEERS)


def check_language_model(
  *, decode=(), prefill=(), train=(), steps=(), peers=(), **_
) -> None:
  """Checks names and shapes of that suite; raises InputError."""
  check_names("steps", steps, STEPS)
  check_names("peers", peers, LM_PEERS)
  for spec in decode:
    decoded(spec)
  for spec in prefill:
    prompted(spec)
  for spec in train:
    trained(spec)


def _check_regression_lm(*, train=(), sample=(), **_) -> None:
  for name, specs in (("train", train), ("sample", sample)):
    for spec in specs:
      regression(name, spec)


def _check_sol(
  *, dtype=("float32",), matmul_precision=("highest",), **_
) -> None:
  pair(dtype, matmul_precision)


_CHECKS = {
  "ops": check_ops,
  "language_model": check_language_model,
  "regression_lm": _check_regression_lm,
  "sol": _check_sol,
}
