import json
import math

import jax
import numpy as np
import pytest

from models.errors import InputError
from models.numbers import P10, Ieee
from research.regression_lm import Example, RegressionLM

# Draws a text: another number would be another program to compile.
DRAWS = 50
TEXTS = [f"{name} width={n}" for name in ("conv", "dense") for n in range(1, 9)]
EXAMPLES = [
  Example(x=text, y=[float(i % 8 + 1), None if i % 5 == 0 else -0.5])
  for i, text in enumerate(TEXTS)
]


def make(**changes):
  options = {
    "size": "tiny",
    "numbers": Ieee(mantissa_digits=1),
    "num_objectives": 2,
    "max_length": 32,
  }
  return RegressionLM.from_scratch(**(options | changes))


@pytest.fixture(scope="module")
def tuned():
  lm = make()
  before = lm.log_prob(EXAMPLES).sum()
  history = lm.fine_tune(
    EXAMPLES,
    EXAMPLES[::3],
    max_epochs=12,
    patience=12,
    batch=8,
    learning_rate=0.02,
  )
  return lm, before, history


def test_fine_tuning_learns_and_keeps_the_best_epoch(tuned):
  lm, before, history = tuned
  assert lm.log_prob(EXAMPLES).sum() > before + 30
  assert len(history.valid_loss) == 1 + len(history.train_loss) == 13
  best = min(history.valid_loss)
  assert history.valid_loss[history.best_epoch] == best
  # Those of the best epoch are what is left, not those of the last.
  parts = lm.log_prob(EXAMPLES[::3])
  tokens = lm.model.codec.format.length * (1 + (parts[:, 1] != 0))
  assert -(parts.sum(1) / tokens).mean() == pytest.approx(best, rel=1e-4)


def test_predictions_are_of_the_draws(tuned):
  lm, *_ = tuned
  found = lm.predict(TEXTS[:3], DRAWS, level=0.8, seed=3)
  draws = lm.sample(TEXTS[:3], DRAWS, seed=3)
  np.testing.assert_array_equal(found.samples, draws)
  assert draws.shape == (3, DRAWS, 2) and draws.dtype == np.float64
  assert (found.low <= found.median).all() and (
    found.median <= found.high
  ).all()
  np.testing.assert_array_equal(found.median, np.median(draws, axis=1))
  assert (np.abs(found.median[:, 1] + 0.5) < 0.2).all()


def test_draws_depend_on_place_and_seed_not_on_the_batch(tuned):
  lm, *_ = tuned
  whole = lm.sample(TEXTS[:5], DRAWS)
  np.testing.assert_array_equal(whole[:3], lm.sample(TEXTS[:3], DRAWS))
  longer = [*TEXTS[:3], "a much longer text than others"]
  np.testing.assert_array_equal(whole[:3], lm.sample(longer, DRAWS)[:3])
  assert (whole != lm.sample(TEXTS[:5], DRAWS, seed=1)).any()
  np.testing.assert_array_equal(lm.sample(EXAMPLES[:3], DRAWS), whole[:3])


def test_probabilities_and_densities(tuned):
  lm, *_ = tuned
  parts = lm.log_prob(EXAMPLES[:6])
  assert parts.shape == (6, 2)
  assert (parts[[0, 5], 1] == 0).all() and (parts[1:5] < 0).all()
  codec = lm.model.codec
  density = lm.log_prob(EXAMPLES[:6], density=True)
  widths = codec.widths(codec.encode([e.y for e in EXAMPLES[:6]]))
  np.testing.assert_allclose(density, parts - np.log(widths))
  # One digit in each decade: the masses of all numbers are the whole.
  ones = [
    sign * digit * 10.0**power
    for sign in (1, -1)
    for power in range(-9, 10)
    for digit in range(1, 10)
  ]
  mass = lm.density(TEXTS[0], ones) * [10.0 ** math.floor(
    math.log10(abs(v)) + 1e-9) for v in ones]  # fmt: skip
  zeros = 1 - mass.sum()
  assert -1e-4 < zeros < 0.2


def test_known_objectives_are_kept(tuned):
  lm, *_ = tuned
  draws = lm.sample(TEXTS[:2], 10, given=[[3.0, None], [None, -0.5]])
  assert (draws[0, :, 0] == 3).all() and np.isfinite(draws[0, :, 1]).all()
  assert np.isnan(draws[1, :, 0]).all() and (draws[1, :, 1] == -0.5).all()


