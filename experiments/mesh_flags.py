"""The flags of trainers that say which devices they run on.

`train_lm.py`, `train_sol.py`, `train_rlm.py` and `train_lra.py` take them;
`train_recall.py` runs on one device. A script that takes them says
`flags.adopt_module_key_flags(mesh_flags)`, so that its `--help` lists them.
"""

from absl import flags

from models.errors import InputError
from research.core import mesh_shape

_MESH = flags.DEFINE_string(
  "mesh",
  None,
  "devices by what they cut, as in data:4,tensor:2; by default rows over all. "
  + "; ".join(f"{name}: {what}" for name, what in mesh_shape.AXES.items()),
)

_MULTIHOST = flags.DEFINE_bool(
  "multihost",
  False,
  "the run has several processes, which its cluster or JAX_COORDINATOR_ADDRESS,"
  " JAX_NUM_PROCESSES and JAX_PROCESS_ID tell; one of them writes",
)


def check(multihost: bool = False) -> None:
  """Checks the flags, before JAX is imported.

  Args:
    multihost: whether the script can be several processes.

  Raises:
    InputError: they cannot be read, or do not do.
  """
  if _MESH.value is not None:
    mesh_shape.parse(_MESH.value)
  if _MULTIHOST.value and not multihost:
    raise InputError(
      "--multihost: this trainer runs in one process: leave the flag out, and "
      "give --mesh for its devices"
    )


def start() -> None:
  """Joins the other processes where there are some; before JAX is used.

  Raises:
    InputError: they cannot be joined.
  """
  if _MULTIHOST.value:
    from research.core import processes

    processes.start()


def mesh(one: bool = False):
  """The mesh that the flags ask for.

  Args:
    one: one device where nothing is asked for, in the place of all.

  Raises:
    InputError: there are fewer devices.
  """
  from research.core import mesh as mesh_lib

  if _MESH.value is None:
    return mesh_lib.data_mesh(1) if one else mesh_lib.make()
  return mesh_lib.make(mesh_shape.parse(_MESH.value))
