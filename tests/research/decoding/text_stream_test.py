import numpy as np
import pytest

from models.convert import load
from models.tokenizer import load_tokenizer
from research.decoding.text_stream import TextStream
from research.text import tokenizing

TEXTS = (
  "Once upon a time, there was a cat.",
  "naïve “quotes” 日本語 🙂🙂 ½ \n\n x",
  " leading and trailing ",
)


@pytest.fixture(scope="module", params=["tiny", "bytes"])
def tokenizer(request):
  if request.param == "tiny":
    return load_tokenizer(load("tiny"))
  return tokenizing.of_bytes()


def stream(tokenizer, prompt, tokens, stop=()):
  """All pieces of a stream, the one of `finish` last."""
  stream = TextStream(tokenizer, prompt, stop)
  pieces = [stream.push(token) for token in tokens]
  pieces.append(stream.finish())
  assert "".join(pieces) == stream.text
  return stream, pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text, cut):
  tokens = tokenizer.encode("Ben said: " + text)
  cut += len(tokenizer.encode("Ben said:"))
  _, pieces = stream(tokenizer, tokens[:cut], tokens[cut:])
  whole = tokenizer.decode(tokens)
  before = tokenizer.decode(tokens[:cut])
  assert "".join(pieces) == whole[len(before) :]
  assert not any("\ufffd" in piece for piece in pieces)
  # Handed out as it comes: at most the bytes of one character are held back.
  shown = "".join(pieces[:-5]).encode()
  assert len(whole[len(before) :].encode()) - len(shown) < 40


@pytest.mark.parametrize(
  "prompt", ["日本語", "a日本語", "日本語日本語日本", "🙂🙂🙂"]
)
def test_an_answer_goes_on_behind_characters_of_many_tokens(tokenizer, prompt):
  stem = tokenizer.encode(prompt)
  answer = tokenizer.encode(prompt + "猫é")[len(stem) :]
  found, pieces = stream(tokenizer, stem, answer)
  assert found.text == "猫é" and "猫" in pieces
  # A prompt that lost its beginning within a character.
  found, _ = stream(tokenizer, stem[2:], answer)
  assert found.text == "猫é"


def test_a_broken_character_does_not_hold_up_what_follows(tokenizer):
  byte = 3 if tokenizer.vocab_size == 512 else 0
  broken = [byte + 0xE2, byte + 0x82]
  found, pieces = stream(tokenizer, tokenizer.encode("ab"), broken)
  assert pieces[:2] == ["", ""] and set(found.text) == {"\ufffd"}
  after = tokenizer.encode("ab little dog")[-8:]
  found, pieces = stream(tokenizer, tokenizer.encode("ab"), [*broken, *after])
  assert found.text.strip("\ufffd").strip() == tokenizer.decode(after).strip()
  assert pieces[-1] == ""


@pytest.mark.parametrize(
  "stop, expected, stopped",
  [
    (("cat",), "Once upon a time, there was a ", True),
    (("there was", "time"), "Once upon a ", True),
    (("cats",), TEXTS[0], False),
    (("t.", ""), "Once upon a time, there was a ca", True),
    (("t.x",), TEXTS[0], False),
    (("Once",), "", True),
  ],
)
def test_the_text_ends_before_a_stop_string(tokenizer, stop, expected, stopped):
  prompt = tokenizer.encode("\n")
  tokens = tokenizer.encode("\n" + TEXTS[0])[len(prompt) :]
  found, pieces = stream(tokenizer, prompt, tokens, stop)
  assert found.text == expected
  assert found.stopped == stopped
  if stopped:
    assert found.push(int(tokens[0])) == found.finish() == ""


def test_any_tokens_give_the_text_of_their_bytes(tokenizer):
  first = 3 if tokenizer.vocab_size == 512 else 0
  rng = np.random.default_rng(0)
  prompt = tokenizer.encode("He")
  for _ in range(30):
    tokens = rng.integers(first, min(tokenizer.vocab_size, 512), 20)
    tokens = tokens[tokens != 256] if first == 0 else tokens
    names = [tokenizer.backend.id_to_token(int(token)) for token in tokens]
    joined = b"".join(
      bytes([int(name[1:-1], 16)]) if name.startswith("<0x") else name.encode()
      for name in names
    )
    found, _ = stream(tokenizer, prompt, tokens)
    # How many signs stand for broken bytes differs, and a space behind them.
    plain = lambda text: text.replace("\ufffd", "").replace(" ", "")
    assert plain(found.text) == plain(joined.decode(errors="ignore"))
