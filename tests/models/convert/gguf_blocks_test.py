"""Blocks of GGUF files against ggml's loops (ggml-quants.c), one at a time."""

import gguf
import jax
import numpy as np
import pytest

from models import transformer
from models.convert import gguf_blocks, gguf_io, load
from models.errors import InputError
from models.transformer_config import TransformerConfig
from tests.models import gguf_files

_CONFIG = TransformerConfig.tiny(
  num_layers=1, d_model=256, d_ff=256, num_heads=4, num_kv_heads=2, head_dim=64
)
_F32 = np.float32


def _zeros(config):
  return jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32),
    transformer.abstract_params(config),
  )


def _half(block, at):
  return _F32(block[at : at + 2].view(np.float16)[0])


def _scale_min(j, q):
  """`get_scale_min_k4`: the six bits of a scale and of a minimum."""
  if j < 4:
    return q[j] & 63, q[j + 4] & 63
  high = lambda byte: (byte >> 6) << 4
  return (q[j + 4] & 15) | high(q[j - 4]), (q[j + 4] >> 4) | high(q[j])


def _q2_k(block):
  scales, qs = block[:16], block[16:80]
  d, least = _half(block, 80), _half(block, 82)
  out = []
  for half in range(2):
    for j in range(4):
      for part in range(2):
        sc = scales[8 * half + 2 * j + part]
        for l in range(16):
          q = qs[32 * half + 16 * part + l] >> (2 * j) & 3
          out.append(d * _F32(sc & 15) * _F32(q) - least * _F32(sc >> 4))
  return out


