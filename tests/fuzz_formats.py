"""The formats of `fuzz.py`: small valid files, and what reads them.

Those of public sets and of what runs keep are in `fuzz_sets.py`.
"""

import gzip
import io
import json
import lzma
import struct
import zipfile

import gguf
import jax
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

from models import (
  arrays,
  convert,
  gguf_tokenizer,
  input_files,
  language_model,
  quantized,
  sentence_piece,
  text,
  tokenizer,
)
from models.attamba_config import AttambaConfig
from models.convert import attamba, hf_config, mamba, t5gemma, torch_bin
from models.convert import folder as convert_folder
from models.mamba_config import MambaConfig
from models.numbers import Ieee
from models.transformer_config import TransformerConfig
from research.core import checkpoint, metrics, workdir
from research.evaluation import task_data
from research.predictors import kernelbench, program_table, tables
from research.regression_lm import RegressionLM, artefact
from research.results import tables as result_tables
from research.text import token_cache
from tests.fuzz import Format
from tests.fuzz_lra import LRA
from tests.fuzz_sets import SETS
from tests.models import gguf_files

_HF = {
  "model_type": "llama",
  "vocab_size": 16,
  "num_hidden_layers": 1,
  "hidden_size": 8,
  "intermediate_size": 8,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "head_dim": 4,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "rope_scaling": {"rope_type": "linear", "factor": 2.0},
  "tie_word_embeddings": True,
  "max_position_embeddings": 64,
}
_MAMBA = {
  "model_type": "mamba2_hybrid",
  "vocab_size": 61,
  "num_hidden_layers": 3,
  "hidden_size": 32,
  "state_size": 16,
  "head_dim": 16,
  "n_groups": 1,
  "num_heads": 4,
  "attention_layers": {
    "indices": [1],
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
  },
  "stack_splits": [2],
}
_GEMMA = {
  "model_type": "gemma3",
  "text_config": {
    "model_type": "gemma3_text",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
    "query_pre_attn_scalar": 256,
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0},
      "sliding_attention": {"rope_theta": 10000.0},
    },
    "final_logit_softcapping": None,
  },
}
_T5GEMMA = {
  "model_type": "t5gemma",
  "encoder": {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "rms_norm_eps": 1e-6,
    "layer_types": ["sliding_attention", "full_attention"],
  },
}


def _config():
  return TransformerConfig.tiny(
    vocab_size=16,
    num_layers=1,
    d_model=8,
    d_ff=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
  )


def _model(folder):
  config = _config()
  params = language_model.init(config, jax.random.key(0))
  convert.save_safetensors(folder, config, params)


def _few_bits(folder):
  config = MambaConfig.tiny()
  params = language_model.init(config, jax.random.key(0))
  params = quantized.quantize_params(params, "int8:16", r".*in_proj\.kernel")
  convert.save_safetensors(folder, config, params)


def _index(folder):
  _model(folder)
  (folder / "model.safetensors").rename(folder / "a.safetensors")
  with safetensors.safe_open(folder / "a.safetensors", "numpy") as file:
    names = dict.fromkeys(file.keys(), "a.safetensors")
  (folder / convert_folder.INDEX).write_text(json.dumps({"weight_map": names}))


def _gguf(folder):
  writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
  writer.add_embedding_length(8)
  writer.add_head_count(2)
  writer.add_head_count_kv(1)
  writer.add_block_count(1)
  writer.add_feed_forward_length(8)
  writer.add_context_length(64)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(sorted(pre_tokenizers.ByteLevel.alphabet()) + ["12"])
  writer.add_token_types([1] * 257)
  writer.add_token_merges(["1 2"])
  shapes = {"attn_norm": (8,), "ffn_norm": (8,), "attn_q": (8, 8)}
  shapes |= {"attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
  shapes |= {name: (8, 8) for name in ("ffn_gate", "ffn_up", "ffn_down")}
  shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
  shapes |= {"token_embd.weight": (257, 8), "output_norm.weight": (8,)}
  for name, shape in shapes.items():
    writer.add_tensor(name, np.ones(shape, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _gguf_gemma(folder):
  """Matrices in blocks of every kind, one after the other."""
  config = TransformerConfig.tiny_gemma(
    vocab_size=16,
    num_layers=1,
    sliding=(True,),
    d_model=256,
    d_ff=256,
    num_heads=1,
    num_kv_heads=1,
    head_dim=256,
    query_scalar=256.0,
  )
  params = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, np.float32),
    language_model.abstract_params(config),
  )
  places = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
  kinds = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "Q5_0")
  packed = {
    f"blk.0.{place}.weight": (
      gguf_files.blocks(kind, 256, 256),
      gguf.GGMLQuantizationType[kind],
    )
    for place, kind in zip(places, kinds, strict=True)
  }
  path = folder / "m.gguf"
  gguf_files.write(path, "gemma3", config, params, packed=packed)


