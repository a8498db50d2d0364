"""Trains a language model on a text: Transformer, Mamba-1, Mamba-2, hybrid.

  python experiments/train_lm.py \
    --flagfile=experiments/flagfiles/mamba2_tiny.flags

Two minutes on two CPU cores, and the held-out loss is below the unigram entropy
of the text. Writes the run to --workdir: flags, metrics, checkpoints, curves,
`report.md`, `result.json` with device and commit, and the model with its
tokenizer in `model/`. The same command goes on where a killed run was; --start
fine-tunes a model, or goes on from another run.
`plot_lm.py` draws several runs.
"""

import pathlib
import time

from absl import flags

import cli
import mesh_flags
import option_flags
from research.language_model.options import Options

flags.adopt_module_key_flags(mesh_flags)
_WORKDIR = flags.DEFINE_string("workdir", "runs/lm", "folder of the run")
_TEXT = flags.DEFINE_list(
  "text",
  ["gutenberg:slice"],
  "training texts: shipped names, or .txt, .md, .jsonl (also .xz, .gz) and "
  ".parquet files",
)
_EVAL_TEXT = flags.DEFINE_list(
  "eval_text", [], "held-out texts; the end of --text if not given"
)
_START = flags.DEFINE_string(
  "start",
  None,
  "a model to fine-tune (its folder, .gguf file or hub id), or the --workdir "
  "of another run to go on from, with more --steps or another --learning_rate",
)
_CACHE = flags.DEFINE_string(
  "cache", "runs/tokens", "folder of tokens, made once for all runs"
)
_ATTENTION = cli.choice(
  "attention", None, "implementation of attention", ("xla", "cudnn")
)
_CHUNKED = cli.choice(
  "chunked_attention",
  None,
  "implementation of attention to chunks",
  ("xla", "mosaic_gpu"),
)
_KERNELS = ("xla", "mosaic_gpu", "mosaic_tpu")
_SCAN = cli.choice(
  "scan", None, "implementation of selective_scan or ssd", _KERNELS
)
_CONV = cli.choice("conv", None, "implementation of causal_conv1d", _KERNELS)
_PRECISION = cli.choice(
  "matmul_precision",
  "default",
  "of float32 matrix products",
  ("highest", "tensorfloat32", "default"),
)
_PEAK = cli.number(
  "peak_tflops",
  None,
  "of a device, for the MFU; that of its data sheet if not given",
  1e-3,
  1e6,
)
_CHECKPOINT = cli.integer("checkpoint_every", 500, "updates", 1)
_UNROLL = cli.integer(
  "unroll",
  1,
  "layers laid out flat in one iteration of the scan over them, 0 for all: "
  "faster on a GPU, longer to compile",
  0,
)
_LOG = cli.integer("log_every", 10, "updates between lines of metrics", 1)
_OPTIONS = option_flags.define(Options)


def _is_run(start: str) -> bool:
  """Whether a path is of a run's workdir or a state of it, and of no model."""
  path = pathlib.Path(start).expanduser()
  return "checkpoints" == path.parent.name or (path / "checkpoints").is_dir()


def main(_) -> None:
  """Trains; see the module's docstring."""
  began = time.perf_counter()
  mesh_flags.check(multihost=True)
  options = Options(**{name: flag.value for name, flag in _OPTIONS.items()})
  models = [] if _START.value and _is_run(_START.value) else [_START.value]
  cli.check_there(
    models,
    texts=[*_TEXT.value, *_EVAL_TEXT.value],
    field=options.text_field,
  )

  import jax  # after the flags were checked: a mistake is answered at once

  from models.implementations import Implementations
  from research.core import processes
  from research.language_model import training

  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  mesh_flags.start()
  run = training.Run(
    options=options,
    text=_TEXT.value,
    eval_text=_EVAL_TEXT.value,
    workdir=pathlib.Path(_WORKDIR.value),
    cache=pathlib.Path(_CACHE.value),
    start=_START.value,
    mesh=mesh_flags.mesh(),
    implementations=Implementations(
      scan=_SCAN.value,
      conv=_CONV.value,
      attention=_ATTENTION.value,
      chunked=_CHUNKED.value,
    ),
    unroll=_UNROLL.value,
    peak_flops=_PEAK.value and 1e12 * _PEAK.value,
    checkpoint_every=_CHECKPOINT.value,
    log_every=_LOG.value,
  )
  result = training.train(run, cli.say)
  if not processes.is_writer():
    return
  for line in result.lines():
    print(line)
  seconds = time.perf_counter() - began
  row = {"metric": "eval_loss", "value": result.eval_loss}
  cli.write_result(run.workdir / "result.json", [row], cli.command(), seconds)
  print(f"model: {run.workdir / 'model'} ({seconds:.0f} s)")


if __name__ == "__main__":
  cli.run(main)
