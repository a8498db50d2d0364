"""Perplexity of a model on a text, in separate windows.

  python experiments/eval_perplexity.py --model=smollm2 --windows=12

Every window is read from an empty cache, begins with the model's begin token
if it has one, and scores all its tokens but the first. What is left behind
the last whole window is not scored.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

import cli
from models import transformer
from models.convert import load
from models.errors import InputError
from models.text import load_text
from models.tokenizer import Tokenizer, load_tokenizer

_MODEL = flags.DEFINE_string(
  "model", "tiny", "tiny, smollm2, a checkpoint's path or a hub id"
)
_TEXT = flags.DEFINE_string(
  "text",
  "wikitext2:test",
  "wikitext2:train|valid|test, gutenberg:slice, or the path of a text file",
)
_WINDOW = cli.integer("window", 512, "tokens a window", lower=2)
_WINDOWS = cli.integer(
  "windows",
  None,
  "windows, spread evenly over the text; all if not given",
  lower=1,
)
_BATCH = cli.integer("batch", 1, "windows in one call", lower=1)
_DTYPE = cli.choice(
  "dtype", "float32", "of the weights", ("float32", "bfloat16")
)
_RESULT = flags.DEFINE_string("result", None, "JSON file to write")


def _windows(tokenizer: Tokenizer, text: str) -> np.ndarray:
  """Cuts a text into rows (N, window) of tokens."""
  prefix = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  size = _WINDOW.value - len(prefix)
  ids = tokenizer.encode(text)
  count = len(ids) // size
  if count == 0:
    raise InputError(
      f"--window={_WINDOW.value}: --text={_TEXT.value} has only {len(ids)} "
      "tokens: give a smaller window or a longer text"
    )
  rows = ids[: count * size].reshape(count, size)
  wanted = min(count, _WINDOWS.value or count)
  rows = rows[np.arange(wanted) * count // wanted]
  prefix = np.tile(np.asarray(prefix, np.int32), (len(rows), 1))
  return np.concatenate([prefix, rows], axis=1)


def _nll(config, params, tokens: jax.Array) -> jax.Array:
  """Mean negative log-likelihood in nats of each row (B,) of (B, T)."""
  logits = transformer.forward(config, params, tokens)[:, :-1]
  taken = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - taken, axis=-1)


def _interval(nll: np.ndarray) -> tuple[float, float]:
  """A 95% interval of the perplexity, by bootstrap over windows."""
  rng = np.random.default_rng(0)
  draws = rng.choice(nll, size=(2000, len(nll))).mean(axis=1)
  low, high = np.exp(np.quantile(draws, (0.025, 0.975)))
  return float(low), float(high)


def main(_) -> None:
  """Prints the perplexity and writes the result file if one is asked for."""
  start = time.monotonic()
  text = load_text(_TEXT.value)
  checkpoint = load(_MODEL.value, jnp.dtype(_DTYPE.value))
  if _WINDOW.value > checkpoint.config.max_position:
    raise InputError(
      f"--window={_WINDOW.value}: {checkpoint.name} was trained on "
      f"{checkpoint.config.max_position} positions: give at most that"
    )
  rows = _windows(load_tokenizer(checkpoint), text)
  nll = jax.jit(functools.partial(_nll, checkpoint.config))
  found = []
  with tqdm.tqdm(total=len(rows), unit="window") as bar:
    for first in range(0, len(rows), _BATCH.value):
      batch = rows[first : first + _BATCH.value]
      found.extend(np.asarray(nll(checkpoint.params, batch)).tolist())
      bar.update(len(batch))
      bar.set_postfix(perplexity=f"{np.exp(np.mean(found)):.3f}")
  perplexity = float(np.exp(np.mean(found)))
  low, high = _interval(np.asarray(found))
  print(
    f"{checkpoint.name} on {_TEXT.value}, {len(rows)} windows of "
    f"{_WINDOW.value} tokens: perplexity {perplexity:.3f} "
    f"[{low:.3f}, {high:.3f}]"
  )
  if _RESULT.value:
    row = {
      "system": "transformer",
      "model": checkpoint.name,
      "data": _TEXT.value,
      "method": "dense",
      "budget": 1.0,
      "metric": "perplexity",
      "value": perplexity,
      "low": low,
      "high": high,
      "seeds": 1,
      "windows": len(rows),
      "window": _WINDOW.value,
      "dtype": _DTYPE.value,
    }
    seconds = time.monotonic() - start
    cli.write_result(_RESULT.value, [row], cli.command(), seconds)


if __name__ == "__main__":
  cli.run(main)