def test_a_saved_model_is_the_model(tuned, tmp_path):
  lm, *_ = tuned
  lm.info["note"] = "kept"
  lm.save(tmp_path / "model")
  found = RegressionLM.from_pretrained(tmp_path / "model")
  assert found.model == lm.model and found.info == lm.info
  assert found.max_length == 32 and found.num_params == lm.num_params
  np.testing.assert_array_equal(
    found.sample(TEXTS, DRAWS), lm.sample(TEXTS, DRAWS)
  )
  np.testing.assert_array_equal(found.log_prob(EXAMPLES), lm.log_prob(EXAMPLES))
  with pytest.raises(InputError, match="not overwritten"):
    lm.save(tmp_path / "model")


def test_lora_moves_the_layers_alone_and_learns(tuned):
  lm = make(seed=1)
  start = jax.tree.map(np.asarray, lm.params)
  before = lm.log_prob(EXAMPLES).sum()
  lm.fine_tune(
    EXAMPLES, method="lora", rank=4, max_epochs=8, batch=8, learning_rate=0.03
  )
  assert lm.log_prob(EXAMPLES).sum() > before + 10
  for name in ("embed", "target_embed", "slots", "head", "final_norm"):
    jax.tree.map(np.testing.assert_array_equal, lm.params[name], start[name])


def test_early_stopping_leaves_a_model_that_gets_no_better(tuned):
  """Validation targets that contradict training are never learned."""
  lm = make(seed=2)
  start = jax.tree.map(np.asarray, lm.params)
  wrong = [Example(x=e.x, y=[-9e9, 9e9]) for e in EXAMPLES[:4]]
  epochs = []
  history = lm.fine_tune(
    EXAMPLES,
    wrong,
    max_epochs=50,
    patience=2,
    batch=16,
    learning_rate=0.05,
    on_epoch=lambda *told: epochs.append(told),
  )
  assert len(epochs) == len(history.train_loss) < 50
  kept = history.best_epoch
  assert len(epochs) == kept + 2
  if kept == 0:
    jax.tree.map(np.testing.assert_array_equal, lm.params, start)


def test_expected_values_are_among_what_is_known(tuned):
  lm, *_ = tuned
  found = lm.expected(TEXTS[:6], EXAMPLES, grid=8)
  known = np.array([e.y[0] for e in EXAMPLES])
  assert found.shape == (6, 2)
  assert (found[:, 0] >= known.min()).all()
  assert (found[:, 0] <= known.max()).all()
  np.testing.assert_allclose(found[:, 1], -0.5)
  values = lm.expected(TEXTS[:6], EXAMPLES, grid=8, scale="value")
  # Of one objective all that is known is on the grid: the mean is exact.
  grid = sorted(set(known))
  logprob = np.stack(
    [lm.log_prob([Example(x, v) for v in grid])[:, 0] for x in TEXTS[:6]]
  )
  chances = np.exp(logprob - logprob.max(1, keepdims=True))
  mean = chances @ grid / chances.sum(1)
  np.testing.assert_allclose(values[:, 0], mean, rtol=1e-4)


def test_losses_over_a_grid_train_and_decide_when_to_stop():
  from research.regression_lm.options import LossOptions

  lm = make(num_objectives=1)
  given = [Example(x=e.x, y=e.y[0]) for e in EXAMPLES]
  history = lm.fine_tune(
    given,
    given[::4],
    max_epochs=3,
    batch=8,
    learning_rate=0.02,
    loss=LossOptions(expected_value=3.0, ranking=0.5, z_loss=1e-3),
    select="expected",
    scale="rank",
    grid=8,
  )
  assert history.train_loss[-1] < history.train_loss[0]
  # Squared errors of ranks in [0, 1], and not nats.
  assert 0 < min(history.valid_loss) <= max(history.valid_loss) < 0.5


def test_a_bpe_is_learned_from_the_texts():
  lm = make(tokenizer="bpe", vocab_size=280, texts=EXAMPLES)
  assert 257 <= lm.tokenizer.vocab_size <= 280
  assert len(lm.tokenizer.encode(TEXTS[0])) < len(TEXTS[0])
  assert lm.sample(TEXTS[:1], 2).shape == (1, 2, 2)


