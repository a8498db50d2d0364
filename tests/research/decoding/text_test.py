import jax
import numpy as np
import pytest

from models import control_tokens
from models.convert import load
from models.errors import InputError
from models.tokenizer import load_tokenizer
from research.decoding import text as text_lib
from research.decoding.sampling import Sampling
from research.decoding.text import TextOptions

PROMPTS = ("Once upon a time", "Lily and Ben were", "One", "")
ADDED = 24


@pytest.fixture(scope="module")
def tiny():
  return load("tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny):
  return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def generator(tiny, tokenizer):
  return text_lib.Generator(tiny.config, tiny.params, tokenizer)


@pytest.fixture(scope="module")
def alone(generator):
  """Each prompt's continuation without company, at temperature 0."""
  return [
    generator([generator.encode(text)], TextOptions(max_tokens=ADDED))[0]
    for text in PROMPTS
  ]


def encode_all(generator):
  return [generator.encode(text) for text in PROMPTS]


def test_a_batch_says_what_each_prompt_gets_alone(generator, alone):
  prompts = encode_all(generator)
  assert len({len(prompt) for prompt in prompts}) == len(prompts)
  before = generator.speed.decode_tokens, generator.speed.prefill_tokens
  batch = generator(prompts, TextOptions(max_tokens=ADDED, steps=5))
  assert batch == alone
  assert all(found.reason == text_lib.LENGTH for found in batch)
  assert all(len(found.tokens) == ADDED for found in batch)
  # The first token of a row belongs to reading its prompt.
  drawn = len(PROMPTS) * (ADDED - 1)
  assert generator.speed.decode_tokens - before[0] == drawn
  read = sum(map(len, prompts))
  assert generator.speed.prefill_tokens - before[1] == read
  assert "tokens/s" in str(generator.speed)


def test_programs_are_compiled_once_for_a_shape(generator, alone):
  seconds = generator.speed.compile_seconds
  options = TextOptions(max_tokens=ADDED, seed=7)
  # Another prompt of the same padded length.
  generator([generator.encode("Tom")], options)
  assert generator.speed.compile_seconds == seconds


def test_text_streams_in_pieces(generator, tokenizer, alone):
  pieces = []
  prompt = generator.encode(PROMPTS[0])
  (found,) = generator(
    [prompt],
    TextOptions(max_tokens=ADDED),
    lambda row, text: pieces.append((row, text)),
  )
  assert len(pieces) > ADDED / 2
  assert {row for row, _ in pieces} == {0}
  assert "".join(text for _, text in pieces) == found.text == alone[0].text
  whole = tokenizer.decode(np.concatenate([prompt, found.tokens]))
  assert whole == tokenizer.decode(prompt) + found.text


def test_a_stop_string_ends_a_row(generator, alone):
  stop = alone[0].text[10:14]
  (found,) = generator(
    [generator.encode(PROMPTS[0])], TextOptions(max_tokens=ADDED, stop=(stop,))
  )
  assert found.reason == text_lib.STOP
  assert found.text == alone[0].text.split(stop)[0]
  assert len(found.tokens) < ADDED


def test_an_end_token_ends_a_row(tiny, tokenizer, alone, monkeypatch):
  end = alone[0].tokens[9]
  at = alone[0].tokens.index(end)
  monkeypatch.setattr(control_tokens, "end_ids", lambda _: (end,))
  generator = text_lib.Generator(tiny.config, tiny.params, tokenizer)
  (found,) = generator(
    [generator.encode(PROMPTS[0])], TextOptions(max_tokens=ADDED)
  )
  assert found.reason == text_lib.END
  assert found.tokens == alone[0].tokens[: at + 1]
  assert alone[0].text.startswith(found.text)


def test_draws_depend_on_the_seed_and_the_row_alone(generator):
  options = TextOptions(max_tokens=ADDED, sampling=Sampling(top_p=0.9), steps=5)
  prompts = encode_all(generator)
  found = generator(prompts, options)
  assert found == generator(prompts, options)
  # Another neighbour.
  other = [prompts[0], prompts[2], prompts[1], prompts[3]]
  swapped = generator(other, options)
  assert found[0] == swapped[0] and found[3] == swapped[3]
  seed = TextOptions(
    max_tokens=ADDED, sampling=Sampling(top_p=0.9), steps=5, seed=1
  )
  assert generator(prompts, seed)[0] != found[0]


def test_one_token_needs_no_decoding(generator, alone):
  options = TextOptions(max_tokens=1)
  (found,) = generator([generator.encode(PROMPTS[0])], options)
  assert found.tokens == alone[0].tokens[:1]


def test_a_prompt_must_fit_into_the_model(generator):
  prompt = np.ones(500, np.int32)
  with pytest.raises(InputError, match="513.*512"):
    generator([prompt], TextOptions(max_tokens=13))


def test_a_damaged_model_is_told_in_one_line(generator, alone, monkeypatch):
  norm = jax.tree.map(lambda x: x * np.nan, generator._params["final_norm"])
  damaged = generator._params | {"final_norm": norm}
  monkeypatch.setattr(generator, "_params", damaged)
  with pytest.raises(InputError, match="NaN or infinite.*--dtype"):
    generator([generator.encode("One")], TextOptions(max_tokens=ADDED))


def test_prompts_begin_with_the_begin_token(tiny):
  tokenizer = load_tokenizer(tiny)
  generator = text_lib.Generator(tiny.config, tiny.params, tokenizer)
  assert generator.encode("").tolist() == [tokenizer.bos_id]
  found = generator.encode("One").tolist()
  assert found == [tokenizer.bos_id, *tokenizer.encode("One").tolist()]
  # A text may bring its begin token along, as those of chats do.
  begin = tokenizer.backend.id_to_token(tokenizer.bos_id)
  tokenizer.backend.add_special_tokens([begin])
  assert generator.encode(f"{begin}One").tolist().count(tokenizer.bos_id) == 1


def test_many_prompts_give_what_each_gives_alone(generator, alone):
  long, done = 8 * PROMPTS[0], []
  options, room = TextOptions(max_tokens=ADDED, steps=5), 24
  texts = text_lib.generate_all(
    generator,
    [*PROMPTS, long, PROMPTS[1]],
    options,
    max_length=ADDED + room,
    batch_tokens=64,
    advance=done.append,
  )
  assert sum(done) == 6
  assert [*texts[:4], texts[5]] == [found.text for found in [*alone, alone[1]]]
  # This one lost its beginning.
  (cut,) = generator([generator.encode(long)[-room:]], options)
  assert texts[4] == cut.text
  with pytest.raises(InputError, match="no room"):
    text_lib.generate_all(
      generator, PROMPTS, options, max_length=ADDED, batch_tokens=64
    )
