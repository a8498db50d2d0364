"""How a recurrent model keeps its state between tokens."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from models.errors import InputError
from ops.quantized import Format, QState, Taps, formats, state

FLOATS = ("float32", "bfloat16")
# The scales of a state are read and written with it, so they have two bytes.
# Rounding them changes a value by less than a tenth of a level of 8 bits.
_SCALES = "bfloat16"
# Each layer of each seed has a generator of its own, and no model has so many.
_LAYERS = 4096
_HELP = (
  "write float32, bfloat16 or a number format, such as int8, int8:32 or "
  "fp8_e4m3, and behind it by choice +static, +stochastic, +residual=FORMAT, "
  "+conv=FORMAT"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateFormat:
  """The format of the states of all Mamba layers; see `ops.quantized.QState`.

  Attributes:
    ssm: of the state of the scan, a number format or a name of `FLOATS`.
    conv: of the inputs that the convolution remembers; None for the dtype of
      the pass.
    static: whether the scales of `ssm` are those of the parameters' `Taps`.
    stochastic: whether `ssm` is rounded stochastically.
    residual: of what rounding `ssm` leaves, for error feedback; or None.
    seed: of stochastic rounding.
  """

  ssm: Format | str
  conv: Format | None = None
  static: bool = False
  stochastic: bool = False
  residual: Format | None = None
  seed: int = 0

  def __post_init__(self):
    """Checks what goes with what."""
    rounds = self.static or self.stochastic or self.residual
    if rounds and isinstance(self.ssm, str):
      raise InputError(
        f"state_format={self}: {self.ssm} has no levels to round to: name a "
        "number format, such as int8"
      )
    for form in (self.ssm, self.conv, self.residual):
      if isinstance(form, Format) and not form.is_signed:
        raise InputError(
          f"state_format={self}: {form} is for scales and has no negative "
          "level: name another, such as int8"
        )
      if isinstance(form, Format) and form.fitted:
        raise InputError(
          f"state_format={self}: {form} fits levels to each tensor, which a "
          "state that changes has no time for: name another, such as int8"
        )
    if self.stochastic and self.ssm.specials:
      raise InputError(
        f"state_format={self}: {self.ssm} has levels that each block chooses, "
        "and is not rounded stochastically: leave out +stochastic"
      )

  def __str__(self) -> str:
    """Returns what `parse` makes this of, but for the seed."""
    options = ["static"] * self.static + ["stochastic"] * self.stochastic
    options += [f"residual={self.residual}"] * bool(self.residual)
    options += [f"conv={self.conv}"] * bool(self.conv)
    return "+".join([str(self.ssm), *options])

  @classmethod
  def parse(cls, text: str) -> Self:
    """Reads "int8", "bfloat16+conv=int8", "int4:16+stochastic".

    Raises:
      InputError: it is not written so.
    """
    name, *options = text.split("+")
    found = {}
    try:
      for option in options:
        key, _, value = option.partition("=")
        if option in ("static", "stochastic"):
          found[key] = True
        elif key in ("conv", "residual") and value:
          found[key] = _get(value)
        else:
          raise ValueError(f"there is no {option!r}")
      ssm = name if name in FLOATS else _get(name)
    except ValueError as error:
      raise InputError(f"state_format={text}: {error}; {_HELP}") from None
    return cls(ssm=ssm, **found)

  def empty(
    self,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: jnp.dtype,
    taps: Taps,
    first: int,
  ) -> tuple[jax.Array | QState, jax.Array | QState]:
    """States of zeros of stacked layers: of the convolution and the scan.

    Args:
      shapes: (L, B, K-1, C) and (L, B, *S).
      dtype: of the pass.
      taps: of these layers.
      first: number of the first one, which draws apart from others.

    Raises:
      InputError: a format does not fit the shapes, or scales are missing.
    """
    scales = None
    if self.static:
      if taps.ssm_state is None or taps.ssm_state.scales is None:
        raise InputError(
          f"state_format={self}: the model has no scales for its state: leave "
          "out +static, or calibrate it"
        )
      scales = taps.ssm_state.scales
    conv, ssm = shapes
    try:
      return _kept(conv, dtype, self.conv), _kept(
        ssm,
        self.ssm if isinstance(self.ssm, str) else jnp.float32,
        None if isinstance(self.ssm, str) else self.ssm,
        scales=scales,
        residual=self.residual,
        seed=_LAYERS * self.seed + first if self.stochastic else None,
      )
    except ValueError as error:
      raise InputError(f"state_format={self}: {error}") from None


def _get(name: str) -> Format:
  """A format, by default with a scale a (head, channel), or one a tap."""
  return formats.get(name if ":" in name else f"{name}:row")


def own(
  shapes: tuple[tuple[int, ...], tuple[int, ...]],
  dtype: jnp.dtype,
  taps: Taps,
  first: int,
) -> tuple[jax.Array | QState, jax.Array | QState]:
  """The same as `StateFormat.empty`, in the formats that the taps name."""
  del first
  of = lambda tap: (None, None) if tap is None else (tap.format, tap.scales)
  conv, ssm = shapes
  (conv_format, conv_scales), (ssm_format, ssm_scales) = (
    of(tap) for tap in (taps.conv_state, taps.ssm_state)
  )
  return (
    _kept(conv, dtype, conv_format, scales=conv_scales),
    _kept(ssm, jnp.float32, ssm_format, scales=ssm_scales),
  )


def _kept(shape, dtype, form: Format | None, *, scales=None, **options):
  """A state of zeros, in a format or as an array of `dtype`."""
  if form is None:
    return jnp.zeros(shape, dtype)
  if scales is None:
    form = dataclasses.replace(form, scale_dtype=_SCALES)
  return state.zeros(shape, form, jnp.dtype(dtype), scales=scales, **options)
