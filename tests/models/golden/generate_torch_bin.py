"""Writes `torch_state_dict.bin` as PyTorch saves one, and what is in it.

In the environment that `generate.py` describes:

  golden_env/bin/python tests/models/golden/generate_torch_bin.py
"""

import collections
import pathlib

import numpy as np
import torch

_HERE = pathlib.Path(__file__).parent


def main() -> None:
  """Writes the file, and an `.npz` of it in which bfloat16 is float32."""
  torch.manual_seed(0)
  base = torch.randn(6, 8)
  tensors = collections.OrderedDict(
    single=base,
    transposed=base.T,
    part=base[1:3, 2:5],
    half=torch.randn(5).half(),
    brain=torch.randn(3, 2).bfloat16(),
    double=torch.randn(2, 2, 2).double(),
    scalar=torch.tensor(2.5),
    empty=torch.zeros(0, 4),
    long=torch.arange(4),
    flags=torch.tensor([True, False]),
    bytes=torch.arange(5, dtype=torch.uint8),
  )
  # As `Module.state_dict` does.
  tensors._metadata = collections.OrderedDict({"": {"version": 1}})
  torch.save(tensors, _HERE / "torch_state_dict.bin")
  arrays = {
    name: (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    for name, x in tensors.items()
  }
  np.savez_compressed(_HERE / "torch_state_dict.npz", **arrays)


if __name__ == "__main__":
  main()
