"""Trains a compute policy (SOL) on a frozen language model.

  python experiments/train_sol.py \
    --flagfile=experiments/flagfiles/sol_smollm2_cpu.flags

Writes the run to --workdir: flags, metrics, checkpoints, and the trained
policy in `policy/`, which `eval_sol.py` reads. The same command goes on where
a killed run was. Flags that are not given take their value from --mode. Eight
minutes on two CPU cores; seven on an H200 for sol_smollm2_h200.flags.
"""

import pathlib
import time

from absl import flags

import cli
import mesh_flags
import option_flags
from research.sol.options import MODES, Options, texts_of_files

flags.adopt_module_key_flags(mesh_flags)
_MODEL = flags.DEFINE_string(
  "model",
  "smollm2",
  "frozen model: tiny, smollm2, a directory, a .gguf file or a hub id",
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/sol", "folder of the run")
_SHARED = flags.DEFINE_string(
  "shared",
  None,
  "folder where runs that differ in the policy alone keep schedules, damages "
  "and the regression",
)
_TEXT = flags.DEFINE_list(
  "text",
  ["wikitext2:train", "gutenberg:slice"],
  "training texts: shipped names, files, or samples:SEED:N for N tokens "
  "that the model samples itself",
)
_MODE = cli.choice(
  "mode", "frugal", "where options that are not given come from", MODES
)
_SEED = cli.integer("seed", 0, "of everything", 0, 2**31 - 1)
_NUM_SEEDS = cli.integer(
  "num_seeds",
  1,
  "train policies of so many seeds, the others in seed1/, seed2/, ...",
  1,
  100,
)
_DTYPE = cli.choice(
  "dtype", "float32", "of the frozen model", ("float32", "bfloat16")
)
_ATTENTION = cli.choice(
  "attention", None, "implementation of dense attention", ("xla", "cudnn")
)
_PRECISION = cli.choice(
  "matmul_precision",
  "highest",
  "of float32 matrix products",
  ("highest", "tensorfloat32", "default"),
)
_DAMAGE = cli.integer(
  "damage_windows", 128, "windows on which the damage of levels is measured", 1
)
_CALIBRATION = cli.integer(
  "calibration_windows", 64, "windows of the calibration curve", 1
)
_RIDGE = cli.integer(
  "ridge_windows",
  256,
  "windows of the counterfactual regression, with --reward=label",
  1,
)
_CHECKPOINT = cli.integer("checkpoint_every", 100, "updates", 1)
_LOG = cli.integer("log_every", 1, "updates between lines of metrics", 1)


_OPTIONS = option_flags.define(Options)


def main(_) -> None:
  """Trains; see the module's docstring."""
  began = time.perf_counter()
  mesh_flags.check(multihost=True)
  given = {name: flag.value for name, flag in _OPTIONS.items()}
  cli.check_there([_MODEL.value], texts_of_files(_TEXT.value))
  options = Options(**given).filled(_MODE.value)

  import jax  # after the flags were checked: a mistake is answered at once
  import jax.numpy as jnp

  from models import convert
  from research.sol import corpus, training

  jax.config.update("jax_default_matmul_precision", _PRECISION.value)
  mesh_flags.start()
  cli.say(f"reading {_MODEL.value}")
  checkpoint = convert.load(_MODEL.value, jnp.dtype(_DTYPE.value))
  options = corpus.with_begin(options, checkpoint)
  options.method(checkpoint.config, _ATTENTION.value)  # or one line, at once
  workdir = pathlib.Path(_WORKDIR.value)
  tokens = corpus.load_tokens(_TEXT.value, checkpoint, folder=workdir)
  cli.say(f"{len(tokens):,} tokens of training text")
  run = training.Run(
    options=options,
    mode=_MODE.value,
    checkpoint=checkpoint,
    workdir=workdir,
    flags=vars(options)
    | {
      "model": _MODEL.value,
      "text": _TEXT.value,
      "seed": _SEED.value,
      "dtype": _DTYPE.value,
      "matmul_precision": _PRECISION.value,
      "damage_windows": _DAMAGE.value,
      "calibration_windows": _CALIBRATION.value,
      "ridge_windows": _RIDGE.value,
    },
    shared=pathlib.Path(_SHARED.value) if _SHARED.value else None,
    seed=_SEED.value,
    mesh=mesh_flags.mesh(),
    attention=_ATTENTION.value,
    damage_windows=_DAMAGE.value,
    calibration_windows=_CALIBRATION.value,
    ridge_windows=_RIDGE.value,
    checkpoint_every=_CHECKPOINT.value,
    log_every=_LOG.value,
  )
  for seed in range(_SEED.value, _SEED.value + _NUM_SEEDS.value):
    own = run if seed == run.seed else run.of_seed(seed)
    training.train(own, tokens, cli.say)
    seconds = time.perf_counter() - began
    print(f"policy: {own.workdir / 'policy'} ({seconds:.0f} s)")


if __name__ == "__main__":
  cli.run(main)
