"""Tokenizers inside of GGUF files: byte-level BPE and SentencePiece's BPE.

A file holds tokens, their types and merges or scores, and names the rule by
which texts are cut into words before (`tokenizer.ggml.pre`). The rules are
those of the models' own `tokenizer.json`, under the names that llama.cpp
(src/llama-vocab.cpp) gives them; words are cut by the package `tokenizers`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import gguf
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from models import input_files, sentence_piece
from models.convert import gguf_io
from models.encoding import Tokenizer, ids_within, put_begin, with_said
from models.errors import InputError, shown

_CONTROL = int(gguf.TokenType.CONTROL)
_UNKNOWN = int(gguf.TokenType.UNKNOWN)
_USER_DEFINED = int(gguf.TokenType.USER_DEFINED)
_BYTE = int(gguf.TokenType.BYTE)
_ADVICE = "put the model's tokenizer.json beside the file, or give --tokenizer"
_PARTS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown",
          "pad_token": "padding"}  # fmt: skip
# Ends of a text, of a turn and of a message.
_ENDS = ("eos", "eot", "eom")

_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r"|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHES = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
# Words in which capitals stand in front alone.
_UPPER, _LOWER = (
  r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
)
_FRONT = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_FRONT}{_UPPER}*{_LOWER}+SHORT|{_FRONT}{_UPPER}+{_LOWER}*SHORT"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rule:
  """How a family of tokenizers cuts a text into words.

  Attributes:
    patterns: each cuts what the ones before it left, at all that it finds.
    ignore_merges: whether a word that is a token is taken whole.
    adds_begin: whether texts begin with a token where the file does not say.
    nfc: whether a text is brought into Unicode's form C first.
  """

  patterns: tuple[str, ...]
  ignore_merges: bool = False
  adds_begin: bool = False
  nfc: bool = False


_LLAMA3 = (rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_SHORT}|{_WORD}|\p{{N}}|{_REST}",)
_RULES = {
  "gpt-2": _Rule(patterns=(_GPT2,)),
  # Of files that name no model; llama.cpp's own.
  "default": _Rule(
    patterns=(
      r"[\p{P}\$\+<=>\^~\|]+",
      _GPT2.removesuffix(r"|\s+"),
      r"\p{N}+",
      "[0-9][0-9][0-9]",
    )
  ),
  "olmo": _Rule(patterns=(_GPT2,), nfc=True),
  "smollm": _Rule(patterns=(r"\p{N}", _GPT2)),
  "llama-bpe": _Rule(patterns=_LLAMA3, ignore_merges=True, adds_begin=True),
  "dbrx": _Rule(patterns=_LLAMA3),
  "qwen2": _Rule(patterns=_QWEN2, nfc=True),
  "deepseek-r1-qwen": _Rule(patterns=_QWEN2),
  "tekken": _Rule(
    patterns=(rf"{_CASED.replace('SHORT', '')}|\p{{N}}|{_SLASHES}",),
    ignore_merges=True,
    adds_begin=True,
  ),
  "gpt-4o": _Rule(
    patterns=(
      rf"{_CASED.replace('SHORT', _SHORT + '?')}|\p{{N}}{{1,3}}|{_SLASHES}",
    )
  ),
  "deepseek-coder": _Rule(
    patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")
  ),
  "deepseek-v3": _Rule(
    patterns=(
      r"\p{N}{1,3}",
      _HAN_KANA,
      r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
      r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
      r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
  ),
}
# Other names of the same rules.
_NAMES = {
  "gpt-2": "phi-2 mpt jais trillion granite-docling exaone4 gigachat "
  "a.x-4.0 mellum modern-bert",
  "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
  "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
  "dbrx": "smaug-bpe",
  "deepseek-r1-qwen": "kormo f2llmv2 stablelm2 hunyuan solar-open megrez "
  "grok-2",
  "gpt-4o": "llama4 kanana2",
}
_RULE_OF = _RULES | {
  name: _RULES[rule] for rule, names in _NAMES.items() for name in names.split()
}


def read(path: pathlib.Path) -> Tokenizer:
  """Builds the tokenizer inside a GGUF file, which may be one part of several.

  Raises:
    InputError: the file holds none, or one of an unsupported kind.
  """
  reader = gguf_io.open_gguf(path)
  with input_files.errors_at(path, wrong="its tokenizer is damaged"):
    return said(_build(reader, path), path, reader)


def said(
  tokenizer: Tokenizer,
  path: pathlib.Path,
  reader: gguf_io.GgufFile | None = None,
) -> Tokenizer:
  """Adds end tokens, names and the chat template of a GGUF file.

  Args:
    tokenizer: of the model in the file.
    path: of the file.
    reader: of the same file, opened where it is not given.

  Raises:
    InputError: the file is damaged.
  """
  reader = reader or gguf_io.open_gguf(path)
  with input_files.errors_at(path, wrong="its tokenizer is damaged"):
    ends = [_metadata(reader, f"{part}_token_id") for part in _ENDS]
    return with_said(
      tokenizer,
      ends=ends,
      chat_template=gguf_io.metadata(reader, "tokenizer.chat_template"),
      names={
        part: tokenizer.backend.id_to_token(i)
        for part, name in _PARTS.items()
        for i in ids_within(
          [_metadata(reader, f"{name}_token_id")], tokenizer.vocab_size
        )
      },
    )


def _metadata(reader: gguf_io.GgufFile, key: str, default: Any = None) -> Any:
  return gguf_io.metadata(reader, f"tokenizer.ggml.{key}", default)


def _build(reader: gguf_io.GgufFile, path: pathlib.Path) -> Tokenizer:
  kind, pre = _metadata(reader, "model"), _metadata(reader, "pre")
  if kind is None:
    raise InputError(f"{path}: holds no tokenizer: {_ADVICE}")
  rule = _RULE_OF.get(pre) if isinstance(pre, str) else None
  if kind not in ("gpt2", "llama") or (kind == "gpt2" and rule is None):
    names = ", ".join(_RULES)
    what = f"of rule {shown(pre)}" if kind == "gpt2" else f"{shown(kind)}"
    raise InputError(
      f"{path}: its tokenizer {what} is not supported, only 'llama', and "
      f"'gpt2' of {names} and the like: {_ADVICE}"
    )
  tokens = _metadata(reader, "tokens") or []
  types = _metadata(reader, "token_type") or [1] * len(tokens)
  if len(types) < len(tokens) or len(set(tokens)) < len(tokens) or not tokens:
    raise ValueError("it lacks tokens or types, or repeats a token")
  if kind == "llama":
    backend, begins = _sentence_piece(reader, tokens, types), True
  else:
    backend, begins = _byte_pairs(reader, tokens, rule), rule.adds_begin
  _add_marks(backend, tokens, types)
  # SentencePiece gives the token 1 this part where no file says otherwise.
  bos = _metadata(reader, "bos_token_id", 1 if kind == "llama" else None)
  begin = next(iter(ids_within([bos], len(tokens))), None)
  if not _metadata(reader, "add_bos_token", begins):
    begin = None
  put_begin(backend, begin)
  ends = ids_within([2] if kind == "llama" else [], len(tokens))
  if _metadata(reader, "eos_token_id") is not None:
    ends = ()
  return Tokenizer(
    backend=backend, vocab_size=len(tokens), bos_id=begin, end_ids=ends
  )


def _byte_pairs(
  reader: gguf_io.GgufFile, tokens: Sequence[str], rule: _Rule
) -> tokenizers.Tokenizer:
  # A first space belongs to what is merged.
  merges = [(m, m.index(" ", 1)) for m in _metadata(reader, "merges") or []]
  if not merges:
    raise ValueError("it has no merges")
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[(merge[:at], merge[at + 1 :]) for merge, at in merges],
      ignore_merges=rule.ignore_merges,
    )
  )
  if rule.nfc:
    backend.normalizer = normalizers.NFC()
  cuts = [
    pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for pattern in rule.patterns
  ]
  letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentence_piece(
  reader: gguf_io.GgufFile, tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
  scores = _metadata(reader, "scores") or []
  if len(scores) < len(tokens):
    raise ValueError("it lacks scores")
  # Texts are searched for user-defined tokens as for control tokens.
  kinds = [_CONTROL if kind == _USER_DEFINED else kind for kind in types]
  pieces = list(zip(tokens, map(float, scores), kinds))
  return sentence_piece.build(
    sentence_piece.Model(
      pieces=pieces,
      kind=sentence_piece.BPE,
      byte_fallback=_BYTE in types,
      charsmap=b"",
      dummy_prefix=bool(_metadata(reader, "add_space_prefix", True)),
      fewer_spaces=bool(_metadata(reader, "remove_extra_whitespaces", False)),
    ),
    plain_names=True,
  )


def _add_marks(
  backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> None:
  """Lets texts be searched for tokens that merges do not make.

  Control tokens are left out of texts that are decoded, others are not.
  """
  for special, kinds in (
    (True, (_CONTROL, _UNKNOWN)),
    (False, (_USER_DEFINED,)),
  ):
    backend.add_tokens(
      [
        tokenizers.AddedToken(token, special=special, normalized=False)
        for token, kind in zip(tokens, types)
        if kind in kinds
      ]
    )
