import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import language_model
from models.convert import load
from models.errors import InputError
from models.tokenizer import load_tokenizer
from research.decoding.text import Generator
from research.evaluation import judging, scoring, tasks
from research.evaluation.tasks import Item, Task

STORY = (
  "Once upon a time there was a little girl named Lily. She loved to play "
  "outside with her mom and a big red ball. One day they went to the park."
)
STEM = "Once upon a time, there was a little girl named"


@pytest.fixture(scope="module")
def tiny():
  return load("tiny")


@pytest.fixture(scope="module")
def scorer(tiny):
  tokenizer = load_tokenizer(tiny)
  return scoring.Scorer(
    tiny.config, tiny.params, tokenizer, max_length=64, batch_tokens=128
  )


@pytest.fixture(scope="module")
def generator(tiny):
  return Generator(tiny.config, tiny.params, load_tokenizer(tiny))


class Counts(list):
  """Stands in for progress: totals, and what came of them."""

  def __call__(self, total):
    self.append([total, 0])
    return self.advance

  def advance(self, more):
    self[-1][1] += more


def task(kind, items, **more):
  return Task(
    name="x", kind=kind, data="x.json", shots=0, items=tuple(items), **more
  )


def test_perplexity_is_that_of_the_definition(tiny, scorer):
  counts = Counts()
  text = tasks.Text(data="x", text=STORY * 3, window=32, overlap=4)
  found, items = judging.judge_text(scorer, text, advance=counts)
  ids = scorer.tokenizer.encode(STORY * 3)
  nll, done = [], 0
  forward = jax.jit(language_model.forward, static_argnums=0)
  while done < len(ids):
    end = min(max(0, done - 4) + 31, len(ids))
    row = np.concatenate([[1], ids[end - 31 : end]]).astype(np.int32)
    logits = forward(tiny.config, tiny.params, jnp.asarray(row)[None])[0]
    logits = np.asarray(logits, np.float64)
    total = np.log(np.exp(logits).sum(-1))
    first = 32 - (end - done)
    nll.append(
      sum(total[t - 1] - logits[t - 1, row[t]] for t in range(first, 32))
    )
    done = end
  perplexity, bits = found
  assert perplexity.value == pytest.approx(
    math.exp(sum(nll) / len(ids)), rel=1e-4
  )
  assert bits.metric == "bits_per_byte"
  assert bits.value == pytest.approx(
    sum(nll) / math.log(2) / len((STORY * 3).encode()), rel=1e-4
  )
  np.testing.assert_allclose(items["nll"], nll, rtol=1e-4)
  assert sum(items["tokens"]) == len(ids)
  assert counts == [[len(nll), len(nll)]]
  some = tasks.Text(
    data="x", text=STORY * 3, window=32, overlap=4, max_windows=2
  )
  _, items = judging.judge_text(scorer, some, advance=counts)
  np.testing.assert_allclose(
    items["nll"], [nll[0], nll[len(nll) // 2]], rtol=1e-4
  )


@pytest.mark.parametrize(
  "change, match",
  [({"text": ""}, "0 tokens"), ({"window": 4, "overlap": 3}, "--overlap=3")],
)
def test_texts_that_cannot_be_scored_are_named(scorer, change, match):
  options = {"data": "x", "text": STORY, "window": 8} | change
  with pytest.raises(InputError, match=match):
    judging.judge_text(scorer, tasks.Text(**options), advance=Counts())


def test_choices_are_judged_by_likelihood_and_by_bytes(scorer, generator):
  items = [
    Item(context=STEM, choices=(" Lily", " qzx", " Vvvvv"), answer=0),
    Item(context=STEM, choices=(" qzx", " Lily"), answer=0),
    # Likely words, but many of them: each of its bytes is cheap.
    Item(
      context=STEM,
      choices=(" Ben", " Lily. She loved to play outside with her mom."),
      answer=1,
    ),
  ]
  counts = Counts()
  found, values = judging.judge_task(
    scorer, generator, task(tasks.CHOICE, items), advance=counts
  )
  assert values == {"acc": [1.0, 0.0, 0.0], "acc_norm": [1.0, 0.0, 1.0]}
  assert [one.metric for one in found] == ["acc", "acc_norm"]
  assert found[0].value == pytest.approx(1 / 3)
  assert counts == [[7, 7]]


def test_contexts_are_judged_by_one_continuation(scorer, generator):
  """The likelier beginning is the answer; by bytes it is the same."""
  contexts = (STEM.replace("girl", "qzx"), STEM)
  items = [
    Item(context="", contexts=contexts, choices=(" Lily",) * 2, answer=answer)
    for answer in (1, 0)
  ]
  found, values = judging.judge_task(
    scorer, generator, task(tasks.CHOICE, items), advance=Counts()
  )
  assert values == {"acc": [1.0, 0.0]}
  assert [one.metric for one in found] == ["acc"]


def test_a_cloze_is_judged_by_its_likeliest_tokens(scorer, generator):
  items = [
    Item(context=STEM, choices=(" Lily",)),
    Item(context=STEM, choices=(" Ben",)),
  ]
  found, values = judging.judge_task(
    scorer, generator, task(tasks.CLOZE, items), advance=Counts()
  )
  assert values["acc"] == [1.0, 0.0]
  rows = [scorer.encode_pair(STEM, name) for name in (" Lily", " Ben")]
  totals = [score.total for score in scorer.score(rows)]
  assert found[1].metric == "perplexity"
  assert found[1].value == pytest.approx(math.exp(-np.mean(totals)))


def test_generations_are_judged_by_their_number(scorer, generator, monkeypatch):
  texts = iter(["It is\n#### 7", "It is 7", "no"])
  monkeypatch.setattr(judging, "generate_all", lambda *_, **__: list(texts))
  items = [Item(context="Q", choices=(" Yes.\n#### 7",))] * 3
  found, values = judging.judge_task(
    scorer, generator, task(tasks.GENERATION, items), advance=Counts()
  )
  assert values["exact_match_strict"].tolist() == [1.0, 0.0, 0.0]
  assert values["exact_match_flexible"].tolist() == [1.0, 1.0, 0.0]
  assert values["text"][2] == "no" and len(found) == 2


def test_rows_have_what_result_files_need(scorer, generator):
  items = [Item(context=STEM, choices=(" Lily", " Ben"), answer=0)]
  rows, _ = judging.judge(
    scorer,
    generator,
    task(tasks.CHOICE, items),
    common={"model": "tiny", "task": "x"},
    advance=Counts(),
  )
  assert rows[0] | {"low": 0, "high": 0} == {
    "model": "tiny", "task": "x", "data": "x.json", "shots": 0,
    "metric": "acc", "value": 1.0, "stderr": None, "low": 0, "high": 0,
    "items": 1,
  }  # fmt: skip


def test_finished_tasks_are_kept(tmp_path):
  calls = []

  def judge():
    calls.append(1)
    return [{"value": 1.0}], {"acc": np.ones(2)}

  assert judging.kept(None, "x", judge) == ([{"value": 1.0}], False)
  for before in (False, True, True):
    assert judging.kept(tmp_path, "x", judge) == ([{"value": 1.0}], before)
  assert len(calls) == 2
  path = tmp_path / "x.json"
  assert json.loads(path.read_text())["items"] == {"acc": [1.0, 1.0]}
  path.write_text("{")
  with pytest.raises(InputError, match="x.json: is damaged"):
    judging.kept(tmp_path, "x", judge)
