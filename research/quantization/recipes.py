"""Recipes: what becomes of each part of a model, by name.

A module of options: it imports no methods, so that scripts know the names at
once.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence

from models.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How a model is quantized. Formats are those of `ops.quantized.FORMATS`.

  Attributes:
    method: whose idea it is, for pictures.
    text: what it is, for tables.
    kernels: format of the kernels of layers; None leaves them.
    small_kernels: of those of Mamba-1 that make its step sizes, B and C, which
      are few.
    head: of the head's kernel, where it has its own.
    table: of the token table, which is the head of models that share it.
    gptq: whether kernels are rounded by GPTQ, else to the nearest levels.
    inputs: format of what kernels multiply, with scales fixed by calibration;
      None leaves it in floats.
    dynamic: whether the scales of `inputs` are each token's own instead.
    cache: format of the keys and values of attention, of each token and head;
      None leaves them in floats.
    smooth_keys: whether channels of keys are made alike large before, and those
      of queries take the factors (P3-LLM, https://arxiv.org/abs/2511.06838).
    clipped: whether each block of a kernel has the scale, among some that clip
      its largest values, that leaves the least squared error.
    rotation: of the residual stream: "hadamard", or "klt", which is the
      eigenvectors of what the layers read, and a Hadamard matrix behind them.
    rotates_outputs: whether what kernels that write to the stream multiply is
      rotated while the model runs.
    smoothing: share of outliers that goes into the weights, as SmoothQuant's
      alpha; of rotated streams only that of outputs.
    taps: format of what a state space is given: inputs of its convolution, x,
      B, C, step sizes, the gate; None leaves all in floats.
    clip: percentile of x, the input of the state space, that has a level.
    clusters: of heads in a state group, and of channels in each of those, for
      scales of x after sorting; B and C then have a scale a state group, step
      sizes one a head. None for one scale a place.
    states: format of recurrent states, with a scale a channel.
    float_share: of the layers, whose activations stay in floats; a search by
      evolution finds which.
  """

  method: str
  text: str
  kernels: str | None = None
  small_kernels: str | None = None
  head: str | None = None
  table: str | None = None
  gptq: bool = False
  inputs: str | None = None
  dynamic: bool = False
  cache: str | None = None
  smooth_keys: bool = False
  clipped: bool = False
  rotation: str | None = None
  rotates_outputs: bool = False
  smoothing: float | None = None
  taps: str | None = None
  clip: float = 100.0
  clusters: tuple[int, int] | None = None
  states: str | None = None
  float_share: float = 0.0

  @property
  def is_static(self) -> bool:
    """Whether it needs calibration."""
    return bool(
      self.gptq
      or (self.inputs and not self.dynamic)
      or self.smooth_keys
      or self.taps
      or self.states
      or self.smoothing
      or self.rotation == "klt"
    )


_INT8 = {"inputs": "int8:tensor", "taps": "int8", "states": "int8"}
_W4 = {"kernels": "int4", "small_kernels": "int8", "table": "int8"}
_W8 = {"kernels": "int8", "small_kernels": "int8", "table": "int8"}
_NAIVE = {
  "kernels": "int8:tensor",
  "small_kernels": "int8:tensor",
  "table": "int8",
  "head": "int8:tensor",
  **_INT8,
}
_A8 = {**_W8, "head": "int8", **_INT8}
_ROTATED = {"rotation": "hadamard", "rotates_outputs": True}
_SORTED = {"clusters": (4, 4)}

