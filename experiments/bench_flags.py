"""Flags of the suites of `bench.py`, each of one suite or of two.

Their names are the options of the suites in `research/bench/suites/`, but for
--peers and --passes, which are the plan's.
"""

from typing import Any

from absl import flags

import cli
from models.errors import InputError

# The suites that a flag belongs to.
_OF_SUITES: dict[str, tuple[str, ...]] = {}


def _of(*suites: str) -> Any:
  """Defines flags of some suites; in their help the suites stand first."""

  def define(kind: Any, name: str, default: Any, text: str, *bounds: Any):
    _OF_SUITES[name] = suites
    kind(name, default, f"{', '.join(suites)}: {text}", *bounds)

  return define


_LIST, _TEXT, _BOOL = flags.DEFINE_list, flags.DEFINE_string, flags.DEFINE_bool

_both = _of("ops", "language_model")
_both(_LIST, "peers", [], "plain, mamba_ssm, ...; an unknown one lists all")
_both = _of("ops", "sol")
_both(_LIST, "dtype", None, "bfloat16 or float32, of activations or weights")
_both = _of("language_model", "regression_lm")
_both(
  _LIST,
  "train",
  [],
  "updates, ARCH/PRESET:BxL such as mamba2/60m:64x1024, of regression LMs such "
  "as 512/2+2:64x2048:bfloat16",
)

_ops = _of("ops")
_ops(_LIST, "ops", [], "those to time; none for all")
_ops(
  _LIST,
  "shapes",
  ["tiny:2x64"],
  "SIZE:BxL each: tiny, 130m, 370m, 1.3b or 2.8b, batch and tokens; "
  "OP=SIZE:BxL for one op alone",
)
_ops(_LIST, "passes", ["fwd", "bwd"], "fwd, bwd alone, fwd+bwd at once")
_ops(_LIST, "implementations", [], "names; none for all that run here")

_lm = _of("language_model")
_lm(
  _LIST,
  "decode",
  [],
  "MODEL:BATCH each, such as mamba2_130m:1, or MODEL:BATCHxCONTEXT of a "
  "Transformer, such as llama3_2_1b:1x512",
)
_lm(_LIST, "steps", ["xla", "mosaic_gpu"], "implementations of a decoding step")
_lm(cli.integer, "tokens", 64, "decoded in a call", 1, 4096)
_lm(_LIST, "prefill", [], "MODEL:BATCHxTOKENS each, such as mamba2_130m:1x1024")
_lm(_LIST, "state_format", ["float32"], "of Mamba's state, such as int8")
_lm(
  _LIST,
  "weights_format",
  ["bfloat16"],
  "of weights in decoding and prefill, and of what they multiply: int8, "
  "int4:128/int8; one for each of --state_format, or one for all",
)
_lm(cli.numbers, "keep_pages", [1.0], "of a cache; 1: no pages", 1e-6, 1)
_lm(cli.integer, "unroll", 1, "layers in a scan's iteration; 0 for all", 0)
_lm(_BOOL, "remat", False, "compute every layer again in the backward pass")

_rlm = _of("regression_lm")
_rlm(_LIST, "sample", [], "draws, such as 512/2+2:512x2048x64:bfloat16")
_rlm(
  _TEXT,
  "peer",
  None,
  "checkout of google-deepmind/regress-lm, timed first in a process of its own",
)
_rlm(_TEXT, "peer_python", None, "interpreter with torch; this one if none")
_rlm(cli.integer, "peer_texts", 16, "in its calls; times are scaled up", 1)
_rlm(
  _LIST,
  "peer_settings",
  ["float32", "tf32", "bfloat16"],
  "as it is released, with TensorFloat-32, and under autocast",
)
_rlm(_BOOL, "peer_compile", True, "let the peer compile its updates")

_sol = _of("sol")
_sol(
  _TEXT,
  "model",
  "tiny",
  "the frozen one: tiny, smollm2, a directory, a .gguf file, a hub id, or "
  "random:NAME for random weights of a shape, such as random:smollm2_135m",
)
_sol(_LIST, "preset", ["J-FL"], "action tables")
_sol(
  _LIST,
  "matmul_precision",
  ["highest"],
  "of float32 matrix products, one for each dtype or one for all: highest, "
  "tensorfloat32 or default",
)
_sol(
  cli.integer,
  "context",
  None,
  "tokens before an episode; 64 on a CPU, else 512",
  16,
)
_sol(cli.integer, "horizon", 16, "steps of an episode", 1, 1024)
_sol(cli.integer, "windows", None, "1 on a CPU, else 8", 1, 4096)
_sol(
  cli.integer,
  "group_size",
  None,
  "rollouts of an episode; 4 on a CPU, else 32",
  2,
  1024,
)
_sol(_BOOL, "breakdown", None, "scans without parts; not on a CPU if not given")
_sol(_LIST, "only", [], "rows to time, such as block; or all")


def values(suite: str) -> dict[str, Any]:
  """The values of a suite's flags, but for those that are None.

  Raises:
    InputError: a flag of another suite is given.
  """
  found = {}
  for name, suites in _OF_SUITES.items():
    flag = flags.FLAGS[name]
    if suite in suites and flag.value is not None:
      found[name] = flag.value
    if suite not in suites and flag.present:
      raise InputError(
        f"--{name}: is of --suite={' and '.join(suites)}, not of {suite}: "
        "leave it out"
      )
  return found
