"""The suite of SOL: rollouts and updates, against what the machine can.

Every operation has a floor: its phases run one after the other, and a phase
takes at least its floating-point operations over the matmul rate, and at least
its bytes over the bandwidth of memory; both are measured in the same run.
A rollout is one phase a decode step, since a step cannot begin before the last
one ended. Source: the roofline model (Williams, Waterman and Patterson 2009).

The bandwidth is that of main memory: a model that stays in a processor's cache
can beat its floor. The matmul rate is that of the frozen model's dtype; the
policy is float32 whatever that is.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from models import convert, transformer
from models.errors import InputError
from models.transformer_config import TransformerConfig
from research.bench import ceilings, specs
from research.bench.case import Case, Row, Say, SuiteOfCases
from research.bench.plan import Plan
from research.bench.suites.sol_work import Bench
from research.sol.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(SuiteOfCases):
  """Which model and method; sizes that are None are small on a CPU.

  Attributes:
    model: see `load`.
    preset: of action tables.
    dtype: of the frozen model.
    matmul_precision: of float32 matrix products, see `specs.pair`.
    context: tokens before an episode; 64 or 512.
    horizon: T.
    windows: W; 1 or 8.
    group_size: rollouts of a window; 4 or 32.
    breakdown: scans that leave parts out, too; False or True.
    only: names of rows, or none for all.
    seconds: of each setting; after so many no further row begins.
  """

  model: str = "tiny"
  preset: Sequence[str] = ("J-FL",)
  dtype: Sequence[str] = ("float32",)
  matmul_precision: Sequence[str] = ("highest",)
  context: int | None = None
  horizon: int = 16
  windows: int | None = None
  group_size: int | None = None
  breakdown: bool | None = None
  only: Sequence[str] = ()
  seconds: float = 300.0

  def cases(self, plan: Plan, note: Say) -> Iterator[Case]:
    """Yields a case an operation of each setting.

    Raises:
      InputError: model, preset, sizes or rows do not exist or fit.
    """
    del plan
    pairs = specs.pair(self.dtype, self.matmul_precision)
    return (
      case
      for preset in self.preset
      for dtype, precision in pairs
      for case in self._setting(preset, dtype, precision, note)
    )

  def _setting(
    self, preset: str, dtype: str, precision: str, note: Say
  ) -> Iterator[Case]:
    began = time.perf_counter()
    with jax.default_matmul_precision(precision):
      # To measure takes seconds, so names are checked before.
      operations = self._operations(preset, dtype)
      limits = ceilings.measure(dtype)
    setting = {
      "preset": preset,
      "matmul_precision": precision,
    }
    for name, build in operations.items():
      if time.perf_counter() - began > self.seconds:
        note(f"{name} of {preset}, {dtype}, is left out: out of time")
        continue
      case = build()
      yield dataclasses.replace(
        case,
        model=self.model,
        columns=case.columns | setting,
        precision=precision,
        ceilings=limits,
        # Half of the seconds are planned, because compilation takes about the
        # other half.
        seconds=self.seconds / len(operations) / 2,
      )

  def _operations(
    self, preset: str, dtype: str
  ) -> dict[str, Callable[[], Case]]:
    on_cpu = jax.default_backend() == "cpu"
    fill = lambda given, small, large: (
      given if given is not None else small if on_cpu else large
    )
    windows = fill(self.windows, 1, 8)
    options = Options(
      preset=preset,
      context=fill(self.context, 64, 512),
      horizon=self.horizon,
      windows=windows,
      group_size=fill(self.group_size, 4, 32),
    ).filled("frugal")
    config, params = load(self.model, dtype)
    bench = Bench(options.method(config, None), params, windows)
    found = bench.operations()
    if fill(self.breakdown, False, True):
      found |= bench.breakdown()
    specs.check_names("only", self.only, found)
    return {k: v for k, v in found.items() if k in (self.only or found)}

  def closing(self, rows: Sequence[Row]) -> Iterator[str]:
    """Lines for the end: what one layer of one step costs, by a breakdown."""
    for preset in self.preset:
      found = {row["op"]: row for row in rows if row["preset"] == preset}
      both = found.get("scan/dense/headless")
      one = found.get("scan/dense/headless/one_layer")
      layers = both and both["model_layers"]
      if both and one and layers > 1:
        layer = (both["ms"] - one["ms"]) / (layers - 1) / self.horizon
        yield f"one layer of one step, {preset}: {1e3 * layer:.1f} us"


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
