"""What thread blocks that all run at once wait for, counted in memory.

A kernel of several phases goes through many layers; who needs what others have
written waits until all of them have done the phase before.
"""

from collections.abc import Mapping

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu


class Phases:
  """Counters of the phases of a layer, one each, which are zero in between."""

  def __init__(self, each: Mapping[str, int], whole: bool):
    """Makes the counters.

    Args:
      each: Of each phase in its order how many signals come in a layer.
      whole: Whether the kernel does all phases; else nobody waits or signals,
        as the interpreter needs it, which takes a phase after the other.
    """
    self._each, self._refs = dict(each), None
    if whole:
      self._refs = {
        phase: pl.get_global(plgpu.SemaphoreType.REGULAR) for phase in each
      }

  def signal(self, phase: str) -> None:
    """Says that this block, or warpgroup, has done its part of a phase."""
    if self._refs:
      plgpu.semaphore_signal(self._refs[phase], memory_scope="gpu")

  def wait(self, phase: str, layers: int | jax.Array) -> None:
    """Waits until all have done a phase in so many layers."""
    if self._refs:
      plgpu.semaphore_wait(
        self._refs[phase],
        layers * self._each[phase],
        decrement=False,
        memory_scope="gpu",
      )

  def clear(self, layers: int | jax.Array) -> None:
    """Leaves the counters at zero, as the next call wants them.

    Nobody waits for one any more when the last phase has been done.

    Args:
      layers: That this kernel has done.
    """
    if self._refs:
      for phase in reversed(self._each):
        plgpu.semaphore_wait(
          self._refs[phase], layers * self._each[phase], memory_scope="gpu"
        )
