"""Lowers programs for a Hopper GPU on a machine that has none."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

_HOPPER = AbstractMesh(
  (1,),
  ("device",),
  axis_types=(AxisType.Auto,),
  abstract_device=AbstractDevice(
    device_kind="NVIDIA H200", num_cores=132, platform="gpu"
  ),
)


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
  """Returns what a function of arrays, or of their shapes, becomes, as text."""
  check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
  with jax.sharding.use_abstract_mesh(_HOPPER):
    exported = jax.export.export(
      jax.jit(function), platforms=["cuda"], disabled_checks=[check]
    )(*arguments)
  return exported.mlir_module()
