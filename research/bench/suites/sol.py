"""How fast the rollouts and updates of SOL run, against what the machine can.

Every operation has a floor: its phases run one after the other, and a phase
takes at least its floating-point operations over the matmul rate, and at least
its bytes over the copy bandwidth; both ceilings are measured in the same run.
A rollout is one phase a decode step, since a step cannot begin before the last
one ended. Source: the roofline model (Williams, Waterman and Patterson 2009).

The bandwidth is that of main memory: a model that stays in a processor's cache
can beat its floor. The matmul rate is that of the frozen model's dtype; the
policy is float32 whatever that is.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models import convert, transformer
from models.errors import InputError
from models.transformer_config import TransformerConfig
from research.bench import ceilings
from research.bench.suites.sol_work import Bench, Op
from research.bench.timing import seconds_of
from research.cost.roofline import Ceilings
from research.sol.learn import Method
from research.sol.options import Options

PRECISIONS = ("highest", "tensorfloat32", "default")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to time; sizes that are None are small on a CPU.

  Attributes:
    model: see `load`.
    preset: of the action table.
    dtype: of the frozen model.
    precision: of float32 matrix products.
    context: tokens before an episode; 64 or 512.
    horizon: T.
    windows: W; 1 or 8.
    group_size: rollouts of a window; 4 or 32.
    breakdown: scans that leave parts out, too; False or True.
    only: names of rows, or none for all.
    repeats: calls of a row at most.
  """

  model: str
  preset: str
  dtype: str
  precision: str
  context: int | None = None
  horizon: int = 16
  windows: int | None = None
  group_size: int | None = None
  breakdown: bool | None = None
  only: Sequence[str] = ()
  repeats: int = 20

  def filled(self) -> "Plan":
    """Chooses what is None for the device that computes."""
    small = {"context": 64, "windows": 1, "group_size": 4, "breakdown": False}
    large = {"context": 512, "windows": 8, "group_size": 32, "breakdown": True}
    fitting = small if jax.default_backend() == "cpu" else large
    given = {k: v for k, v in vars(self).items() if v is not None}
    return Plan(**(fitting | given))


