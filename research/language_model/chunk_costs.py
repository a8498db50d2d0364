"""What tokens cost, where they themselves decide where chunks end.

A chunk ends with the token at which the costs of its tokens reach one, in
chunks of P / 2 to 2 P tokens (`models.chunks`).
"""

import numpy as np

from models.attamba_config import AttambaConfig
from models.tokenizer import Tokenizer


def table(
  config: AttambaConfig, tokenizer: Tokenizer, counts: np.ndarray
) -> np.ndarray:
  """Costs (V,) float32, 0 to 1.

  Args:
    config: of the model; its first chunk size is P.
    tokenizer: of the text.
    counts: (V,) how often each token occurs in it.

  Returns:
    For "token_class": 1 of tokens whose last character is neither a letter nor
    a digit, such as a full stop, a space or a line's end, else 0. For
    "surprise": -log p of a token over P times its mean, so that chunks have
    alike information and P tokens on average.
  """
  size = config.vocab_size
  if config.boundaries == "token_class":
    ends = [_ends(tokenizer, index) for index in range(size)]
    return np.array(ends, np.float32)
  # Every count is raised by one, so that a token that never occurs has a finite
  # cost.
  counts = counts[:size]
  surprise = -np.log((counts + 1) / (counts.sum() + size))
  mean = np.average(surprise, weights=counts)
  costs = np.minimum(surprise / (mean * config.chunk_sizes[0]), 1)
  return costs.astype(np.float32)


def _ends(tokenizer: Tokenizer, index: int) -> bool:
  """Whether a token ends a word, a clause or a line."""
  if index >= tokenizer.vocab_size:
    return False
  text = tokenizer.decode([index])
  return bool(text) and not text[-1].isalnum()
