"""The `.bin` files of llama2.c (github.com/karpathy/llama2.c), version 0.

Seven int32 (D, F, L, H, N, V, context; V negative when the head is untied),
then float32 arrays one after the other, without names.
"""

import math
import pathlib
import struct

import numpy as np

from models import input_files
from models.convert.names import TensorSource, half_split_rows
from models.errors import InputError
from models.transformer_config import TransformerConfig

_HEADER = struct.Struct("<7i")
_LAYER = "model.layers.{}."
_ROTATION = "freq_cis"


def read_config(path: pathlib.Path) -> TransformerConfig:
  """Reads the header.

  Raises:
    InputError: the file is too short or its header is nonsense.
  """
  path = input_files.regular(path)
  with input_files.errors_at(path), path.open("rb") as file:
    header = file.read(_HEADER.size)
  if len(header) < _HEADER.size:
    raise InputError(f"{path}: is cut short in its header: get it again")
  d_model, d_ff, layers, heads, kv_heads, vocab, context = _HEADER.unpack(
    header
  )
  sizes = (d_model, d_ff, layers, heads, kv_heads, abs(vocab), context)
  if min(sizes) < 1 or d_model % heads or heads % kv_heads:
    raise InputError(
      f"{path}: header {header.hex()} is not that of a llama2.c file "
      "(version 0): give such a file"
    )
  with input_files.errors_of_config(path):
    return TransformerConfig(
      vocab_size=abs(vocab),
      num_layers=layers,
      d_model=d_model,
      d_ff=d_ff,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_dim=d_model // heads,
      tie_embeddings=vocab > 0,
      max_position=context,
    )


def tensor_source(
  path: pathlib.Path, config: TransformerConfig
) -> TensorSource:
  """Offers the memory-mapped file under Hugging Face names.

  Raises:
    InputError: the file is longer or shorter than its header says.
  """
  c = config
  q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  layered = [
    ("input_layernorm", (c.d_model,)),
    ("self_attn.q_proj", (q_size, c.d_model)),
    ("self_attn.k_proj", (kv_size, c.d_model)),
    ("self_attn.v_proj", (kv_size, c.d_model)),
    ("self_attn.o_proj", (c.d_model, q_size)),
    ("post_attention_layernorm", (c.d_model,)),
    ("mlp.gate_proj", (c.d_ff, c.d_model)),
    ("mlp.down_proj", (c.d_model, c.d_ff)),
    ("mlp.up_proj", (c.d_ff, c.d_model)),
  ]
  order = [("model.embed_tokens.weight", (c.vocab_size, c.d_model))]
  for name, shape in layered:
    for layer in range(c.num_layers):
      order.append((f"{_LAYER.format(layer)}{name}.weight", shape))
  order.append(("model.norm.weight", (c.d_model,)))
  # The rotation tables of old versions, which nobody reads.
  order.append((_ROTATION, (c.max_position, c.head_dim)))
  if not c.tie_embeddings:
    order.append(("lm_head.weight", (c.vocab_size, c.d_model)))

  data = np.memmap(path, np.uint8, mode="r")
  tensors, end = {}, _HEADER.size
  for name, shape in order:
    start, end = end, end + 4 * math.prod(shape)
    if end > len(data):
      raise InputError(
        f"{path}: tensor {name!r} lies beyond the end of the file, which was "
        "cut short: get it again"
      )
    tensors[name] = data[start:end].view("<f4").reshape(shape)
  if end != len(data):
    raise InputError(
      f"{path}: has {len(data) - end} bytes more than its header says: give a "
      "llama2.c file of version 0"
    )
  del tensors[_ROTATION]

  def read(name: str) -> np.ndarray:
    if name.endswith("q_proj.weight"):
      return half_split_rows(tensors[name], c.num_heads)
    if name.endswith("k_proj.weight"):
      return half_split_rows(tensors[name], c.num_kv_heads)
    return tensors[name]

  return TensorSource(
    names=frozenset(tensors),
    read=read,
    label=lambda name: f"{path}: tensor {name!r}",
  )