def test_a_sentencepiece_is_learned_and_saved(tmp_path):
  lm = make(tokenizer="sentencepiece", vocab_size=300, texts=EXAMPLES)
  assert 259 <= lm.tokenizer.vocab_size <= 300
  assert len(lm.tokenizer.encode("dense width=3")) <= 5
  lm.save(tmp_path / "model")
  found = RegressionLM.from_pretrained(tmp_path / "model")
  np.testing.assert_array_equal(found.sample(TEXTS, 4), lm.sample(TEXTS, 4))


def test_other_formats_of_numbers():
  lm = make(numbers=P10(digits=2, special=True), num_objectives=1)
  given = [Example("a", math.inf), Example("b", "INVALID"), Example("c", 2)]
  assert (lm.log_prob(given) < 0).all()
  assert lm.predict(["a"], 4).samples.shape == (1, 4, 1)


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda lm: lm.sample("one text"), "xs is one text"),
    (lambda lm: lm.sample([""]), "text 0 is empty"),
    (lambda lm: lm.sample([3]), "text 0 is a int"),
    (lambda lm: lm.sample(["a"], 0), "num_samples=0"),
    (lambda lm: lm.sample(["a"], temperature=-1), "temperature=-1"),
    (lambda lm: lm.sample(["a"], top_p=0), "top_p=0"),
    (lambda lm: lm.sample(["a"], given=[1, 2]), "2 known targets for 1 texts"),
    (lambda lm: lm.predict(["a"], level=1), "level=1"),
    (lambda lm: lm.density("a", [math.nan]), "not finite"),
    (lambda lm: lm.log_prob([Example("a")]), "no example has a target"),
    (lambda lm: lm.expected(["a"], [1.0], grid=1), "grid=1"),
    (lambda lm: lm.expected(["a"], [1.0]), "objective 1 has no finite"),
    (lambda lm: lm.fine_tune(EXAMPLES, select="expected"), "needs an expected"),
    (lambda lm: lm.fine_tune([]), "there are no examples"),
    (lambda lm: lm.fine_tune(EXAMPLES, epochs=3), "epochs=3: there is no such"),
    (lambda lm: lm.fine_tune(EXAMPLES, batch=0), "batch=0"),
    (lambda lm: lm.fine_tune(EXAMPLES, method="prompt"), "method='prompt'"),
    (
      lambda lm: lm.fine_tune(EXAMPLES, learning_rate=math.nan),
      "learning_rate=nan",
    ),
    (lambda lm: make(size="giant"), "size 'giant'"),
    (lambda lm: make(tokenizer="bpe"), "learned from texts"),
    (
      lambda lm: make(tokenizer="sentencepiece", texts=["a"], vocab_size=258),
      "vocab_size=258 is not 259",
    ),
    (lambda lm: make(max_length=0), "max_length=0"),
    (lambda lm: make(widht=3), "widht=3: there is no such size"),
    (lambda lm: RegressionLM.from_pretrained("no/such"), "is missing"),
  ],
)
def test_mistakes_are_one_line(tuned, call, words):
  lm, *_ = tuned
  with pytest.raises(InputError, match=words) as caught:
    call(lm)
  assert "\n" not in str(caught.value)


def test_a_rate_that_is_too_high_leaves_the_weights():
  lm = make(seed=3)
  start = lm.params
  options = {"clip_norm": 0.0, "batch": 16, "warmup": 0}
  with pytest.raises(InputError, match="the loss is nan|the loss is inf"):
    lm.fine_tune(EXAMPLES, learning_rate=1e30, max_epochs=3, **options)
  # One update: its loss was finite, what it did is not.
  with pytest.raises(InputError, match="a weight is not finite"):
    lm.fine_tune(
      EXAMPLES, learning_rate=3e38, weight_decay=1e3, max_epochs=1, **options
    )
  assert lm.params is start


def test_the_description_is_json(tuned, tmp_path):
  lm, *_ = tuned
  lm.save(tmp_path / "model")
  described = json.loads((tmp_path / "model/config.json").read_text())
  assert described["numbers"]["kind"] == "ieee"
  assert described["num_objectives"] == 2


