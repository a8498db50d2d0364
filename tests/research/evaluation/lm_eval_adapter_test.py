"""Against a module with the interface of lm_eval 0.4, in place of it."""

import abc
import dataclasses
import sys
import types
from typing import Any

import pytest

from models.convert import load
from models.errors import InputError
from models.tokenizer import load_tokenizer
from research.decoding.text import Generator, TextOptions
from research.evaluation import lm_eval_adapter, scoring

STEM = "Once upon a time, there was a little girl named"


class LM(abc.ABC):
  """What `lm_eval.api.model.LM` asks of its subclasses, and brings along."""

  def __init__(self):
    self._rank, self._world_size = 0, 1

  rank = property(lambda self: self._rank)

  @abc.abstractmethod
  def loglikelihood(self, requests): ...

  @abc.abstractmethod
  def loglikelihood_rolling(self, requests): ...

  @abc.abstractmethod
  def generate_until(self, requests): ...

  @property
  def tokenizer_name(self):
    raise NotImplementedError

  def apply_chat_template(self, chat_history, add_generation_prompt=True):
    raise NotImplementedError


@dataclasses.dataclass
class Instance:
  request_type: str
  arguments: tuple[Any, ...]

  @property
  def args(self):
    return self.arguments


@pytest.fixture
def lm_eval(monkeypatch):
  for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  sys.modules["lm_eval.api.model"].LM = LM


@pytest.fixture(scope="module")
def parts():
  tiny = load("tiny")
  model = (tiny.config, tiny.params, load_tokenizer(tiny))
  scorer = scoring.Scorer(*model, max_length=48, batch_tokens=96)
  return scorer, Generator(*model)


@pytest.fixture
def model(lm_eval, parts):
  return lm_eval_adapter.wrap(*parts)


def ask(model, kind, *arguments):
  return getattr(model, kind)([Instance(kind, given) for given in arguments])


def test_it_is_a_model_of_the_harness(model):
  assert isinstance(model, LM) and model.rank == 0
  assert model.tokenizer_name.endswith("-512")
  assert model.chat_template(True) == "chatml"
  assert model.chat_template() == ""
  with pytest.raises(InputError, match="im_start"):
    model.apply_chat_template([{"role": "user", "content": "a"}])


def test_loglikelihoods_are_those_of_the_scorer(model, parts):
  pairs = [(STEM, " Lily"), (STEM, " Ben"), ("", "Once"), ("a", "")]
  found = ask(model, "loglikelihood", *pairs)
  rows = [parts[0].encode_pair(*pair) for pair in pairs]
  for (total, greedy), score in zip(found, parts[0].score(rows), strict=True):
    assert total == pytest.approx(score.total)
    assert greedy is bool(score.greedy.all())
  assert [greedy for _, greedy in found] == [True, False, found[2][1], True]
  assert found[3][0] == 0.0


def test_rolling_scores_every_token_of_each_text(model, parts):
  long = "Lily had a red ball and a cat. " * 6
  found = ask(model, "loglikelihood_rolling", ("One day.",), (long,), ("",))
  whole = ask(model, "loglikelihood", ("", "One day."))[0][0]
  assert found[0] == pytest.approx(whole, abs=1e-4)
  rows = parts[0].encode_whole(long)
  assert len(rows) > 1
  totals = [score.total for score in parts[0].score(rows)]
  assert found[1] == pytest.approx(sum(totals), abs=1e-3)
  assert found[2] == 0.0


def test_texts_end_before_until(model, parts):
  greedy = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
  drawn = {"until": "\n", "max_gen_toks": 12, "temperature": 1.0}
  found = ask(
    model,
    "generate_until",
    (STEM, greedy | {"temperature": 0.7}),
    ("One day", drawn),
    ("Tom", greedy),
  )
  prompts = [parts[1].encode(context) for context in (STEM, "Tom")]
  options = TextOptions(max_tokens=12, stop=(".",), steps=8)
  expected = [one.text for one in parts[1](prompts, options)]
  assert [found[0], found[2]] == expected
  assert found[1] and "\n" not in found[1]


@pytest.mark.parametrize(
  "given, max_tokens, stop, temperature",
  [
    ({}, 256, (), 0.0),
    ({"until": "a", "max_tokens": 9, "max_gen_toks": 7}, 7, ("a",), 0.0),
    ({"until": ["a", "b"], "temperature": 0.5}, 256, ("a", "b"), 0.5),
    ({"max_new_tokens": 3, "temperature": 1, "do_sample": False}, 3, (), 0.0),
  ],
)
def test_options_are_read_as_the_harness_means_them(
  given, max_tokens, stop, temperature
):
  found = lm_eval_adapter._options(given)
  assert (found.max_tokens, found.stop) == (max_tokens, stop)
  assert found.sampling.temperature == temperature


def test_without_the_harness_one_line_says_so(parts, monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  monkeypatch.delitem(sys.modules, "lm_eval.api.model", raising=False)
  with pytest.raises(InputError, match="pip install lm_eval"):
    lm_eval_adapter.wrap(*parts)
