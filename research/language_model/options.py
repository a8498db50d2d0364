"""All options of a training run, and the model sizes that have a name.

Scripts make a flag of every field. The sizes of a model that are not given
come from its preset.
"""

import dataclasses
from typing import Any

from models.attamba_config import BOUNDARIES, COMPRESSORS, SEMANTICS
from models.errors import InputError
from research.core.options import SCHEDULES, option
from research.text.documents import DOCUMENTS

ARCHITECTURES = ("transformer", "mamba1", "mamba2", "hybrid", "attamba")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of a run; every attribute is described by its metadata."""

  arch: str = option("transformer", "kind of model", choices=ARCHITECTURES)
  preset: str | None = option(
    None, "named sizes, such as 60m; an unknown one lists those of --arch"
  )
  layers: int | None = option(
    None, "blocks; the preset's if not given", lower=1, upper=1024
  )
  d_model: int | None = option(
    None, "width; the preset's if not given", lower=8, upper=65536
  )
  d_ff: int | None = option(
    None,
    "width of the gated MLP behind attention; 0 for none in a hybrid",
    lower=0,
    upper=1 << 18,
  )
  heads: int | None = option(
    None, "query heads (attention layers)", lower=1, upper=1024
  )
  kv_heads: int | None = option(
    None, "key and value heads (attention layers)", lower=1, upper=1024
  )
  d_state: int | None = option(
    None, "state size N of a Mamba layer", lower=1, upper=1024
  )
  head_dim: int | None = option(
    None, "channels P of a head of a Mamba-2 layer", lower=1, upper=1024
  )
  groups: int | None = option(
    None, "groups G of a Mamba-2 layer", lower=1, upper=256
  )
  attention_every: int | None = option(
    None,
    "every so many layers of a hybrid one is attention",
    lower=1,
    upper=1024,
  )
  chunk_size: str | None = option(
    None,
    "tokens P of a chunk of an Attamba, such as 4; of its layers in turn 4,128",
  )
  window: int | None = option(
    None,
    "tokens L that an Attamba sees one by one besides the current one",
    lower=0,
    upper=1 << 20,
  )
  boundaries: str | None = option(None, "where chunks end", choices=BOUNDARIES)
  compressor: str | None = option(
    None,
    "what makes the key and the value of a chunk; none: a sliding window alone",
    choices=COMPRESSORS,
  )
  top_chunks: int | None = option(
    None,
    "chunks that a token of an Attamba sees, the best ones; 0 for all",
    lower=0,
    upper=1 << 20,
  )
  semantics: str | None = option(
    None,
    "of an Attamba: the paper's, or what the released code computes",
    choices=SEMANTICS,
  )
  ssm_channels: int | None = option(
    None, "channels of an Attamba's state spaces", lower=1, upper=1 << 16
  )
  sink: bool | None = option(None, "token 0 is a chunk of its own")
  share_kv: bool | None = option(None, "keys are values too (Attamba)")
  keep_projections: bool | None = option(
    None, "W_K and W_V behind an Attamba's state spaces"
  )
  carry: bool | None = option(None, "an Attamba's state spaces span two chunks")
  tie_embeddings: bool = option(True, "the head is the token table")

  tokenizer: str = option(
    "bpe",
    "bpe (learned from --text), bytes, gpt-neox, gpt2, smollm2, llama2, a hub"
    " id, or the path of a tokenizer.json",
  )
  vocab_size: int = option(4096, "of --tokenizer=bpe", lower=257, upper=1 << 20)
  vocab_multiple: int = option(
    128, "the token table has a multiple of so many rows", lower=1, upper=4096
  )
  documents: str = option(
    "auto", "how a text is cut into documents", choices=DOCUMENTS
  )
  text_field: str = option(
    "text", "of .jsonl and .parquet texts, whose records are documents"
  )
  document_mask: bool = option(
    True, "tokens see their own document alone, not all of their window"
  )
  held_out: float = option(
    0.02,
    "share of --text for evaluation where --eval_text is not given",
    lower=0.0001,
    upper=0.5,
  )

  length: int = option(1024, "tokens of a window", lower=8, upper=1 << 20)
  batch: int = option(
    64, "windows of an update, over all devices", lower=1, upper=1 << 20
  )
  accumulate: int = option(
    1, "parts of a batch, one after the other", lower=1, upper=1 << 16
  )
  steps: int = option(1000, "updates", lower=1, upper=10**8)
  learning_rate: float = option(1e-3, "peak", lower=0.0, upper=10.0)
  schedule: str = option("cosine", "of the rate", choices=SCHEDULES)
  warmup: int = option(100, "updates of linear warmup", lower=0, upper=10**7)
  final_share: float = option(
    0.1, "of the peak at the end", lower=0.0, upper=1.0
  )
  decay_share: float = option(
    0.2, "of the updates in which wsd falls", lower=0.0, upper=1.0
  )
  weight_decay: float = option(0.1, "of matrices", lower=0.0, upper=10.0)
  beta1: float = option(0.9, "of AdamW", lower=0.0, upper=0.9999)
  beta2: float = option(0.95, "of AdamW", lower=0.0, upper=0.99999)
  eps: float = option(1e-8, "of AdamW", lower=1e-16, upper=1e-2)
  clip_norm: float = option(
    1.0, "of the gradient; 0 leaves it", lower=0.0, upper=1e6
  )
  z_loss: float = option(
    1e-4,
    "weight of the squared log normalizer in the loss",
    lower=0.0,
    upper=1.0,
  )
  dtype: str = option(
    "bfloat16",
    "of activations; weights and sums are float32",
    choices=("float32", "bfloat16"),
  )
  remat: bool = option(
    False, "compute every layer again in the backward pass, to save memory"
  )
  eval_every: int = option(100, "updates", lower=1, upper=10**8)
  eval_windows: int = option(
    128, "held-out windows of an evaluation at most", lower=1, upper=10**7
  )
  seed: int = option(0, "of everything", lower=0, upper=2**31 - 1)

  def __post_init__(self):
    """Checks options against each other.

    Raises:
      InputError: they do not fit.
    """
    if self.batch % self.accumulate:
      raise InputError(
        f"--batch={self.batch} is no multiple of "
        f"--accumulate={self.accumulate}: change one"
      )
    if self.arch not in PRESETS:
      raise InputError(
        f"--arch={self.arch!r} is unknown: take one of {list(PRESETS)}"
      )
    self.sizes()

  @property
  def tokens_per_step(self) -> int:
    """Targets of an update."""
    return self.batch * self.length

  def sizes(self) -> dict[str, Any]:
    """The model's sizes: what is given, else the preset's.

    Raises:
      InputError: the preset is unknown, or a size does not belong to the
        architecture.
    """
    presets = PRESETS[self.arch]
    name = self.preset or "tiny"
    if name not in presets:
      raise InputError(
        f"--preset={name!r} is unknown: --arch={self.arch} has "
        f"{', '.join(presets)}"
      )
    sizes = presets[name]
    given = {
      name: getattr(self, name)
      for name in SIZES
      if getattr(self, name) is not None
    }
    for name in given.keys() - sizes.keys():
      raise InputError(
        f"--{name} says nothing about --arch={self.arch}: leave it out"
      )
    return sizes | given


SIZES = (
  "layers",
  "d_model",
  "d_ff",
  "heads",
  "kv_heads",
  "d_state",
  "head_dim",
  "groups",
  "attention_every",
  "chunk_size",
  "window",
  "boundaries",
  "compressor",
  "top_chunks",
  "semantics",
  "ssm_channels",
  "sink",
  "share_kv",
  "keep_projections",
  "carry",
)


def _transformer(layers, d_model, d_ff, heads, kv_heads) -> dict[str, int]:
  return {
    "layers": layers,
    "d_model": d_model,
    "d_ff": d_ff,
    "heads": heads,
    "kv_heads": kv_heads,
  }


def _mamba1(layers, d_model, d_state=16) -> dict[str, int]:
  return {"layers": layers, "d_model": d_model, "d_state": d_state}


def _mamba2(layers, d_model, d_state=128, head_dim=64) -> dict[str, int]:
  return _mamba1(layers, d_model, d_state) | {
    "head_dim": head_dim,
    "groups": 1,
  }


def _hybrid(layers, d_model, heads, attention_every, **mamba) -> dict[str, int]:
  return _mamba2(layers, d_model, **mamba) | {
    "heads": heads,
    "kv_heads": heads,
    "d_ff": 0,
    "attention_every": attention_every,
  }


def _attamba(
  chunk_size, window, layers, d_model, d_ff, heads, **ssm
) -> dict[str, Any]:
  return {
    "layers": layers,
    "d_model": d_model,
    "d_ff": d_ff,
    "heads": heads,
    "kv_heads": heads,
    "chunk_size": chunk_size,
    "window": window,
    "boundaries": "cyclic",
    "compressor": "ssm",
    "top_chunks": 0,
    "semantics": "paper",
    "sink": True,
    "share_kv": False,
    "keep_projections": False,
    "carry": False,
    **ssm,
  }


_TINY_STATE = {"d_state": 32, "head_dim": 64}

_PUBLISHED_SPACE = {"d_state": 32, "ssm_channels": 256, "head_dim": 32}

# Those of 60m are alike in parameters, about 58 million with 32,768 tokens.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
  "transformer": {
    "tiny": _transformer(2, 128, 344, 4, 4),
    "60m": _transformer(12, 512, 1536, 8, 8),
    "130m": _transformer(12, 768, 2304, 12, 12),
    "370m": _transformer(24, 1024, 3072, 16, 16),
    "1.3b": _transformer(24, 2048, 6144, 32, 32),
  },
  "mamba1": {
    "tiny": _mamba1(4, 128),
    "60m": _mamba1(24, 512),
    "130m": _mamba1(24, 768),
    "370m": _mamba1(48, 1024),
    "790m": _mamba1(48, 1536),
    "1.4b": _mamba1(48, 2048),
    "2.8b": _mamba1(64, 2560),
  },
  "mamba2": {
    "tiny": _mamba2(4, 128, **_TINY_STATE),
    "60m": _mamba2(24, 512),
    "130m": _mamba2(24, 768),
    "370m": _mamba2(48, 1024),
    "780m": _mamba2(48, 1536),
    "1.3b": _mamba2(48, 2048),
    "2.7b": _mamba2(64, 2560),
  },
  "hybrid": {
    "tiny": _hybrid(4, 128, 4, 2, **_TINY_STATE),
    "60m": _hybrid(24, 512, 8, 6),
    "130m": _hybrid(24, 768, 12, 6),
    "2.7b": _hybrid(64, 2560, 32, 10),
  },
  "attamba": {
    "tiny": _attamba(
      "4", 16, 2, 128, 344, 4, d_state=16, ssm_channels=64, head_dim=32
    ),
    "p4": _attamba("4", 32, 8, 512, 1536, 8, **_PUBLISHED_SPACE),
    "p8": _attamba("8", 64, 8, 512, 1536, 8, **_PUBLISHED_SPACE),
  },
}
