"""What all tests run under: eight CPU devices, and full float32 products."""

import jax

from tests import tpu_compile

# Not through XLA_FLAGS: the scripts that tests start must see one device.
jax.config.update("jax_num_cpu_devices", 8)
# On an accelerator float32 would else be multiplied in fewer bits.
jax.config.update("jax_default_matmul_precision", "highest")
# Axes are added by hand: a silent broadcast hides a wrong shape.
jax.config.update("jax_numpy_rank_promotion", "raise")

# `make test` fetches the compiler; where it was not run, the rest still runs.
collect_ignore_glob = [] if tpu_compile.library() else ["*_tpu_test.py"]