def _q3_k(block):
  hmask, qs, packed, d = (
    block[:32], block[32:96], block[96:108], _half(block, 108)
  )  # fmt: skip
  scales = [
    (packed[i % 8] >> (4 * (i // 8)) & 15)
    | ((packed[8 + i % 4] >> (2 * (i // 4)) & 3) << 4)
    for i in range(16)
  ]
  out = []
  for half in range(2):
    for j in range(4):
      for part in range(2):
        sc = _F32(int(scales[8 * half + 2 * j + part]) - 32)
        for l in range(16):
          at = 16 * part + l
          q = int(qs[32 * half + at] >> (2 * j) & 3)
          q -= 0 if hmask[at] >> (4 * half + j) & 1 else 4
          out.append(d * sc * _F32(q))
  return out


def _q45_k(block, high):
  d, least, scales = _half(block, 0), _half(block, 2), block[4:16]
  qh, qs = (block[16:48], block[48:]) if high else (None, block[16:])
  out = []
  for j in range(8):
    sc, m = _scale_min(j, scales)
    for l in range(32):
      q = int(qs[32 * (j // 2) + l] >> (4 * (j % 2)) & 15)
      if high:
        q += 16 * int(qh[l] >> j & 1)
      out.append(d * _F32(sc) * _F32(q) - least * _F32(m))
  return out


def _q6_k(block):
  ql, qh, scales = block[:128], block[128:192], block[192:208].view(np.int8)
  d = _half(block, 208)
  out = np.zeros(256, _F32)
  for half in range(2):
    for l in range(32):
      for part in range(4):
        low = ql[64 * half + 32 * (part % 2) + l] >> (4 * (part // 2)) & 15
        top = qh[32 * half + l] >> (2 * part) & 3
        sc = scales[8 * half + 2 * part + l // 16]
        value = d * _F32(sc) * _F32(int(low | top << 4) - 32)
        out[128 * half + 32 * part + l] = value
  return out


def _q8_k(block):
  d = block[:4].view(np.float32)[0]
  return [d * _F32(q) for q in block[4:260].view(np.int8)]


_LOOPS = {
  "Q2_K": _q2_k,
  "Q3_K": _q3_k,
  "Q4_K": lambda block: _q45_k(block, high=False),
  "Q5_K": lambda block: _q45_k(block, high=True),
  "Q6_K": _q6_k,
  "Q8_K": _q8_k,
}


@pytest.mark.parametrize("name", _LOOPS)
def test_blocks_of_256_are_those_of_ggml(name):
  packed = gguf_files.blocks(name, 2, 512)
  found = gguf_blocks.dequantize(packed, gguf.GGMLQuantizationType[name])
  assert found.shape == (2, 512)
  assert found.dtype == np.float32
  size = packed.shape[1] // 2
  expected = [
    np.concatenate([_LOOPS[name](row[:size]), _LOOPS[name](row[size:])])
    for row in packed
  ]
  np.testing.assert_array_equal(found, np.array(expected, np.float32))
  assert len(np.unique(found)) > 100


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_files_mix_formats_as_llama_cpp_writes_them(arch, tmp_path):
  """Every format there is stands for some matrix of the file."""
  config = _CONFIG if arch == "llama" else _config(arch)
  params = _zeros(config)
  places = {
    "attn_q": 256, "attn_k": 128, "attn_v": 128, "attn_output": 256,
    "ffn_gate": 256, "ffn_up": 256, "ffn_down": 256,
  }  # fmt: skip
  first = {"llama": 0, "qwen3": 4, "gemma3": 7}[arch]
  names = [gguf_files.FORMATS[(first + i) % 11] for i in range(len(places))]
  packed = {
    f"blk.0.{place}.weight": (
      gguf_files.blocks(name, rows, 256),
      gguf.GGMLQuantizationType[name],
    )
    for (place, rows), name in zip(places.items(), names, strict=True)
  }
  gguf_files.write(tmp_path / "m.gguf", arch, config, params, packed=packed)
  found = load(tmp_path / "m.gguf")
  assert found.config == config
  layer = found.params["layers"]
  for place, kernel in {
    "ffn_gate": layer["mlp"]["gate_proj"]["kernel"],
    "ffn_down": layer["mlp"]["down_proj"]["kernel"],
    "attn_v": layer["attn"]["v_proj"]["kernel"],
    "attn_output": layer["attn"]["o_proj"]["kernel"],
  }.items():
    blocks, kind = packed[f"blk.0.{place}.weight"]
    expected = gguf_blocks.dequantize(blocks, kind)
    np.testing.assert_array_equal(kernel[0].T, expected)
  # Llama's rows alone go from neighbours to halves.
  blocks, kind = packed["blk.0.attn_q.weight"]
  rows = gguf_blocks.dequantize(blocks, kind)
  if arch == "llama":
    rows = rows.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
  np.testing.assert_array_equal(layer["attn"]["q_proj"]["kernel"][0].T, rows)


def _config(arch):
  changes = {
    "num_layers": 1, "d_model": 256, "d_ff": 256, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 64,
  }  # fmt: skip
  if arch == "gemma3":
    changes |= {"sliding": (True,), "query_scalar": 64.0}
    return TransformerConfig.tiny_gemma(**changes)
  return TransformerConfig.tiny(**changes, qk_norm=True)


@pytest.mark.parametrize("cut", [1, 100, 4000])
def test_a_block_that_is_cut_short_is_named(cut, tmp_path):
  path = tmp_path / "m.gguf"
  packed = {
    "blk.0.ffn_up.weight": (
      gguf_files.blocks("Q4_K", 256, 256),
      gguf.GGMLQuantizationType.Q4_K,
    )
  }
  params = _zeros(_CONFIG)
  gguf_files.write(path, "llama", _CONFIG, params, packed=packed)
  reader = gguf.GGUFReader(path)
  tensor = next(t for t in reader.tensors if "ffn_up" in t.name)
  end = int(tensor.data_offset + tensor.n_bytes)
  path.write_bytes(path.read_bytes()[: end - cut])
  with pytest.raises(InputError) as caught:
    load(path)
  message = str(caught.value)
  assert "\n" not in message
  assert "'blk.0.ffn_up.weight' lies beyond the end of the file" in message


def test_formats_that_nobody_reads_are_told(tmp_path):
  path, kind = tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_1
  blocks = np.zeros((256, 256 // 32 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
  params = _zeros(_CONFIG)
  packed = {"blk.0.ffn_up.weight": (blocks, kind)}
  gguf_files.write(path, "llama", _CONFIG, params, packed=packed)
  reader = gguf_io.open_gguf(path)
  source = gguf_io.tensor_source(reader, _CONFIG, str(path))
  with pytest.raises(InputError, match="has the unsupported type Q8_1: use"):
    source.read("model.layers.0.mlp.up_proj.weight")