def _read_gguf(folder):
  loaded = convert.load(folder / "m.gguf")
  return tokenizer.load_tokenizer(loaded).encode("a 12")


def _gguf_pieces(folder):
  writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
  writer.add_tokenizer_model("llama")
  pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "\u2581a"]
  writer.add_token_list(pieces)
  writer.add_token_types([2, 3, 3, 6, 1, 1, 1])
  writer.add_token_scores([-float(i) for i in range(7)])
  writer.add_chat_template("{{ messages }}")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _llama2c(folder):
  sizes = (8, 8, 1, 2, 1, 16, 4)
  count = 16 * 8 + 8 + 64 + 32 + 32 + 64 + 8 + 3 * 64 + 8 + 16
  data = struct.pack("<7i", *sizes) + np.ones(count, "<f4").tobytes()
  (folder / "m.bin").write_bytes(data)


def _llama2c_tokens(folder):
  words = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
  words += [b" ", b"a", b" a"]
  data = struct.pack("<i", 6)
  for word in words:
    data += struct.pack("<fi", 0.0, len(word)) + word
  (folder / "tok.bin").write_bytes(data)


def _torch(folder):
  # The pickle is written by hand, since nothing of PyTorch is here: one
  # tensor (2, 3) of a storage of six numbers.
  name, key = b"weight", b"0"
  word = lambda text: b"X" + struct.pack("<I", len(text)) + text
  storage = (
    b"(" + word(b"storage") + b"ctorch\nFloatStorage\n" + word(key)
    + word(b"cpu") + b"K\x06tQ"
  )  # fmt: skip
  empty = b"ccollections\nOrderedDict\n)R"
  tensor = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    + b"K\x00K\x02K\x03\x86K\x03K\x01\x86\x89" + empty + b"tR"
  )  # fmt: skip
  data = b"\x80\x02}" + word(name) + tensor + b"s."
  with zipfile.ZipFile(folder / "m.bin", "w") as archive:
    archive.writestr("m/data.pkl", data)
    archive.writestr("m/data/0", np.arange(6, dtype="<f4").tobytes())


def _read_torch(folder):
  archive = torch_bin.Archive(folder / "m.bin")
  return [archive.read(name) for name in archive.names()]


def _tokenizer(folder):
  words = ["a", "b", "c", "ab", "[UNK]"]
  backend = tokenizers.Tokenizer(
    token_models.BPE(
      {word: i for i, word in enumerate(words)}, [("a", "b")], unk_token="[UNK]"
    )
  )
  backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  backend.save(str(folder / "tokenizer.json"))


def _read_tokenizer(folder):
  found = tokenizer.from_json(folder / "tokenizer.json")
  return tokenizer.within(found, 100, "a").encode("abc a")


def _sentence_piece(folder):
  piece = lambda text, kind: (
    b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4)
    + b"\x18" + bytes([kind])
  )  # fmt: skip
  data = b""
  for text_, kind in ((b"<unk>", 2), (b"a", 1), (b"b", 1), (b"ab", 1)):
    body = piece(text_, kind)
    data += b"\x0a" + bytes([len(body)]) + body
  data += b"\x12\x02\x18\x02"
  (folder / "m.model").write_bytes(data)


def _writes(name, content):
  data = content if isinstance(content, bytes) else json.dumps(content).encode()
  return lambda folder: (folder / name).write_bytes(data)


def _packed(pack, name, content):
  return _writes(name, pack(content))


