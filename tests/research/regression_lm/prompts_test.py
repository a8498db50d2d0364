import dataclasses

import jax
import numpy as np
import pytest

from models.errors import InputError
from models.numbers import Ieee
from research.core import mesh as mesh_lib
from research.predictors.data_options import DataOptions
from research.regression_lm import (
  Example,
  Prompt,
  RegressionLM,
  prompts,
  sources,
  training,
)
from research.regression_lm.options import Options
from research.text import tokenizing

BYTES = tokenizing.of_bytes()
KNOWN = [
  Example("alpha=1", 0.125),
  Example("beta=2", [3.0, None]),
  Example("alpha=12", "NAN"),
]


def make(**changes):
  options = {"size": "tiny", "numbers": Ieee(mantissa_digits=2)}
  return RegressionLM.from_scratch(**(options | changes))


def test_lines_say_all_numbers():
  assert [prompts.line(example) for example in KNOWN] == [
    "alpha=1 => 0.125\n",
    "beta=2 => 3, ?\n",
    "alpha=12 => NAN\n",
  ]
  assert prompts.line(Example("x", np.float32(1 / 3))) == "x => 0.333333\n"
  assert prompts.line(Example("x", -12345678.0)) == "x => -1.23457e+07\n"


def test_the_nearest_stands_last():
  found = prompts.texts(
    Prompt(examples=KNOWN, shots=2), ["alpha=123", "beta=4"], BYTES, 200
  )
  assert found[0] == "alpha=1 => 0.125\nalpha=12 => NAN\nalpha=123"
  assert found[1].endswith("beta=2 => 3, ?\nbeta=4")


def test_random_ones_differ_from_text_to_text_and_repeat():
  given = [Example(f"x={i}", i) for i in range(20)]
  prompt = Prompt(examples=given, shots=3, choose="random", seed=1)
  found = prompts.texts(prompt, ["q"] * 5, BYTES, 500)
  assert len(set(found)) == 5
  assert all(text.count(" => ") == 3 and text.endswith("\nq") for text in found)
  assert found == prompts.texts(prompt, ["q"] * 5, BYTES, 500)
  other = dataclasses.replace(prompt, seed=2)
  assert found != prompts.texts(other, ["q"] * 5, BYTES, 500)


def test_what_does_not_fit_is_left_out_and_told():
  # Of 17 and 16 bytes, in front of 9.
  prompt = Prompt(examples=KNOWN, shots=2)
  with pytest.warns(UserWarning, match="1 of 2 prompts lose examples"):
    found = prompts.texts(prompt, ["alpha=123", "a"], BYTES, 9 + 16 + 16)
  assert found[0] == "alpha=12 => NAN\nalpha=123"
  assert found[1].count(" => ") == 2
  with pytest.warns(UserWarning, match="2 of 2 prompts"):
    found = prompts.texts(prompt, ["alpha=123", "abcdefgh"], BYTES, 10)
  assert found == ["alpha=123", "abcdefgh"]
  assert prompts.texts(prompt, ["alpha=123"], BYTES, 9 + 17 + 16)[0].count(">")


def test_predictions_are_those_of_the_longer_texts():
  lm = make()
  asked = ["alpha=123", "beta=4"]
  texts = lm.prompted(asked, KNOWN)
  assert all(text.count(" => ") == 3 for text in texts)
  draws = lm.sample(asked, 8, prompt=KNOWN)
  np.testing.assert_array_equal(draws, lm.sample(texts, 8))
  found = lm.predict(asked, 8, prompt=Prompt(examples=KNOWN, shots=3))
  np.testing.assert_array_equal(found.samples, draws)
  assert (draws != lm.sample(asked, 8)).any()


