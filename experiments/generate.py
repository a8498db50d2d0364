"""Continues prompts with any language model of the house.

  python experiments/generate.py --model=tiny --prompt="Once upon a time"
  python experiments/generate.py --model=smollm2 --chat \
    --prompt="What is a cat?" --temperature=0.7 --top_p=0.9

One prompt streams to stdout; several (--prompt again and again, or a .jsonl
file, of chats too) are a batch, printed whole. --chat writes turns by the
model's template. --policy=RUN --budget=.9 lets a policy of train_sol.py choose
each token's work, --keep_pages=.25 reads the best of the cache. Speeds go to
stderr: hundreds of tokens a second of "tiny".
"""

import functools
import json
import pathlib
import sys

from absl import flags

import cli
import policy_flags
from models.errors import InputError
from research.core import files

flags.adopt_module_key_flags(policy_flags)
_MODEL = flags.DEFINE_string(
  "model", "tiny", "tiny, smollm2, a checkpoint's path or a hub id"
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "bytes, a path or a hub id; the model's own if not given"
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "may be given again")
_FILE = flags.DEFINE_string(
  "prompt_file",
  None,
  'a text file that is one prompt, or a .jsonl file with a {"prompt": ...} a '
  'line, of chats {"messages": ...}',
)
_CHAT = flags.DEFINE_bool("chat", False, "a prompt is a user's turn")
_SYSTEM = flags.DEFINE_string("system", None, "the system's turn, with --chat")
_TEMPERATURE = cli.number("temperature", 0.0, "0 is greedy", 0.0, 1e6)
_TOP_P = cli.number("top_p", 1.0, "nucleus sampling", 1e-6, 1.0)
_TOP_K = cli.integer("top_k", 0, "draw among the k likeliest; 0: all", 0)
_SEED = cli.integer("seed", 0, "of the draws", 0, 2**31 - 1)
_MAX_TOKENS = cli.integer("max_tokens", 128, "tokens to add at most", 1)
_STOP = flags.DEFINE_multi_string(
  "stop", [], r"the text ends before it; may be given again; \n is a new line"
)
_STEPS = cli.integer("steps", 1, "tokens drawn by one call of the device", 1)
_DTYPE = cli.choice(
  "dtype", "float32", "of the weights", ("float32", "bfloat16")
)
_STATE = flags.DEFINE_string(
  "state_format", None, "of Mamba's state, such as int8; the model's own if not"
)
_KEEP = cli.number("keep_pages", None, "share of a cache to read", 1e-6, 1)
_OUTPUT = flags.DEFINE_string("output", None, ".jsonl file of texts to write")


def _prompts() -> list:
  """All prompts that the flags name."""
  from research.text import prompts

  if _SYSTEM.value is not None and not _CHAT.value:
    raise InputError("--system is a turn of a chat: give --chat as well")
  found = list(_PROMPT.value)
  if _FILE.value:
    found += prompts.read(_FILE.value, chat=_CHAT.value)
  if not found:
    raise InputError("there is no prompt: give --prompt or --prompt_file")
  return found


def _write(prompts, completions) -> None:
  def row(prompt, found):
    told = {"prompt": prompt, "text": found.text, "reason": found.reason}
    return told | {"tokens": len(found.tokens)}

  rows = map(row, prompts, completions)
  path = pathlib.Path(_OUTPUT.value).expanduser()
  files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def main(_) -> None:
  """Generates; see the module's docstring."""
  policy_flags.check()
  prompts = _prompts()
  cli.check_there([_MODEL.value], tokenizer=_TOKENIZER.value)
  import jax.numpy as jnp  # after the flags were checked

  from models.caches.paged import PageBudget
  from models.state_format import StateFormat

  pages = PageBudget.of(_KEEP.value)
  state_format = _STATE.value and StateFormat.parse(_STATE.value)
  from models import chat
  from models.convert import load
  from research.decoding.plain import Plain
  from research.decoding.sampling import Sampling
  from research.decoding.text import Generator, TextOptions
  from research.text.prompts import chats, shown
  from research.text.tokenizing import of_checkpoint

  checkpoint = load(_MODEL.value, jnp.dtype(_DTYPE.value))
  tokenizer = of_checkpoint(checkpoint, _TOKENIZER.value)
  how = _MAX_TOKENS.value, _TEMPERATURE.value, _SEED.value
  if policy_flags.played(checkpoint, tokenizer, prompts, *how):
    return
  method = functools.partial(Plain, state_format=state_format, pages=pages)
  generator = Generator(
    checkpoint.config, checkpoint.params, tokenizer, method=method
  )
  if _CHAT.value:
    encoded = chat.encode(tokenizer, chats(prompts, _SYSTEM.value))
  else:
    encoded = [generator.encode(prompt) for prompt in prompts]
  options = TextOptions(
    max_tokens=_MAX_TOKENS.value,
    sampling=Sampling(
      temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value
    ),
    seed=_SEED.value,
    stop=tuple(text.replace(r"\n", "\n") for text in _STOP.value),
    steps=_STEPS.value,
  )
  alone = len(prompts) == 1

  def show(_: int, piece: str) -> None:
    print(piece, end="", flush=True)

  if alone and not _CHAT.value:
    sys.stdout.write(prompts[0])
  try:
    completions = generator(encoded, options, show if alone else None)
  finally:
    # What goes wrong is told on a line of its own.
    if alone:
      print(flush=True)
  if not alone:
    for prompt, completion in zip(prompts, completions, strict=True):
      print(f"=== {shown(prompt)!r} ({completion.reason})\n{completion.text}")
  if _OUTPUT.value:
    _write(prompts, completions)
  print(generator.speed, file=sys.stderr)


if __name__ == "__main__":
  cli.run(main)
