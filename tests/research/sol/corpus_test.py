import dataclasses
import lzma

import numpy as np
import pytest

from models.convert import load
from models.errors import InputError
from research.sol import corpus

STORY = 64
FIRST = [
  [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315],
  [1, 403, 407, 261, 378, 432, 383, 286, 261, 416, 318, 416],
]


@pytest.fixture(scope="module")
def tiny():
  """The shipped model, said to know short stories only."""
  whole = load("tiny")
  config = dataclasses.replace(whole.config, max_position=STORY)
  return dataclasses.replace(whole, config=config)


@pytest.fixture(scope="module")
def samples(tiny):
  return corpus.load_tokens(["samples:3:1024"], tiny)


def stories(tokens):
  return {tuple(row) for row in tokens.reshape(-1, STORY)}


def test_samples_are_a_function_of_their_seed(tiny, samples):
  assert samples.shape == (1024,) and samples.dtype == np.int32
  assert 0 <= samples.min() and samples.max() < tiny.config.vocab_size
  again = corpus.load_tokens(["samples:3:600"], tiny)
  np.testing.assert_array_equal(again, samples[:600])


def test_results_rest_on_these_stories(samples):
  """The draws of SOL's runs; other releases of jax may draw others."""
  first = samples.reshape(-1, STORY)[:2, :12]
  assert first.tolist() == FIRST


def test_samples_are_drawn_once_for_a_folder(
  tiny, samples, tmp_path, monkeypatch
):
  name = ["samples:3:1024"]
  kept = corpus.load_tokens(name, tiny, folder=tmp_path)
  np.testing.assert_array_equal(kept, samples)
  monkeypatch.setattr(corpus, "_drawn", None)
  again = corpus.load_tokens(name, tiny, folder=tmp_path)
  np.testing.assert_array_equal(again, samples)
  # Other weights draw other stories.
  params = dict(tiny.params, final_norm=None)
  with pytest.raises(TypeError):
    corpus.load_tokens(
      name, dataclasses.replace(tiny, params=params), folder=tmp_path
    )


def test_seeds_share_no_story(tiny, samples):
  other = corpus.load_tokens(["samples:4:1024"], tiny)
  assert len(stories(samples)) == len(stories(other)) == 16
  assert not stories(samples) & stories(other)


def test_texts_follow_each_other(tiny, samples, tmp_path):
  path = tmp_path / "a.txt.xz"
  path.write_bytes(lzma.compress(b"Once upon a time there was a cat."))
  alone = corpus.load_tokens([str(path)], tiny)
  both = corpus.load_tokens([str(path), "samples:3:1024"], tiny)
  np.testing.assert_array_equal(both, np.concatenate([alone, samples]))
  cut = corpus.load_tokens([str(path)], tiny, max_tokens=5)
  np.testing.assert_array_equal(cut, alone[:5])


@pytest.mark.parametrize(
  "name", ["samples:3", "samples:a:9", "samples:1:2:3", "samples:1:0"]
)
def test_a_bad_name_says_how_to_write_it(tiny, name):
  with pytest.raises(InputError, match="samples:SEED:N"):
    corpus.load_tokens([name], tiny)


def test_no_text_is_told(tiny):
  with pytest.raises(InputError, match="no text"):
    corpus.load_tokens([], tiny)


def test_a_missing_text_is_named(tiny):
  with pytest.raises(InputError, match="nowhere.txt"):
    corpus.load_tokens(["nowhere.txt"], tiny)


def test_split_keeps_every_token_once():
  tokens = np.arange(105)
  first, last = corpus.split(tokens, 0.1)
  np.testing.assert_array_equal(np.concatenate([first, last]), tokens)
  assert len(last) == 11