RECIPES: Mapping[str, Recipe] = types.MappingProxyType(
  {
    "rtn_w8a16": Recipe(
      method="nearest",
      text="8-bit weights, nearest, a scale a column",
      **_W8,
      head="int8",
    ),
    "rtn_w4a16": Recipe(
      method="nearest",
      text="4-bit weights, nearest, groups of 128",
      **_W4,
      head="int4",
    ),
    "gptq_w4a16": Recipe(
      method="GPTQ", text="4-bit weights by GPTQ", **_W4, head="int4", gptq=True
    ),
    "gptq_w4a16_s8": Recipe(
      method="GPTQ",
      text="4-bit weights by GPTQ, 8-bit states",
      **_W4,
      head="int4",
      gptq=True,
      states="int8",
    ),
    "w4a16_head8": Recipe(
      method="Quamba2",
      text="4-bit weights by GPTQ, Hadamard rotations, the head in 8 bits",
      **_W4,
      head="int8",
      gptq=True,
      **_ROTATED,
    ),
    "w4a16": Recipe(
      method="Quamba2",
      text="4-bit weights by GPTQ, Hadamard rotations",
      **_W4,
      head="int4",
      gptq=True,
      **_ROTATED,
    ),
    "w4a16_s8": Recipe(
      method="Quamba2",
      text="4-bit weights by GPTQ, Hadamard rotations, 8-bit states",
      **_W4,
      head="int4",
      gptq=True,
      **_ROTATED,
      states="int8",
    ),
    "w8a8_naive": Recipe(
      method="naive", text="8 bits, one scale a tensor", **_NAIVE
    ),
    "w8a8_columns": Recipe(
      method="naive", text="8 bits, weights with a scale a column", **_A8
    ),
    "w8a8_sorted": Recipe(
      method="Quamba2",
      text="8 bits, sorted and clustered, no rotations",
      **_A8,
      **_SORTED,
    ),
    "w8a8_smoothquant": Recipe(
      method="SmoothQuant",
      text="8 bits, outliers moved into weights",
      **_A8,
      smoothing=0.5,
    ),
    "w8a8_quarot": Recipe(
      method="QuaRot", text="8 bits, Hadamard rotations", **_A8, **_ROTATED
    ),
    "quamba_w8a8": Recipe(
      method="Quamba",
      text="8 bits, x clipped, outputs rotated",
      **_A8,
      rotates_outputs=True,
      clip=99.999,
    ),
    "mambaquant_w8a8": Recipe(
      method="MambaQuant",
      text="8 bits, KLT and Hadamard rotations, smoothed outputs",
      **_A8,
      rotation="klt",
      rotates_outputs=True,
      smoothing=0.5,
    ),
    "quamba2_w8a8": Recipe(
      method="Quamba2",
      text="8 bits, Hadamard rotations, sorted and clustered",
      **_A8,
      **_ROTATED,
      **_SORTED,
    ),
    "w4a8_nearest": Recipe(
      method="Quamba2",
      text="4-bit weights, nearest, else as quamba2_w4a8",
      **_W4,
      head="int4",
      **_INT8,
      **_ROTATED,
      **_SORTED,
    ),
    "quamba2_w4a8": Recipe(
      method="Quamba2",
      text="4-bit weights by GPTQ, 8-bit activations",
      **_W4,
      head="int4",
      **_INT8,
      gptq=True,
      **_ROTATED,
      **_SORTED,
    ),
    "quamba2_w4ax": Recipe(
      method="Quamba2",
      text="4-bit weights, 8-bit activations but in a quarter of the layers",
      **_W4,
      head="int4",
      **_INT8,
      gptq=True,
      **_ROTATED,
      **_SORTED,
      float_share=0.25,
    ),
  }
)

# Kernels to the nearest levels of a format, by its name; their blocks are as
# the format's row says.
_BY_FORMAT = {
  "int4": "integers, groups of 128",
  "int4_asym": "integers with zero points, groups of 128",
  "nf4": "quantiles of a normal distribution, groups of 128",
  "sf4": "quantiles of Student's t, groups of 128",
  "af4": "levels for the largest of 64 normal numbers, groups of 64",
  "sf4_fit": "quantiles of the tensor's own t, groups of 128",
  "lloyd4": "Lloyd-Max levels of the tensor's own, groups of 128",
  "fp4": "E2M1, groups of 128",
  "fp4_sr": "E2M1 and 8, groups of 128",
  "fp4_sp": "E2M1 and 5, groups of 128",
  "fp4_e3m0": "E3M0, groups of 128",
  "apot4": "sums of powers of two, groups of 128",
  "apot4_sp": "sums of powers of two and a half, groups of 128",
  "fp4_er": "E2M1 and 5 or -5, groups of 128",
  "fp4_ea": "E2M1 and 8 or -8, groups of 128",
  "bitmod4": "E2M1 and one of four levels, groups of 128",
  "mxint4": "integers, groups of 32 with powers of two",
  "mxfp4": "E2M1, groups of 32 with powers of two",
  "nvfp4": "E2M1, groups of 16 with E4M3",
  "razer4": "E2M1 and one of four levels, groups of 16 with E3M3",
  "int3": "integers, groups of 128",
  "int3_asym": "integers with zero points, groups of 128",
  "nf3": "quantiles of a normal distribution, groups of 128",
  "sf3": "quantiles of Student's t, groups of 128",
  "sf3_fit": "quantiles of the tensor's own t, groups of 128",
  "lloyd3": "Lloyd-Max levels of the tensor's own, groups of 128",
  "fp3": "E2M0, groups of 128",
  "fp3_er": "E2M0 and 3 or -3, groups of 128",
  "fp3_ea": "E2M0 and 6 or -6, groups of 128",
  "bitmod3": "E2M0 and one of four levels, groups of 128",
}
# Levels of a tensor as it was do not fit what GPTQ makes of it, and a token's
# own levels would cost more than its numbers.
_FITTED = ("sf4_fit", "lloyd4", "sf3_fit", "lloyd3")
BY_FORMAT: Mapping[str, Recipe] = types.MappingProxyType(
  {
    name: Recipe(
      method="nearest",
      text=f"{name.partition('_')[0][-1]}-bit weights, nearest: {text}",
      kernels=name,
      small_kernels="int8",
      table="int8",
      head=name,
    )
    for name, text in _BY_FORMAT.items()
  }
)
ALL: Mapping[str, Recipe] = types.MappingProxyType(
  {
    **RECIPES,
    **BY_FORMAT,
    "p3_w4a8kv4": dataclasses.replace(
      BY_FORMAT["bitmod4"],
      method="P3-LLM",
      text="BitMoD 4-bit weights, FP8 inputs, 4-bit cache, smoothed keys",
      inputs="fp8_e4m3:row",
      dynamic=True,
      cache="int4_asym:row",
      smooth_keys=True,
    ),
    **{
      f"gptq_{name}": dataclasses.replace(
        recipe,
        method="GPTQ",
        text=recipe.text.replace("nearest", "GPTQ"),
        gptq=True,
      )
      for name, recipe in BY_FORMAT.items()
      if not name.endswith("_asym") and name not in _FITTED
    },
  }
)

