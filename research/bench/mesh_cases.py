"""What the flags of `time_mesh.py` may say, told apart without JAX."""

import dataclasses
import re
from typing import Self

from models.errors import InputError
from research.bench import specs
from research.core import mesh_shape
from research.language_model.options import PRESETS

# What is timed -> its form, and an example.
_FORMS = {
  "lm": (r"(?P<name>[\w./]+):(?P<batch>\d+)x(?P<length>\d+)",
         "mamba2_1_3b:8x4096@fsdp:2"),
  "losses": (r"(?P<name>[\w./]+):(?P<batch>\d+)x(?P<length>\d+)",
             "losses=mamba2/60m:8x512@data:8"),
  "sol": (r"(?P<name>[\w./]+):(?P<batch>\d+)x(?P<length>\d+)",
          "sol=llama3_2_1b:8x512@data:2"),
  "rlm": (r"(?P<name>\d+/\d+\+\d+):(?P<batch>\d+)x(?P<length>\d+)",
          "rlm=512/2+2:64x2048@data:2"),
  "ssd": (r"(?P<name>\d+x\d+x\d+):(?P<batch>\d+)x(?P<length>\d+)",
          "ssd=64x64x128:1x262144@sequence:2"),
  "attention": (r"(?P<name>\d+x\d+):(?P<batch>\d+)x(?P<length>\d+)",
                "attention=8x128:1x262144@sequence:2"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One thing to time on one mesh.

  Attributes:
    group: of rows that a table holds side by side.
    kind: "lm", "sol" and "rlm" are updates; "ssd" and "attention" an op,
      forward and backward; "losses" is no time, but updates on one device and
      on many.
    name: of the model, or its sizes: WIDTH/ENCODER+DECODER of "rlm",
      HEADSxWIDTH of an op and its state's width.
    batch: rows, or windows of "sol".
    length: tokens of a row, or the context of "sol".
    shape: of the mesh.
    text: as it was written.
  """

  group: str
  kind: str
  name: str
  batch: int
  length: int
  shape: dict[str, int]
  text: str

  @classmethod
  def parse(cls, text: str) -> Self:
    """The case of "MODEL:BxL@MESH" or "[GROUP.]KIND=SIZES:BxL@MESH".

    Raises:
      InputError: it is not written so, or there is no such model.
    """
    work, at, shape = text.partition("@")
    kind, equals, spec = work.partition("=")
    if not equals:
      kind, spec = "lm", work
    group, _, kind = kind.rpartition(".")
    form, example = _FORMS.get(kind, _FORMS["lm"])
    found = re.fullmatch(form, spec) if at and kind in _FORMS else None
    numbers = [int(found[key]) for key in ("batch", "length")] if found else []
    if not found or 0 in numbers:
      kinds = ", ".join(f"{name}=" for name in _FORMS if name != "lm")
      raise InputError(
        f"--case={text}: write MODEL:BxL@MESH, as in {example}; other kinds"
        f" begin with {kinds}"
      )
    if kind in ("lm", "losses", "sol"):
      _check_model(text, kind, found["name"])
    batch, length = numbers
    return cls(
      group=group or kind,
      kind=kind,
      name=found["name"],
      batch=batch,
      length=length,
      shape=mesh_shape.parse(shape),
      text=text,
    )


def _check_model(text: str, kind: str, name: str) -> None:
  arch, slash, preset = name.partition("/")
  published = [*specs.models()]
  if kind != "sol" and slash and preset in PRESETS.get(arch, ()):
    return
  if name in published and (kind != "sol" or _is_transformer(name)):
    return
  if kind == "sol":
    published = [each for each in published if _is_transformer(each)]
  also = "" if kind == "sol" else ", or ARCH/PRESET of train_lm.py"
  raise InputError(
    f"--case={text}: there is no model {name!r}: take one of"
    f" {', '.join(published)}{also}"
  )


def _is_transformer(name: str) -> bool:
  return isinstance(specs.models()[name](), specs.TransformerConfig)
