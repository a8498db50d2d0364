"""Log probabilities of given tokens, without their logits in memory."""

from ops.token_logprob.api import token_logprob as token_logprob
from ops.token_logprob.reference import (
  token_logprob_reference as token_logprob_reference,
)