# Formats of what tokens bring: no two tokens share a scale.
OF_TOKENS = (
  *(n for n in _BY_FORMAT if n not in ("nvfp4", "razer4", *_FITTED)),
  *("nvfp4_token", "razer4_token", "int6", "int8", "fp8_e4m3"),
)
# What `get` takes behind a name, and what it changes.
_SWITCHES: Mapping[str, Mapping[str, object]] = types.MappingProxyType(
  {
    "hadamard": _ROTATED,
    "clipped": {"clipped": True},
    "smooth_keys": {"smooth_keys": True},
  }
)
_FORMATS: Mapping[str, Mapping[str, object]] = types.MappingProxyType(
  {"inputs": {"dynamic": True}, "cache": {}}
)
HELP = (
  "a name, and behind it by choice "
  + ", ".join(f"+{one}" for one in _SWITCHES)
  + ", "
  + ", ".join(f"+{one}=FORMAT" for one in _FORMATS)
)


def get(name: str) -> Recipe:
  """Returns a recipe of `ALL`, with more behind its name.

  Args:
    name: such as "sf4", "gptq_sf4+hadamard", "bitmod4+inputs=fp8_e4m3" or
      "p3_w4a8kv4+cache=nf4:32".

  Raises:
    InputError: it is not written so, or there is no such recipe or format, in
      one line.
  """
  base, *options = name.split("+")
  if base not in ALL:
    raise InputError(
      f"recipe {base!r}: there is none such; there are {', '.join(ALL)}"
    )
  changes: dict[str, object] = {}
  for option in options:
    key, _, form = option.partition("=")
    if option in _SWITCHES:
      own = _SWITCHES[option]
    elif key in _FORMATS and form:
      if form.partition(":")[0] not in OF_TOKENS:
        raise InputError(
          f"recipe {name!r}: {form} is no format of what tokens bring; there "
          f"are {', '.join(OF_TOKENS)}"
        )
      if form.endswith(":tensor"):
        raise InputError(
          f"recipe {name!r}: tokens would share the scales of {form}: take "
          "row or the size of a group"
        )
      own = {key: form, **_FORMATS[key]}
    else:
      raise InputError(f"recipe {name!r}: +{option} is not known: give {HELP}")
    if any(one in changes for one in own):
      raise InputError(f"recipe {name!r}: +{key} is there twice: leave one out")
    changes |= own
  found = dataclasses.replace(ALL[base], **changes)
  if found.smooth_keys and found.cache is None:
    raise InputError(
      f"recipe {name!r}: +smooth_keys is for a cache in few bits: give "
      "+cache=FORMAT, too"
    )
  keys = [option.partition("=")[0] for option in options]
  return dataclasses.replace(
    found,
    method=" + ".join([found.method, *keys]),
    text=", ".join([found.text, *options]),
  )


def _of_tokens(name: str) -> str:
  """The format that goes with weights in another, for what tokens bring."""
  return f"{name}_token" if f"{name}_token" in OF_TOKENS else name


_PAIRS = [(n, _of_tokens(n)) for n in BY_FORMAT if _of_tokens(n) in OF_TOKENS]
# Names of many recipes, for comparisons: every format in one way.
SETS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
  {
    "all_formats": tuple(BY_FORMAT),
    "all_gptq": tuple(name for name in ALL if name.startswith("gptq_")),
    "all_clipped": tuple(f"{name}+clipped" for name in BY_FORMAT),
    "all_hadamard": tuple(
      f"{name}+hadamard"
      for name in ALL
      if name in BY_FORMAT or name.removeprefix("gptq_") in BY_FORMAT
    ),
    "all_inputs": tuple(
      f"{name}+inputs={form}{more}"
      for name, form in _PAIRS
      for more in ("", "+hadamard")
    ),
    "all_caches": (
      *(f"rtn_w8a16+cache={form}" for _, form in _PAIRS),
      "rtn_w8a16+cache=int4_asym:row",
      "rtn_w8a16+cache=int4_asym:row+smooth_keys",
      "p3_w4a8kv4",
    ),
  }
)


def expanded(names: Sequence[str]) -> list[str]:
  """The same names with those of `SETS` replaced by what they hold.

  Raises:
    InputError: one is no recipe, or no baseline either.
  """
  found = [one for name in names for one in SETS.get(name, (name,))]
  for name in found:
    if name not in LLAMA_CPP:
      get(name)
  return list(dict.fromkeys(found))


# Baselines of comparisons, which are no models that can be kept.
LLAMA_CPP = ("llama_cpp_q8_0", "llama_cpp_q4_k")