_CSV = b"x,lr,y\na,1,2.5\nb,2,3\nc,3,nan\n"
_JSONL = b'{"x": "a b", "y": 1.5}\n{"x": "c", "y": 2, "z": [1, {"b": null}]}\n'
_PROGRAMS = {
  "source": "def f(x):\n  return x + 1\n",
  "flops": 5,
  "bytes_accessed": 8.5,
  "transcendentals": 0,
  "peak_bytes": -1,
  "latency_us": 2.0,
  "latency_again_us": 2.1,
  "operators": "add",
  "split_random": "train",
}
_RESULT = {
  "command": "python x.py",
  "commit": "0" * 40,
  "device": "cpu",
  "seconds": 3.5,
  "rows": [
    {
      "op": "ssd",
      "shape": "1x2",
      "dtype": "float32",
      "pass": "fwd",
      "implementation": "xla",
      "ms": 1.5,
      "peer": "torch",
      "peer_ms": 2.5,
      "floor_ms": 0.5,
      "error": 1e-6,
    }
  ],
}


def _kernelbench(folder):
  sources = json.dumps({"src": "s", "code": "x = 1"}).encode()
  (folder / "kernelbench_sources.jsonl.gz").write_bytes(
    gzip.compress(sources, mtime=0)
  )
  (folder / "kernelbench_timings.csv.gz").write_bytes(
    b"level,name,src,hardware,run,mode,mean_ms\nlevel1,1_a.py,s,A,r,m,2.5\n"
  )


def _npz(folder):
  stream = io.BytesIO()
  np.savez_compressed(stream, a=np.arange(6.0), b=np.ones((2, 3), np.int32))
  (folder / "a.npz").write_bytes(stream.getvalue())


def _npy(folder):
  np.save(folder / "a.npy", np.arange(12).reshape(3, 4))


def _tokens(folder):
  tokens, starts = np.arange(9, dtype="<u2"), np.array([0, 4])
  tokens.tofile(folder / "tokens.bin")
  np.save(folder / "starts.npy", starts)
  meta = {"dtype": "<u2", "checksum": token_cache._checksum(tokens, starts)}
  (folder / "meta.json").write_text(json.dumps(meta))


def _checkpoint(folder):
  checkpoint.Checkpointer(folder).save(3, {"a": np.arange(4, dtype=np.float32)})


def _read_checkpoint(folder):
  state = {"a": jax.ShapeDtypeStruct((4,), np.float32)}
  return checkpoint.Checkpointer(folder).restore(3, state)


def _metrics(folder):
  rows = [{"step": step, "loss": 1.5} for step in range(3)]
  lines = [json.dumps(row) + "\n" for row in rows]
  (folder / "metrics.jsonl").write_text("".join(lines))


def _read_metrics(folder):
  metrics._truncate(folder / "metrics.jsonl", 2)
  return metrics.read_jsonl(folder / "metrics.jsonl")


def _read_result(folder):
  return result_tables._table("speed", folder / "r.json", "r.json")


def _regression_lm(folder):
  lm = RegressionLM.from_scratch(size="tiny", numbers=Ieee(mantissa_digits=2))
  lm.save(folder / "m")


_ATTAMBA = AttambaConfig.tiny(chunk_sizes=(4, 8))
_FLAGS = {"rate": 0.5, "text": ["a"], "name": None}

