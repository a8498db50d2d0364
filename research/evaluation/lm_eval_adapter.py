"""Lets lm-evaluation-harness judge a model of the house, where it is installed.

import lm_eval
from research.decoding import text
from research.evaluation import lm_eval_adapter, scoring

scorer = scoring.Scorer(config, params, tokenizer, max_length=2048,
                        batch_tokens=16384)
generator = text.Generator(config, params, tokenizer)
model = lm_eval_adapter.wrap(scorer, generator)
lm_eval.simple_evaluate(model, tasks=["hellaswag"])
"""

import hashlib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from models import chat
from models.errors import InputError
from research.core.progress import counter
from research.decoding.sampling import Sampling
from research.decoding.text import Generator, TextOptions, generate_all
from research.evaluation.scoring import Scorer

# In the order in which the harness prefers them.
_MAX_TOKENS = (
  "max_gen_toks",
  "max_new_tokens",
  "max_tokens",
  "max_completion_tokens",
)


class Request(Protocol):
  """The harness' `Instance`, as far as it is used here."""

  args: tuple[Any, ...]


class Adapter:
  """Answers the three kinds of requests of lm-evaluation-harness 0.4."""

  def __init__(self, scorer: Scorer, generator: Generator):
    """Keeps both; they are of one model."""
    super().__init__()
    self.scorer = scorer
    self.generator = generator

  def loglikelihood(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """For each (context, continuation): its log-likelihood; is it greedy."""
    rows = [self.scorer.encode_pair(*request.args) for request in requests]
    advance = counter("loglikelihood", len(rows), not disable_tqdm)
    scores = self.scorer.score(rows, advance)
    return [(score.total, bool(score.greedy.all())) for score in scores]

  def loglikelihood_rolling(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[float]:
    """For each (text,): its log-likelihood; see `scoring.rolling`."""
    parts = [self.scorer.encode_whole(request.args[0]) for request in requests]
    rows = [row for rows in parts for row in rows]
    advance = counter("loglikelihood_rolling", len(rows), not disable_tqdm)
    scores = iter(self.scorer.score(rows, advance))
    return [sum((next(scores).total for _ in rows), 0.0) for rows in parts]

  def generate_until(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[str]:
    """For each (context, options): the text up to a stop string."""
    advance = counter("generate_until", len(requests), not disable_tqdm)
    groups: dict[TextOptions, list[int]] = {}
    for index, request in enumerate(requests):
      groups.setdefault(_options(request.args[1]), []).append(index)
    texts = [""] * len(requests)
    for options, indices in groups.items():
      found = generate_all(
        self.generator,
        [requests[index].args[0] for index in indices],
        options,
        max_length=self.scorer.max_length,
        batch_tokens=self.scorer.batch_tokens,
        advance=advance,
      )
      for index, text in zip(indices, found, strict=True):
        texts[index] = text
    return texts

  @property
  def tokenizer_name(self) -> str:
    """Tells caches of requests apart: by the form of chats, and the size."""
    form = self.chat_template(True)
    form = hashlib.sha256(form.encode()).hexdigest()[:8]
    return f"{form}-{self.scorer.tokenizer.vocab_size}"

  def chat_template(self, chat_template: bool | str = False) -> str:
    """The model's template of chats, for the harness' log; or "chatml"."""
    own = self.scorer.tokenizer.chat_template or "chatml"
    return own if chat_template else ""

  def apply_chat_template(
    self,
    chat_history: Iterable[Mapping[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """A chat as text; see `models.chat.write`."""
    (text,) = chat.write(
      self.scorer.tokenizer,
      [list(chat_history)],
      begin_answer=add_generation_prompt,
    )
    return text


def wrap(scorer: Scorer, generator: Generator) -> Any:
  """The adapter as an `lm_eval.api.model.LM`, which `simple_evaluate` takes.

  Raises:
    InputError: lm-evaluation-harness is not installed.
  """
  try:
    base = importlib.import_module("lm_eval.api.model").LM
  except ImportError as error:
    raise InputError(
      "lm-evaluation-harness is not installed: run `pip install lm_eval`"
    ) from error
  return type("FrugaxLM", (Adapter, base), {})(scorer, generator)


def _options(given: Mapping[str, Any]) -> TextOptions:
  """Options of a generation as the harness' own models understand them."""
  until = given.get("until") or []
  temperature = float(given.get("temperature") or 0.0)
  if given.get("do_sample") is False:
    temperature = 0.0
  lengths = [given[name] for name in _MAX_TOKENS if given.get(name) is not None]
  return TextOptions(
    max_tokens=int(lengths[0]) if lengths else 256,
    stop=(until,) if isinstance(until, str) else tuple(until),
    sampling=Sampling(
      temperature=temperature,
      top_k=int(given.get("top_k") or 0),
      top_p=float(given.get("top_p") or 1.0),
    ),
    steps=8,
  )
