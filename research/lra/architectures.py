"""The models of Long Range Arena by name: their sizes for every task.

FABNet's are those of the scripts that gave the published accuracies (all
blocks FBfly); the Transformer's those of its baseline there, but with 8 heads
for images, where one head is known to cripple it, and means instead of a class
token.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from models import fabnet, module
from models.errors import InputError
from models.fabnet_config import FABNetConfig
from ops.butterfly_matmul import twiddle_shape
from research.lra.options import Options
from research.lra.tasks import TASKS

# (width, width of FFNs, blocks) of FABNet, and the same and heads of the
# Transformer, which FNet and Mamba-2 share.
_FABNET = {
  "listops": (128, 256, 2),
  "text": (256, 512, 2),
  "retrieval": (1024, 1024, 2),
  "image": (64, 128, 1),
  "pathfinder32": (64, 64, 6),
}
_DENSE = {
  "listops": (64, 128, 2, 2),
  "text": (64, 128, 2, 2),
  "retrieval": (64, 128, 2, 2),
  "image": (64, 128, 2, 8),
  "pathfinder32": (64, 64, 2, 2),
}
# Models that are put beside each other: options in the place of others.
VARIANTS: dict[str, dict[str, Any]] = {
  "fabnet": {"model": "fabnet"},
  "fabnet_abfly": {"model": "fabnet", "attention_layers": 1},
  "transformer": {"model": "transformer"},
  "rotary": {"model": "transformer", "positions": "rotary"},
  "fnet": {"model": "fnet"},
  "mamba2": {"model": "mamba2"},
  "low_rank": {"model": "low_rank"},
  "block_diagonal": {"model": "block_diagonal"},
  "monarch": {"model": "monarch"},
}
_WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256)
_STRUCTURED = ("fabnet", "monarch", "low_rank", "block_diagonal")


def config(options: Options) -> FABNetConfig:
  """The model that options ask for.

  Raises:
    InputError: sizes do not fit each other.
  """
  task = TASKS[options.task]
  structured_ffn = options.model in _STRUCTURED
  sizes = _FABNET[task.name] if structured_ffn else _DENSE[task.name][:3]
  given = (options.d_model, options.d_ff, options.layers)
  d_model, d_ff, layers = (own or size for own, size in zip(given, sizes))
  mixing = dict.fromkeys(
    ("fourier_layers", "mamba_layers", "attention_layers"), 0
  )
  if options.model == "transformer":
    mixing["attention_layers"] = layers
  elif options.model == "mamba2":
    mixing["mamba_layers"] = layers
  else:
    attending = options.attention_layers or 0
    if attending > layers:
      raise InputError(
        f"--attention_layers={attending}: the model has {layers} blocks"
      )
    mixing["attention_layers"] = attending
    mixing["fourier_layers"] = layers - attending
  kind = {"fabnet": "butterfly"}.get(options.model, options.model)
  matrices = kind if structured_ffn else "dense"
  more = _like_butterflies(matrices, d_model, d_ff, options)
  found = FABNetConfig(
    vocab_size=task.vocab_size,
    num_classes=task.classes,
    max_length=options.sequence_length,
    d_model=d_model,
    d_ff=d_ff,
    num_heads=options.heads or _DENSE[task.name][3],
    ffn=matrices,
    projections=matrices,
    tied_butterflies=options.tied_butterflies,
    positions=options.positions,
    pool=options.pool,
    mask_padding=options.mask_padding,
    fourier_norm=options.fourier_norm,
    pairs=task.pairs,
    mamba_head_dim=math.gcd(2 * d_model, 16),
    **mixing,
    **more,
  )
  return found.released() if options.released else found


def _like_butterflies(kind, d_model, d_ff, options) -> dict[str, int]:
  """Rank or blocks, such that FFNs have the parameters of butterflies.

  Blocks are a power of two that divides both widths, as near as there is.
  """
  if kind == "monarch":
    return {"blocks": options.blocks} if options.blocks else {}
  pairs = ((d_model, d_ff), (d_ff, d_model))
  wanted = sum(math.prod(twiddle_shape(*pair)) for pair in pairs) / 2
  if kind == "low_rank":
    rank = options.rank or max(round(wanted / (d_model + d_ff)), 1)
    return {"rank": rank}
  if kind != "block_diagonal":
    return {}
  blocks = options.blocks
  if not blocks:
    most = math.gcd(d_model, d_ff)
    powers = [2**i for i in range(most.bit_length()) if most % 2**i == 0]
    distance = lambda k: abs(math.log(d_model * d_ff / k / wanted))
    blocks = min(powers, key=distance)
  return {"blocks": blocks}


def variant(options: Options, name: str) -> FABNetConfig:
  """The model of a key of `VARIANTS`, all else as options say."""
  return config(dataclasses.replace(options, **VARIANTS[name]))


def dense_with_parameters(
  like: FABNetConfig, wanted: int, depths: Sequence[int] = (1, 2)
) -> FABNetConfig:
  """The dense Transformer whose blocks come closest to so many parameters.

  Width and depth vary; FFNs are twice as wide, heads have 8 or 16 channels.
  Of equally close ones the deeper one.

  Args:
    like: task, pooling and positions of it.
    wanted: parameters of all blocks, see `block_parameters`.
    depths: that are tried.
  """
  found = [
    (abs(math.log(block_parameters(one) / wanted)), -one.num_layers, one)
    for one in dense_family(like, depths)
  ]
  return min(found, key=lambda item: item[:2])[2]


def dense_family(
  like: FABNetConfig,
  depths: Sequence[int] = (1, 2),
  widths: Sequence[int] = _WIDTHS,
) -> list[FABNetConfig]:
  """Dense Transformers of some depths and widths, multiples of 8."""
  return [
    dataclasses.replace(
      like,
      d_model=width,
      d_ff=2 * width,
      num_heads=width // (8 if width % 16 else 16),
      fourier_layers=0,
      mamba_layers=0,
      attention_layers=layers,
      attention_first=False,
      ffn="dense",
      projections="dense",
      attention_ffn=None,
      rank=None,
      blocks=None,
    )
    for layers in depths
    for width in widths
  ]


def block_parameters(config: FABNetConfig) -> int:
  """Parameters of the blocks, embeddings and the head left out."""
  shapes = fabnet.abstract_params(config)
  stacks = ("fourier", "mamba", "attention")
  return sum(
    module.num_params(shapes[name]) for name in stacks if name in shapes
  )