FORMATS = {
  "safetensors": Format(_model, "model.safetensors", convert.load),
  "quantized": Format(_few_bits, "model.safetensors", convert.load),
  "config": Format(_model, "config.json", convert.load),
  "index": Format(_index, convert_folder.INDEX, convert.load),
  "mamba_config": Format(
    _writes("config.json", _MAMBA), "config.json",
    lambda folder: mamba.from_json(
      input_files.read_json(folder / "config.json"), str(folder / "config.json")
    ).runs,
  ),
  "attamba_config": Format(
    _writes("config.json", attamba.to_hf(_ATTAMBA, "float32")), "config.json",
    lambda folder: attamba.from_json(
      input_files.read_json(folder / "config.json"), str(folder / "config.json")
    ).runs,
  ),
  "t5gemma_config": Format(
    _writes("config.json", _T5GEMMA), "config.json",
    lambda folder: t5gemma.from_hf(
      input_files.read_json(folder / "config.json"), str(folder / "config.json")
    ),
  ),
  "gemma_config": Format(
    _writes("config.json", _GEMMA), "config.json",
    lambda folder: hf_config.from_hf(
      input_files.read_json(folder / "config.json"), str(folder / "config.json")
    ),
  ),
  "gguf": Format(_gguf, "m.gguf", _read_gguf),
  "gguf_gemma": Format(
    _gguf_gemma, "m.gguf", lambda folder: convert.load(folder / "m.gguf")
  ),
  "gguf_pieces": Format(
    _gguf_pieces, "m.gguf",
    lambda folder: gguf_tokenizer.read(folder / "m.gguf").encode("a a"),
  ),
  "llama2c": Format(
    _llama2c, "m.bin", lambda folder: convert.load(folder / "m.bin")
  ),
  "llama2c_tokens": Format(
    _llama2c_tokens, "tok.bin",
    lambda folder: tokenizer.from_llama2c(folder / "tok.bin", 262).encode("aa"),
  ),
  "torch": Format(_torch, "m.bin", _read_torch),
  "tokenizer": Format(_tokenizer, "tokenizer.json", _read_tokenizer),
  "sentence_piece": Format(
    _sentence_piece, "m.model",
    lambda folder: sentence_piece.read(folder / "m.model").encode("ab"),
  ),
  "csv": Format(
    _writes("t.csv", _CSV), "t.csv",
    lambda folder: tables.read_csv(folder / "t.csv", ["y"]),
  ),
  "csv_gz": Format(
    _packed(lambda data: gzip.compress(data, mtime=0), "t.csv.gz", _CSV),
    "t.csv.gz",
    lambda folder: tables.read_csv(folder / "t.csv.gz", ["y"]),
  ),
  "jsonl": Format(
    _writes("t.jsonl", _JSONL), "t.jsonl",
    lambda folder: tables.read_jsonl(folder / "t.jsonl", ["y"]),
  ),
  "text_xz": Format(
    _packed(lzma.compress, "t.txt.xz", b"some words\n" * 9), "t.txt.xz",
    lambda folder: text.load_text(folder / "t.txt.xz"),
  ),
  "text_records": Format(
    _writes("t.jsonl", b'{"text": "a", "n": 1}\n\n{"text": null}\n'), "t.jsonl",
    lambda folder: text.load_parts(folder / "t.jsonl"),
  ),
  "tasks": Format(
    _writes("arc.json", [{"question": "a", "choices": ["b"], "answer": 0}]),
    "arc.json",
    lambda folder: task_data.read_records(folder, ["arc"], "arc"),
  ),
  "kernelbench": Format(
    _kernelbench, "kernelbench_sources.jsonl.gz", kernelbench.read
  ),
  "kernelbench_csv": Format(
    _kernelbench, "kernelbench_timings.csv.gz", kernelbench.read
  ),
  "programs": Format(
    _writes("p.jsonl", _PROGRAMS), "p.jsonl",
    lambda folder: program_table.programs(
      folder / "p.jsonl", ["latency_us", "flops"]
    ),
  ),
  "npz": Format(
    _npz, "a.npz", lambda folder: arrays.read_npz(folder / "a.npz")
  ),
  "npy": Format(
    _npy, "a.npy", lambda folder: arrays.read_npy(folder / "a.npy")
  ),
  "token_cache": Format(
    _tokens, "meta.json", lambda folder: token_cache._read(folder, "x")
  ),
  "checkpoint": Format(_checkpoint, "3/manifest.json", _read_checkpoint),
  "regression_lm": Format(
    _regression_lm, "m/config.json", lambda folder: artefact.load(folder / "m")
  ),
  "flags": Format(
    _writes("flags.json", _FLAGS), "flags.json",
    lambda folder: workdir._check_flags(folder, _FLAGS),
  ),
  "metrics": Format(_metrics, "metrics.jsonl", _read_metrics),
  "result": Format(_writes("r.json", _RESULT), "r.json", _read_result),
}  # fmt: skip
FORMATS |= SETS | LRA
