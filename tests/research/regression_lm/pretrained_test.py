"""Models on the encoder of T5Gemma: made, trained, frozen, kept."""

import dataclasses

import jax
import numpy as np
import pytest

from models.convert import t5gemma
from models.errors import InputError
from models.numbers import Ieee
from research.core import mesh as mesh_lib
from research.predictors.data_options import DataOptions
from research.regression_lm import (
  Example,
  RegressionLM,
  fine_tuning,
  sources,
  training,
)
from research.regression_lm.options import Options
from tests.models import t5gemma_checkpoint

EXAMPLES = [Example(x=f"width={n}", y=float(n % 7 + 1)) for n in range(24)]
OPTIONS = Options(
  size="tiny", mantissa_digits=1, steps=6, batch=8, eval_every=3, warmup=0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("t5gemma")
  t5gemma_checkpoint.write("t5gemma", folder)
  t5gemma_checkpoint.write_tokenizer(folder)
  return folder


def make(folder, **changes):
  options = {"size": "tiny", "numbers": Ieee(mantissa_digits=1)}
  return RegressionLM.from_t5gemma(folder, **(options | changes))


def released(folder):
  return t5gemma.open_encoder(folder).params()


def equal(one, other):
  same = jax.tree.map(lambda a, b: bool((a == b).all()), one, other)
  return all(jax.tree.leaves(same))


def test_weights_and_tokens_are_those_of_the_folder(folder):
  lm = make(folder)
  assert lm.model.config.text_width == 24 and lm.model.config.d_model == 16
  assert equal(lm.params["encoder"], released(folder))
  # Behind the begin token, and without the picture that the table lacks.
  assert lm.tokenizer.vocab_size == 64 and lm.tokenizer.bos_id == 2
  tokens, lengths = lm.dataset(EXAMPLES[:1]).texts.rows(np.array([0]))
  assert tokens[0, 0] == 2 and lengths[0] == 1 + len(EXAMPLES[0].x)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_frozen_encoder_stays_and_the_decoder_learns(folder, method):
  lm = make(folder)
  before = lm.log_prob(EXAMPLES).sum()
  lm.fine_tune(
    EXAMPLES,
    EXAMPLES[::4],
    method=method,
    freeze_encoder=True,
    max_epochs=12,
    patience=12,
    batch=8,
    learning_rate=0.03,
  )
  assert lm.log_prob(EXAMPLES).sum() > before + 20
  assert equal(lm.params["encoder"], released(folder))
  lm.fine_tune(EXAMPLES, method=method, max_epochs=1, batch=8)
  assert not equal(lm.params["encoder"], released(folder))


def test_what_is_frozen_has_no_moments(folder):
  lm = make(folder)
  for freeze, expected in ((True, False), (False, True)):
    options = fine_tuning.FineTuneOptions(freeze_encoder=freeze)
    trained, _, _ = fine_tuning._trainable(lm.params, options)
    _, tx = fine_tuning._optimizer(options, 10)
    paths = jax.tree_util.tree_leaves_with_path(tx.init(trained))
    names = {jax.tree_util.keystr(path) for path, _ in paths}
    assert any("encoder" in name for name in names) == expected
    assert any("decoder" in name for name in names)


def test_encoders_trained_here_can_be_frozen_too():
  lm = RegressionLM.from_scratch(size="tiny", numbers=Ieee(mantissa_digits=1))
  start = jax.tree.map(np.asarray, lm.params)
  lm.fine_tune(EXAMPLES, freeze_encoder=True, max_epochs=1, batch=8)
  for name in ("embed", "encoder", "encoder_norm"):
    assert equal(lm.params[name], start[name])
  assert not equal(lm.params["head"], start["head"])


def test_a_saved_model_is_the_model(folder, tmp_path):
  lm = make(folder, encoder_layers=4)
  lm.save(tmp_path / "model")
  found = RegressionLM.from_pretrained(tmp_path / "model")
  assert found.model == lm.model and found.tokenizer.bos_id == 2
  texts = ["width=3", "width=5"]
  np.testing.assert_array_equal(found.sample(texts, 8), lm.sample(texts, 8))


def test_a_run_keeps_the_encoder_and_goes_on(folder, tmp_path):
  lines = ["a,y", *(f"{a},{a % 7 + 1}" for a in range(40))]
  (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
  data = DataOptions(kind="csv", targets=("y",))
  run = training.Run(
    options=dataclasses.replace(OPTIONS, freeze_encoder=True),
    source=sources.open_source(data, tmp_path / "data.csv"),
    workdir=tmp_path / "run",
    encoder_weights=str(folder),
    mesh=mesh_lib.data_mesh(1),
    checkpoint_every=3,
    progress=False,
  )
  lm = training.train(run, lambda line: None)
  assert equal(lm.params["encoder"], released(folder))
  found = RegressionLM.from_pretrained(tmp_path / "run/model")
  assert equal(found.params, lm.params)
  # Nothing of the encoder is in what is written again and again.
  weights = (tmp_path / "run/best.safetensors").read_bytes()
  assert b"decoder" in weights and b"encoder" not in weights
  # The same command again reads what is there.
  again = training.train(run, lambda line: None)
  assert equal(again.params, lm.params)
  other = dataclasses.replace(OPTIONS, encoder="mamba2")
  for changes, words in (
    ({"start": "x"}, "give one of them"),
    ({"options": other}, "--encoder=mamba2: --encoder_weights"),
  ):
    with pytest.raises(InputError, match=words):
      training.train(dataclasses.replace(run, **changes), print)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"encoder": "mamba2"}, "encoder='mamba2': there is no such size"),
    ({"encoder_layers": 2}, "encoder_layers=2, the encoder's is 4"),
    ({"size": "giant"}, "size 'giant'"),
    ({"max_length": 0}, "max_length=0"),
  ],
)
def test_mistakes_are_one_line(folder, changes, words):
  with pytest.raises(InputError, match=words) as caught:
    make(folder, **changes)
  assert "\n" not in str(caught.value)


def test_tokenizers_that_do_not_fit_are_refused(folder, tmp_path):
  t5gemma_checkpoint.write("t5gemma", tmp_path, vocab_size=60)
  t5gemma_checkpoint.write_tokenizer(tmp_path)
  with pytest.raises(InputError, match="has 64 tokens, the model 60"):
    make(tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(InputError, match="tokenizer.json"):
    make(tmp_path)