def test_training_sees_others_of_the_task_and_never_itself():
  given = [
    Example(f"{task}{i}", 10 * i + (task == "b"), task)
    for task in "ab"
    for i in range(5)
  ]
  lm = make(max_length=200)
  data, valid = lm.datasets(given[:8], given[8:], 3)
  counts = set()
  for step in range(8):
    batch = data.batch_at(step, 4, seed=0)
    again = data.batch_at(step, 4, seed=0)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    for tokens, length, target in zip(
      batch["tokens"], batch["lengths"], batch["targets"]
    ):
      *lines, text = bytes(tokens[:length].tolist()).decode().split("\n")
      number = 10 * int(text[1]) + (text[0] == "b")
      assert lm.model.codec.values(target[None])[0, 0] == number
      counts.add(len(lines))
      assert len(set(lines)) == len(lines) <= 3
      for other in lines:
        x, y = other.split(" => ")
        assert x[0] == text[0] and x != text
        assert int(y) == 10 * int(x[1]) + (x[0] == "b")
  assert counts == {0, 1, 2, 3}
  # Of validation all have three, of both parts.
  tokens, lengths = valid.texts.rows(np.arange(2))
  for row, length in zip(tokens, lengths):
    assert bytes(row[:length].tolist()).decode().count("b") == 4
  plain, _ = lm.datasets(given[:8], None)
  assert type(plain) is not type(data)


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda: Prompt(examples=KNOWN, choose="best"), "choose='best'"),
    (lambda: Prompt(examples=KNOWN, shots=0), "shots=0"),
    (lambda: Prompt(examples=[]), "a prompt has no example"),
    (lambda: prompts.texts([Example("a", [])], [3], BYTES, 9), "is a int"),
    (
      lambda: prompts.texts([Example("a", object())], ["a"], BYTES, 99),
      "give a number",
    ),
    (
      lambda: make().fine_tune(KNOWN[:1], prompt_shots=-1),
      "prompt_shots=-1 is no count",
    ),
    (
      lambda: sources.open_source(
        DataOptions(kind="density", prompt_shots=2), None
      ),
      "--prompt_shots",
    ),
  ],
)
def test_mistakes_are_one_line(call, words):
  with pytest.raises(InputError, match=words) as caught:
    call()
  assert "\n" not in str(caught.value)


def test_a_run_trains_with_prompts_of_the_group(tmp_path):
  lines = ["task,a,y"]
  lines += [f"{t},{a},{a + 2 * t}" for t in range(6) for a in range(6)]
  (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
  data = DataOptions(kind="csv", targets=("y",), group="task", prompt_shots=2)
  source = sources.open_source(data, tmp_path / "data.csv")
  lm = training.train(
    training.Run(
      options=Options(size="tiny", steps=4, batch=8, eval_every=2),
      source=source,
      workdir=tmp_path / "run",
      mesh=mesh_lib.data_mesh(1),
      progress=False,
    ),
    lambda line: None,
  )
  assert lm.info["data"]["prompt_shots"] == 2
  questions = source.questions(lm)
  assert len(questions) == len(source.parts.test)
  assert {text.count(" => ") for text in questions} <= {1, 2}
  plain = dataclasses.replace(data, prompt_shots=0)
  source = sources.open_source(plain, tmp_path / "data.csv")
  assert not any(" => " in text for text in source.questions(lm))


def test_a_model_trained_with_prompts_knows_more_than_any_without():
  """y = a x + b, with a and b of each task: no text but a prompt tells them."""
  slopes, offsets, xs = range(1, 5), range(0, 60, 10), range(8)

  def family(tasks, seed):
    rng = np.random.default_rng(seed)
    return [
      Example(f"{x}", float(a * x + b), task=f"{seed}-{task}")
      for task in range(tasks)
      for a, b in [(rng.choice(slopes), rng.choice(offsets))]
      for x in rng.permutation(xs)[:6]
    ]

  lm = RegressionLM.from_scratch(
    size="tiny",
    encoder_layers=2,
    d_model=32,
    d_ff=64,
    num_heads=4,
    num_kv_heads=4,
    numbers=Ieee(mantissa_digits=2),
    max_length=40,
  )
  lm.fine_tune(
    family(300, 0),
    prompt_shots=3,
    max_epochs=6,
    batch=32,
    learning_rate=6e-3,
  )
  test = family(60, 1)
  told = [
    Example(
      lm.prompted(
        [e.x], [o for o in test if o.task == e.task and o is not e][:3]
      )[0],
      e.y,
    )
    for e in test
  ]
  # What is left to guess of y by one who knows x and the family alone.
  entropy = 0.0
  for x in xs:
    values = [a * x + b for a in slopes for b in offsets]
    counts = np.unique(values, return_counts=True)[1] / len(values)
    entropy -= (counts * np.log(counts)).sum() / len(xs)
  prompted, plain = (-lm.log_prob(given).mean() for given in (told, test))
  assert prompted < entropy - 0.5 < plain
