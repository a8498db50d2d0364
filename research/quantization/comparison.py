"""Recipes beside each other: quality against bytes of weights.

Every recipe is judged by the same held-out text, once as a whole and once
decoded token by token with the state that the recipe keeps, and along texts
that the float model draws. Intervals are paired with the float model.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from models import language_model
from models.errors import InputError
from models.tokenizer import Tokenizer
from research.core import intervals
from research.cost import sizes
from research.evaluation import judging, scoring
from research.quantization import apply, llama_cpp, quality
from research.quantization.recipes import LLAMA_CPP, RECIPES

FLOAT = "float"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What every recipe is judged by.

  Attributes:
    text: held out, scored in windows.
    batches: (N, B, T) tokens of the text to calibrate on.
    rows: that are decoded together, spread over the held-out text.
    tokens: of each.
    at: positions of drawn texts at which KL is told.
    prompt: tokens of the held-out text in front of them.
    seed: of draws.
    batch_tokens: that one call reads when windows are scored.
  """

  text: judging.Text
  batches: np.ndarray
  rows: int = 16
  tokens: int = 1024
  at: tuple[int, ...] = (16, 256, 1024)
  prompt: int = 16
  seed: int = 0
  batch_tokens: int = 16384


def names_for(config: language_model.Config) -> list[str]:
  """All recipes and baselines that a model can take."""
  mixes = language_model.layers_may_differ(config)
  names = [n for n, one in RECIPES.items() if mixes or not one.float_share]
  return [*names, *LLAMA_CPP]


class Comparison:
  """The float model, and what it says of the plan's texts.

  Args:
    name: of the model.
    model: config and parameters, arrays.
    tokenizer: of the model.
    plan: what to judge by.
    say: told about a line now and then.
  """

  def __init__(
    self,
    name: str,
    model: quality.Model,
    tokenizer: Tokenizer,
    plan: Plan,
    say: Callable[[str], None],
  ):
    self._name, self._model, self._plan = name, model, plan
    self._tokenizer, self._say = tokenizer, say
    self._bytes = sizes.weight_bytes(*model)
    self._held_out = self._decoded_rows()
    self._drawn = self._draw(model)
    self._windows = self._judge(model)

  def rows(self, names: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """Rows of a result file: the float model's, and each recipe's in turn.

    Args:
      names: of recipes, and of `LLAMA_CPP`.
      workers: recipes at a time, each in a thread with a model of its own: most
        of the time goes to compiling.
    """
    yield from self._rows(FLOAT, FLOAT, "no rounding", self._model, self._bytes)
    with futures.ThreadPoolExecutor(workers) as pool:
      for rows in pool.map(self._recipe, names):
        yield from rows

  def _recipe(self, name: str) -> list[dict[str, Any]]:
    config, params = self._model
    if name in LLAMA_CPP:
      params, size = llama_cpp.round_trip(config, params, name)
      idea, text = "llama.cpp", "weights as llama.cpp keeps them"
    else:
      recipe = RECIPES[name]
      batches = self._plan.batches if recipe.is_static else None
      config, params = apply.quantize(config, params, recipe, batches)
      idea, text = recipe.method, recipe.text
      size = sizes.weight_bytes(config, params)
    return list(self._rows(name, idea, text, (config, params), size))

  def _rows(self, method, idea, text, model, size) -> Iterator[dict[str, Any]]:
    common = {
      "system": self._model[0].family,
      "model": self._name,
      "data": self._plan.text.data,
      "method": method,
      "idea": idea,
      "what": text,
      "budget": size / self._bytes,
      "bytes": size,
      "seeds": 1,
    }
    found = self._measures(method, model)
    for metric, (value, low, high) in found.items():
      row = {"metric": metric, "value": value, "low": low, "high": high}
      yield common | row
    ratio = found["decoding_ratio"].value
    self._say(
      f"{method}: {size / 1e6:,.1f} MB, perplexity"
      f" {found['perplexity'].value:.3f}, decoding x {ratio:.4f}"
    )

  def _measures(self, method, model) -> dict[str, intervals.Interval]:
    windows = self._windows if method == FLOAT else self._judge(model)
    tokens = np.asarray(windows["tokens"], np.float64)
    nll, before = np.asarray(windows["nll"]), np.asarray(self._windows["nll"])
    exp = lambda found: intervals.Interval(*map(math.exp, found))
    both = np.concatenate([self._held_out, self._drawn])
    both = quality.along(self._model, model, both)
    rows = len(self._held_out)
    along = {name: values[:rows] for name, values in both.items()}
    drawn = {name: values[rows:] for name, values in both.items()}
    change = along["second"] - along["first"]
    found = {
      "perplexity": exp(intervals.ratio(nll, tokens)),
      "ratio": exp(intervals.paired_mean((nll - before) / tokens, tokens)),
      "decoding_perplexity": exp(
        intervals.paired_mean(along["second"].mean(axis=1))
      ),
      "decoding_ratio": exp(intervals.paired_mean(change.mean(axis=1))),
    }
    for token in self._plan.at:
      kl = quality.near(drawn, self._plan.prompt + token - 1)
      found[f"kl_{token}"] = intervals.paired_mean(kl)
    own = quality.repetition(self._draw(model))
    found["repetition"] = intervals.paired_mean(own)
    return found

  def _draw(self, model) -> np.ndarray:
    """What a model goes on with behind the beginnings of the rows."""
    prompts = self._held_out[:, : self._plan.prompt]
    count = self._held_out.shape[1] - self._plan.prompt
    return quality.continuation(
      model, prompts, tokens=count, seed=self._plan.seed
    )

  def _judge(self, model) -> dict[str, Any]:
    """Negative log-likelihood and tokens of each window."""
    config, params = model
    scorer = scoring.Scorer(
      config,
      params,
      self._tokenizer,
      max_length=self._plan.text.window,
      batch_tokens=self._plan.batch_tokens,
    )
    silent = lambda _: lambda _: None
    return judging.judge_text(scorer, self._plan.text, advance=silent)[1]

  def _decoded_rows(self) -> np.ndarray:
    """Rows of the held-out text, spread evenly over it.

    As long as the drawn ones, so that one program does for both.
    """
    plan, tokenizer = self._plan, self._tokenizer
    tokens = tokenizer.encode(plan.text.text)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    size = max(plan.tokens + 1, plan.prompt + max(plan.at))
    body = size - len(begin)
    fit = len(tokens) // body
    if fit < plan.rows:
      raise InputError(
        f"the held-out text has {len(tokens):,} tokens, and {plan.rows} rows of"
        f" {plan.tokens:,} are decoded: give a longer one"
      )
    starts = [i * fit // plan.rows * body for i in range(plan.rows)]
    rows = [[*begin, *tokens[start : start + body]] for start in starts]
    return np.asarray(rows, np.int32)