def test_arguments_may_be_generators_and_numbers_of_numpy(tuned):
  lm, *_ = tuned
  wanted = lm.sample(TEXTS[:3], DRAWS, seed=4)
  found = lm.sample((t for t in TEXTS[:3]), np.int64(DRAWS), seed=np.int32(4))
  np.testing.assert_array_equal(found, wanted)
  known = lm.expected(iter(TEXTS[:6]), iter(EXAMPLES), grid=np.int64(8))
  assert known.shape == (6, 2)
  assert lm.log_prob(e for e in EXAMPLES[:6]).shape == (6, 2)
  # No seed is another one every time.
  several = [lm.sample(TEXTS, DRAWS, seed=None) for _ in range(2)]
  assert (several[0] != several[1]).any()


def test_nothing_asked_is_nothing_answered(tuned):
  lm, *_ = tuned
  assert lm.sample([], 5).shape == (0, 5, 2)
  assert lm.predict([]).median.shape == (0, 2)
  assert lm.expected([], EXAMPLES).shape == (0, 2)
  assert lm.log_prob([]).shape == (0, 2)
  assert lm.density(TEXTS[0], []).shape == (0,)


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda lm: lm.sample(TEXTS[0]), "xs is one text: give a list"),
    (lambda lm: lm.sample(3), "xs is a int: give a list"),
    (lambda lm: lm.sample(TEXTS, 2.0), "num_samples=2.0 is no positive"),
    (lambda lm: lm.sample(TEXTS, seed="a"), "seed='a' is no count"),
    (lambda lm: lm.sample(TEXTS, temperature="1"), "temperature='1' is no num"),
    (lambda lm: lm.predict(TEXTS, level="a"), "level='a' is not in"),
    (
      lambda lm: lm.fine_tune(EXAMPLES, learning_rate="1e-3"),
      "learning_rate='1e-3' is no number",
    ),
    (lambda lm: lm.fine_tune([]), "no examples"),
    (
      lambda lm: lm.fine_tune(EXAMPLES, batch=True),
      "batch=True is no",
    ),
  ],
)
def test_wrong_arguments_are_one_line(tuned, call, words):
  with pytest.raises(InputError, match=words) as caught:
    call(tuned[0])
  assert "\n" not in str(caught.value)


def test_draws_stay_within_what_is_plausible(tuned, tmp_path):
  lm, *_ = tuned
  texts = ["never seen", "?", *TEXTS]
  free = lm.sample(texts, 400, temperature=3.0, plausible=False)
  cut = lm.sample(texts, 400, temperature=3.0)
  limits = np.array(lm.info["range"], float)
  assert (free < limits[:, 0]).any() or (free > limits[:, 1]).any()
  assert (cut >= limits[:, 0]).all() and (cut <= limits[:, 1]).all()
  inside = ((free >= limits[:, 0]) & (free <= limits[:, 1])).all(-1)
  np.testing.assert_array_equal(cut[inside], free[inside])
  lm.save(tmp_path / "ranged")
  again = RegressionLM.from_pretrained(tmp_path / "ranged")
  np.testing.assert_array_equal(again.sample(texts, 400, temperature=3.0), cut)


def test_calibrated_intervals_are_kept(tuned, tmp_path):
  lm, *_ = tuned
  lm = RegressionLM(lm.model, lm.params, lm.tokenizer, 32, lm.info)
  plain = lm.predict(TEXTS, DRAWS, level=0.8)
  held_out = [Example(t, [100.0, -0.5]) for t in TEXTS]
  lm.calibrate(held_out, DRAWS, level=0.8)
  found = lm.predict(TEXTS, DRAWS, level=0.8)
  # The draws stay; the interval of the first reaches what it missed.
  np.testing.assert_array_equal(found.samples, plain.samples)
  assert found.high[:, 0].max() > 50 > plain.high[:, 0].max()
  np.testing.assert_array_equal(lm.predict(TEXTS, DRAWS).margins, None)
  lm.save(tmp_path / "calibrated")
  again = RegressionLM.from_pretrained(tmp_path / "calibrated")
  np.testing.assert_array_equal(
    again.predict(TEXTS, DRAWS, level=0.8).high, found.high
  )