def pair(
  dtypes: Sequence[str], precisions: Sequence[str]
) -> list[tuple[str, str]]:
  """Pairs a precision with each dtype; where one is single, it serves all.

  Raises:
    InputError: a name is unknown, or the lengths differ.
  """
  for name, values, valid in (
    ("dtype", dtypes, DTYPES),
    ("matmul_precision", precisions, PRECISIONS),
  ):
    for value in values or ("",):
      if value not in valid:
        raise InputError(f"{name}={value!r}: take from {', '.join(valid)}")
  most = max(len(dtypes), len(precisions))
  if {len(dtypes), len(precisions)} - {1, most}:
    raise InputError(
      f"{len(dtypes)} values of dtype do not pair with {len(precisions)} of "
      "matmul_precision: give one for all, or as many"
    )
  repeat = lambda values: [*values] * (most // len(values))
  return list(zip(repeat(dtypes), repeat(precisions)))


def load(
  source: str, dtype: str
) -> tuple[TransformerConfig, transformer.Params]:
  """Reads a model onto the device, or draws one.

  Args:
    source: of `convert.load`, or "random:NAME" for random weights of the shape
      `TransformerConfig.NAME()`.
    dtype: of the parameters.

  Raises:
    InputError: the source is unknown.
  """
  kind, _, name = source.partition(":")
  if kind != "random":
    checkpoint = convert.load(source, jnp.dtype(dtype))
    return checkpoint.config, jax.device_put(checkpoint.params)
  shapes = [
    key
    for key, value in vars(TransformerConfig).items()
    if isinstance(value, classmethod) and not key.startswith("_")
  ]
  if name not in shapes:
    raise InputError(
      f"there is no shape {name!r}; valid: random:{', random:'.join(shapes)}"
    )
  config = getattr(TransformerConfig, name)()
  cast = lambda x: x.astype(dtype)
  draw = jax.jit(lambda k: jax.tree.map(cast, transformer.init(config, k)))
  return config, draw(jax.random.key(0))


def run(
  plan: Plan, seconds: float, say: Callable[[str], None]
) -> tuple[list[dict], list[str]]:
  """Times one setting, and prints a table.

  Args:
    plan: what to time.
    seconds: after so many no further row begins.
    say: prints a line.

  Returns:
    One row an operation, and the names of those that were not timed.

  Raises:
    InputError: model, preset, sizes or rows do not exist or fit.
  """
  began = time.perf_counter()
  plan = plan.filled()
  with jax.default_matmul_precision(plan.precision):
    sizes = ("preset", "context", "horizon", "windows", "group_size")
    options = Options(**{name: getattr(plan, name) for name in sizes})
    options = options.filled("frugal")
    config, params = load(plan.model, plan.dtype)
    method = options.method(config, None)
    operations = _operations(plan, Bench(method, params, plan.windows))
    on_cpu = jax.default_backend() == "cpu"
    size, copied = (1024, 1 << 27) if on_cpu else (8192, 1 << 31)
    limits = ceilings.measure(plan.dtype, size, copied)
    setting = {
      "model": plan.model,
      "preset": plan.preset,
      "dtype": plan.dtype,
      "matmul_precision": plan.precision,
      "matmul_tflops": limits.flops / 1e12,
      "copy_gb_per_s": limits.bytes / 1e9,
    }
    say(" ".join(f"{k}={_short(v)}" for k, v in setting.items()))
    say(_line(dict.fromkeys(_COLUMNS)))
    rows, skipped = [], []
    # Half of the seconds are planned, because compilation takes about the other
    # half.
    share = seconds / len(operations) / 2
    for name, build in operations.items():
      if time.perf_counter() - began > seconds:
        skipped.append(name)
        continue
      timed = row(build(), limits, repeats=plan.repeats, seconds=share)
      rows.append(setting | timed)
      say(_line(timed))
  layer = microseconds_per_layer(rows, method)
  if layer is not None:
    say(f"one layer of one step: {layer:.1f} us")
  if skipped:
    say(f"out of time, not timed: {', '.join(skipped)}")
  return rows, skipped


def _operations(plan: Plan, bench: Bench) -> dict[str, Callable[[], Op]]:
  found = bench.operations()
  if plan.breakdown:
    found |= bench.breakdown()
  for name in plan.only:
    if name not in found:
      raise InputError(f"only={name}: take from {', '.join(found)}")
  return {k: v for k, v in found.items() if not plan.only or k in plan.only}


def _short(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


# Column to its format; the first number is its width.
_COLUMNS = {
  "op": "<26",
  "ms": ">10,.2f",
  "tokens_per_second": ">18,.0f",
  "floor_ms": ">10,.3f",
  "share": ">8.1%",
  "matmul_share": ">13.1%",
  "gflop": ">11,.2f",
  "compiles": ">9",
}


def _line(cells: dict[str, Any]) -> str:
  """One row of the table; a cell that is None is its column's name."""
  line = []
  for name, form in _COLUMNS.items():
    if cells[name] is None:
      form = form.split(".")[0].rstrip(",")
      line.append(f"{name:{form}}")
    else:
      line.append(f"{cells[name]:{form}}")
  return "".join(line).rstrip()


def row(op: Op, limits: Ceilings, *, repeats: int, seconds: float) -> dict:
  """Times `op`: one row of results."""
  measured = seconds_of(op.run, op.inputs, repeats=repeats, seconds=seconds)
  flops = sum(phase.flops for phase in op.phases)
  floor = limits.floor(op.phases)
  return {
    "op": op.name,
    "shape": op.shape,
    "pass": "fwd+bwd" if op.differentiates else "fwd",
    "implementation": "xla",
    "ms": 1e3 * measured,
    "tokens_per_second": op.tokens / measured,
    "floor_ms": 1e3 * floor,
    "share": floor / measured,
    "matmul_ms": 1e3 * flops / limits.flops,
    "matmul_share": flops / limits.flops / measured,
    "gflop": flops / 1e9,
    "compiles": op.run._cache_size(),
  }


def microseconds_per_layer(rows: list[dict], method: Method) -> float | None:
  """What one layer of one step costs, from the breakdown's rows, or None."""
  found = {row["op"]: row["ms"] for row in rows}
  both = found.get("scan/dense/headless")
  one = found.get("scan/dense/headless/one_layer")
  layers = method.setup.config.num_layers
  if both is None or one is None or layers < 2:
    return None
  return 1e3 * (both - one) / (layers - 1) / method.layout.horizon
