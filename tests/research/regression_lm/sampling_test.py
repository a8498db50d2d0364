import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.numbers import MISSING, P10, START, Ieee, Normalized, TargetCodec
from research.decoding.sampling import Sampling
from research.regression_lm import sampling
from research.regression_lm.token_batches import Texts
from tests.research.regression_lm import toy


def keys(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


def exact(model, params, tokens, lengths):
  """The support (rows, T), and its probabilities (B, rows)."""
  rows = toy.support(model.codec)
  repeated = np.broadcast_to(rows, (len(tokens), *rows.shape))
  logprob = sampling.score(model, params, tokens, lengths, repeated).sum(-1)
  return rows, np.exp(np.asarray(logprob, np.float64))


def test_probabilities_of_all_that_can_be_said_sum_to_one():
  model = toy.model()
  tokens, lengths = toy.texts(3)
  rows, chances = exact(model, toy.params(model), tokens, lengths)
  # Two signs; mantissas of exponents 0, 1 and -1, two zeros; special values.
  assert len(rows) == 2 * (3 * 2 + 2) + 4
  # Some ten float32 roundings in each of 20 numbers.
  np.testing.assert_allclose(chances.sum(1), 1, atol=1e-5)
  assert chances.max() > 0.2 and chances.min() > 0


def test_two_objectives_sum_to_one_as_well():
  codec = TargetCodec(format=Ieee(base=2, mantissa_digits=1), num_objectives=2)
  model = toy.model(codec)
  tokens, lengths = toy.texts(2)
  _, chances = exact(model, toy.params(model), tokens, lengths)
  np.testing.assert_allclose(chances.sum(1), 1, atol=1e-5)


def test_draws_follow_the_exact_probabilities():
  model = toy.model()
  params = toy.params(model)
  tokens, lengths = toy.texts(2)
  rows, chances = exact(model, params, tokens, lengths)
  draws = 4000
  ids, logprob = sampling.draw(
    model, params, tokens, lengths, keys(2), num_samples=draws
  )
  assert ids.shape == (2, draws, model.codec.length)
  ids = np.asarray(ids)
  assert model.codec.grammar.accepts(ids).all()
  for b in range(2):
    index = (ids[b, :, None] == rows[None]).all(-1).argmax(1)
    counts = np.bincount(index, minlength=len(rows))
    statistic = ((counts - draws * chances[b]) ** 2 / chances[b] / draws).sum()
    # Of 19 degrees of freedom; 50 is exceeded once in 10,000 times.
    assert statistic < 50
    np.testing.assert_allclose(np.exp(logprob[b]), chances[b][index], rtol=1e-3)


def test_a_text_is_drawn_for_alone():
  model = toy.model()
  params = toy.params(model)
  tokens, lengths = toy.texts(3)
  ids, _ = sampling.draw(
    model, params, tokens, lengths, keys(3), num_samples=20
  )
  for b in range(3):
    cut = lengths[b]
    alone, _ = sampling.draw(
      model,
      params,
      tokens[b : b + 1, :cut],
      lengths[b : b + 1],
      keys(3)[b : b + 1],
      num_samples=20,
    )
    np.testing.assert_array_equal(alone[0], ids[b])


def test_greedy_and_nucleus():
  model = toy.model()
  params = toy.params(model)
  tokens, lengths = toy.texts(2)
  greedy, _ = sampling.draw(
    model,
    params,
    tokens,
    lengths,
    keys(2),
    num_samples=3,
    sampling=Sampling(temperature=0.0),
  )
  narrow, _ = sampling.draw(
    model,
    params,
    tokens,
    lengths,
    keys(2),
    num_samples=3,
    sampling=Sampling(top_p=1e-4),
  )
  assert (greedy == greedy[:, :1]).all()
  np.testing.assert_array_equal(greedy, narrow)
  assert model.codec.grammar.accepts(np.asarray(greedy)).all()


def test_known_objectives_are_kept_and_condition_the_later():
  codec = TargetCodec(format=Ieee(base=2, mantissa_digits=1), num_objectives=2)
  model = toy.model(codec)
  params = toy.params(model)
  tokens, lengths = toy.texts(2)
  given = np.full((2, codec.length), START, np.int32)
  known = codec.encode([[2.0], [None]])[:, : codec.format.length]
  given[:, : codec.format.length] = known
  ids, logprob = sampling.draw(
    model, params, tokens, lengths, keys(2), num_samples=50, given=given
  )
  width = codec.format.length
  np.testing.assert_array_equal(
    np.asarray(ids)[:, :, :width],
    np.broadcast_to(known[:, None], (2, 50, width)),
  )
  assert (ids[1, :, :width] == MISSING).all()
  assert np.isfinite(codec.values(ids)[..., 1]).all()
  parts = sampling.score(model, params, tokens, lengths, ids)
  np.testing.assert_allclose(logprob, parts[..., 1], atol=1e-5)
  assert (parts[1, :, 0] == 0).all() and (parts[0, :, 0] < 0).all()


def test_draws_compile_once_for_all_values_of_their_arguments():
  model = toy.model()
  params = toy.params(model)
  traces = []

  def counted(params, tokens, lengths, keys):
    traces.append(1)
    return sampling.draw.__wrapped__(
      model, params, tokens, lengths, keys, num_samples=4
    )

  jitted = jax.jit(counted)
  for seed in range(3):
    tokens, lengths = toy.texts(2, seed=seed)
    jitted(params, jnp.asarray(tokens), jnp.asarray(lengths), keys(2, seed))
  assert len(traces) == 1


@pytest.mark.parametrize(
  "form",
  [
    toy.SMALL,
    P10(digits=1, exponent_range=2),
    Normalized(base=3, digits=3),
  ],
)
def test_probabilities_of_the_different_numbers_sum_to_one(form):
  """Of zero, too, which some formats write in several ways."""
  codec = TargetCodec(format=form)
  model = toy.model(codec)
  params = toy.params(model)
  tokens, lengths = toy.texts(2)
  texts = Texts(
    np.concatenate([row[:n] for row, n in zip(tokens, lengths)]),
    np.cumsum([0, *lengths]),
    0,
  )
  rows = toy.support(codec)
  values = codec.values(rows)[:, 0]
  special = np.isnan(values) | np.isinf(values)
  _, first = np.unique(values[~special], return_index=True)
  numbers = np.concatenate([rows[~special][first], rows[special]])
  assert len(rows) - len(numbers) == len(form.zeros) - 1
  repeated = np.broadcast_to(numbers, (2, *numbers.shape))
  logprob = sampling.score_texts(model, params, texts, repeated)
  np.testing.assert_allclose(np.exp(logprob).sum((1, 2)), 1, atol=1e-5)
  # However zero is written.
  zeros = np.broadcast_to(codec.zeros, (2, *codec.zeros.shape))
  found = sampling.score_texts(model, params, texts, zeros)
  assert np.ptp(found, axis=1).max() < 1e-5
