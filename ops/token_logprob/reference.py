"""The specification of `token_logprob`."""

import numpy as np


def token_logprob_reference(
  hidden: np.ndarray,
  weight: np.ndarray,
  targets: np.ndarray,
  *,
  logit_scale: float = 1.0,
  valid_vocab: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The specification in float64, one token at a time; with normalizers.

  Arrays are as in `token_logprob`.
  """
  hidden = np.asarray(hidden, np.float64)
  weight = np.asarray(weight, np.float64)[:valid_vocab]
  logprob, normalizer = np.zeros(targets.shape), np.zeros(targets.shape)
  for token in np.ndindex(*targets.shape):
    if targets[token] < 0:
      continue
    logits = logit_scale * (weight @ hidden[token])
    highest = logits.max()
    normalizer[token] = highest + np.log(np.sum(np.exp(logits - highest)))
    logprob[token] = logits[targets[token]] - normalizer[token]
  return logprob, normalizer
