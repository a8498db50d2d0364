"""The model as users meet it: texts and numbers in, numbers out.

  lm = RegressionLM.from_scratch(texts, tokenizer="bpe", size="small")
  lm.fine_tune([Example(x="lr=0.1 depth=3", y=0.73), ...], validation)
  prediction = lm.predict(["lr=0.2 depth=4"])
  prediction.median, prediction.low, prediction.high
  lm.save("runs/mine"); lm = RegressionLM.from_pretrained("runs/mine")

Shapes by axis letter: B texts, S draws a text, O objectives, G numbers.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax
import numpy as np

from models import regression_lm
from models import tokenizer as tokenizer_lib
from models.convert import t5gemma
from models.errors import InputError
from models.numbers import MISSING, Ieee, NumberFormat, TargetCodec
from models.regression_lm import Compute, Params
from models.regression_lm_config import RegressionLMConfig
from models.tokenizer import Tokenizer
from research.decoding.sampling import Sampling
from research.predictors.calibration import Prediction
from research.predictors.examples import Example, text_of
from research.regression_lm import (
  artefact,
  fine_tuning,
  prompts,
  sampling,
  token_batches,
)
from research.regression_lm.artefact import Artefact
from research.regression_lm.expected import Scale
from research.regression_lm.fine_tuning import FineTuneOptions, History
from research.regression_lm.likelihood import Model
from research.regression_lm.prompts import Prompt
from research.regression_lm.token_batches import Texts
from research.text import tokenizing


class RegressionLM:
  """Predicts numbers from text.

  Attributes:
    model: what is static.
    params: nested dict of arrays.
    tokenizer: of texts.
    max_length: tokens that a text is cut to.
    info: JSON values that `save` keeps.
  """

  def __init__(
    self,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    max_length: int,
    info: dict[str, Any] | None = None,
  ):
    """Puts the parts together; the class methods make them."""
    self.model, self.params, self.tokenizer = model, params, tokenizer
    self.max_length, self.info = max_length, dict(info or {})

  @classmethod
  def from_scratch(
    cls,
    texts: Sequence[Any] = (),
    *,
    tokenizer: str | Tokenizer = tokenizing.BYTES,
    vocab_size: int = 4096,
    size: str = "small",
    numbers: NumberFormat = Ieee(),  # noqa: B008 (frozen)
    num_objectives: int = 1,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    seed: int = 0,
    **sizes: Any,
  ) -> Self:
    """A model with random weights.

    Args:
      texts: texts or examples that a tokenizer is learned from.
      tokenizer: "bytes", "bpe" or "sentencepiece", which are learned, a hub id,
        the path of a `tokenizer.json` or of a `.model` of SentencePiece, or a
        tokenizer.
      vocab_size: of what is learned.
      size: "tiny", "mini", "small", "base", "medium" or "large".
      numbers: how numbers are written.
      num_objectives: O.
      max_length: tokens that a text is cut to.
      dtype: of activations.
      param_dtype: of the weights.
      seed: of the weights.
      **sizes: what differs from `size`, fields of `RegressionLMConfig` such as
        encoder="mamba2".

    Raises:
      InputError: an argument does not do.
    """
    found = make_tokenizer(tokenizer, texts, vocab_size)
    codec = TargetCodec(format=numbers, num_objectives=num_objectives)
    _check(max_length, sizes)
    config = RegressionLMConfig.named(
      size,
      vocab_size=found.vocab_size,
      target_vocab_size=len(codec.tokens),
      target_length=codec.length,
      **sizes,
    )
    model = Model(config=config, codec=codec, compute=Compute(dtype=dtype))
    params = jax.jit(lambda key: regression_lm.init(config, key, param_dtype))(
      jax.random.key(seed)
    )
    return cls(model, params, found, max_length)

  @classmethod
  def from_t5gemma(
    cls,
    directory: str | os.PathLike[str],
    *,
    size: str = "small",
    numbers: NumberFormat = Ieee(),  # noqa: B008 (frozen)
    num_objectives: int = 1,
    max_length: int = 2048,
    dtype: str = "float32",
    param_dtype: str = "float32",
    seed: int = 0,
    **sizes: Any,
  ) -> Self:
    """The encoder of T5Gemma or T5Gemma-2, and a decoder with random weights.

    Training moves both, or the decoder alone with `freeze_encoder`.

    Args:
      directory: with config.json, safetensors and tokenizer.json, or a hub id
        such as "google/t5gemma-s-s-prefixlm".
      size: of the decoder; its width may differ from the encoder's.
      numbers: as for `from_scratch`, and so are those below.
      num_objectives: O.
      max_length: tokens that a text is cut to.
      dtype: of activations.
      param_dtype: of the weights.
      seed: of the random weights.
      **sizes: of the decoder, where they differ from `size`.

    Raises:
      InputError: a file or an argument does not do.
    """
    encoder = t5gemma.open_encoder(directory)
    found = tokenizer_lib.within(
      tokenizing.load(str(encoder.folder)), encoder.config.vocab_size
    )
    codec = TargetCodec(format=numbers, num_objectives=num_objectives)
    _check(max_length, sizes, beside=("encoder", "t5gemma"))
    config = RegressionLMConfig.on_t5gemma(
      encoder.config,
      size,
      target_vocab_size=len(codec.tokens),
      target_length=codec.length,
      **sizes,
    )

    @jax.jit
    def make(key):
      # `jit` drops weights that this function does not return, so no memory is
      # taken by the random encoder that the given one replaces.
      params = regression_lm.init(config, key, param_dtype)
      return {name: part for name, part in params.items() if name != "encoder"}

    params = make(jax.random.key(seed))
    params["encoder"] = encoder.params(param_dtype)
    model = Model(config=config, codec=codec, compute=Compute(dtype=dtype))
    return cls(model, params, found, max_length)

  @classmethod
  def from_pretrained(
    cls,
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
  ) -> Self:
    """Reads what `save` or `experiments/train_rlm.py` wrote.

    Raises:
      InputError: a file is missing or damaged.
    """
    found = artefact.load(directory, param_dtype)
    model = Model(
      config=found.config, codec=found.codec, compute=Compute(dtype=dtype)
    )
    return cls(
      model, found.params, found.tokenizer, found.max_length, found.info
    )

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes config.json, model.safetensors and tokenizer.json.

    Raises:
      InputError: the directory holds something already.
    """
    artefact.save(
      directory,
      Artefact(
        self.model.config,
        self.model.codec,
        self.params,
        self.tokenizer,
        self.max_length,
        self.info,
      ),
    )

  @property
  def num_objectives(self) -> int:
    """O."""
    return self.model.codec.num_objectives

  @property
  def num_params(self) -> int:
    """Parameters of the model."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))

  def fine_tune(
    self,
    train: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    options: FineTuneOptions | None = None,
    on_epoch: Any = None,
    **changes: Any,
  ) -> History:
    """Adapts the weights to examples, in place.

    Args:
      train: examples.
      validation: decide when to stop and which epoch is kept; without them all
        `max_epochs` are run.
      options: how.
      on_epoch: called with number, training loss and validation loss.
      **changes: fields of `options` that differ from it.

    Raises:
      InputError: an example or an option does not do; the weights stay.
    """
    options = options or FineTuneOptions()
    names = {field.name for field in dataclasses.fields(FineTuneOptions)}
    for name in changes.keys() - names:
      raise InputError(f"{name}={changes[name]!r}: there is no such option")
    options = dataclasses.replace(options, **changes)
    train_data, valid_data = self.datasets(
      train, validation, options.prompt_shots
    )
    self.params, history = fine_tuning.fine_tune(
      self.model,
      self.params,
      train_data,
      valid_data,
      options,
      values=self.model.codec.values(train_data.targets),
      valid_values=valid_data and self.model.codec.values(valid_data.targets),
      on_epoch=on_epoch,
    )
    return history

  def dataset(self, given: Sequence[Example]) -> token_batches.Dataset:
    """Examples as tokens.

    Raises:
      InputError: a text or a target does not do.
    """
    return token_batches.build(
      given, self.tokenizer, self.model.codec, self.max_length
    )

  def datasets(
    self,
    train: Sequence[Example],
    valid: Sequence[Example] | None,
    prompt_shots: int = 0,
  ) -> tuple[token_batches.Dataset, token_batches.Dataset | None]:
    """Examples for training and validation as tokens.

    Args:
      train: examples.
      valid: examples, or none.
      prompt_shots: others of the same task that stand in front of each: of
        training up to so many, chosen anew every step; of validation so many.

    Raises:
      InputError: a text or a target does not do.
    """
    data = self.dataset(train)
    if not prompt_shots:
      return data, self.dataset(valid) if valid else None
    fixed = self.tokenizer, self.max_length, prompt_shots
    if valid:
      valid = prompts.of_validation(valid, train, *fixed)
    data = prompts.of_training(data, train, *fixed)
    return data, self.dataset(valid) if valid else None

  def prompted(
    self, xs: Sequence[Any], prompt: Prompt | Sequence[Example]
  ) -> list[str]:
    """Texts behind examples of their task, for any other method.

    Of use only where the model was trained with `prompt_shots`.

    Args:
      xs: texts, or examples.
      prompt: examples, the nearest eight of which are taken, or a `Prompt`.

    Raises:
      InputError: a text or an example does not do.
    """
    return prompts.texts(prompt, xs, self.tokenizer, self.max_length)

  def sample(
    self,
    xs: Sequence[Any],
    num_samples: int = 64,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    given: Sequence[Any] | None = None,
    prompt: Prompt | Sequence[Example] | None = None,
  ) -> np.ndarray:
    """Draws numbers (B, S, O) float64 for texts; NaN where a draw is none.

    Args:
      xs: B texts, or examples.
      num_samples: S.
      temperature: of every token; 0 takes the likeliest.
      top_p: of every token (nucleus sampling).
      seed: of the draws. Those of a text depend on its place in `xs` and on
        the seed, not on the other texts.
      given: B targets whose known leading objectives are kept, and condition
        those that are drawn.
      prompt: examples that stand in front of the texts, as for `prompted`.

    Raises:
      InputError: a text or an option does not do.
    """
    rule = _sampling(temperature, top_p)
    if not isinstance(num_samples, int) or num_samples < 1:
      raise InputError(f"num_samples={num_samples!r} is no positive integer")
    texts = self._texts(xs if prompt is None else self.prompted(xs, prompt))
    codec = self.model.codec
    known = None if given is None else self._known(given, len(xs))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed), np.arange(len(xs), dtype=np.uint32)
    )
    ids = sampling.draw_texts(
      self.model,
      self.params,
      texts,
      keys,
      num_samples=num_samples,
      sampling=rule,
      given=known,
    )
    return codec.values(ids)

  def predict(
    self,
    xs: Sequence[Any],
    num_samples: int = 64,
    *,
    level: float = 0.9,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    given: Sequence[Any] | None = None,
    prompt: Prompt | Sequence[Example] | None = None,
  ) -> Prediction:
    """Mean, median, quantiles and a central interval, from draws.

    Args:
      xs: B texts, or examples.
      num_samples: draws a text.
      level: probability of the interval.
      temperature: as for `sample`.
      top_p: as for `sample`.
      seed: as for `sample`.
      given: as for `sample`.
      prompt: as for `prompted`.

    Raises:
      InputError: a text or an option does not do.
    """
    if not 0 < level < 1:
      raise InputError(f"level={level!r} is not in (0, 1)")
    draws = self.sample(
      xs,
      num_samples,
      temperature=temperature,
      top_p=top_p,
      seed=seed,
      given=given,
      prompt=prompt,
    )
    return Prediction(draws, level)

  def expected(
    self,
    xs: Sequence[Any],
    known: Sequence[Any],
    *,
    scale: str = "rank",
    grid: int = 64,
  ) -> np.ndarray:
    """Expected values (B, O) over a grid of known numbers, without draws.

    Exact probabilities of the grid's numbers instead of draws: no noise, and
    no draw far out. With scale "rank" what is averaged are ranks among the
    known numbers, and the number at the mean rank is the answer.

    Args:
      xs: B texts, or examples.
      known: targets, or examples, such as those of training; the grid has
        their quantiles.
      scale: "rank" or "value".
      grid: numbers of it.

    Raises:
      InputError: a text, a target or an option does not do.
    """
    if not isinstance(grid, int) or grid < 2:
      raise InputError(f"grid={grid!r} is not 2 or more")
    codec = self.model.codec
    targets = codec.encode([getattr(y, "y", y) for y in known])
    fitted = Scale.fit(scale, codec.values(targets))
    numbers = fitted.grid(codec, grid)
    texts = self._texts(xs)
    found = np.empty((len(xs), codec.num_objectives))
    for indices, _, batch in sampling.calls(self.model, texts, grid):
      scores = sampling.expectation(self.model, self.params, *batch, numbers)
      found[indices] = np.asarray(scores)[: len(indices)]
    return fitted.values(found)

  def log_prob(
    self, given: Sequence[Example], *, density: bool = False
  ) -> np.ndarray:
    """Exact log-probability (B, O) of targets, renormalised over the grammar.

    That of an objective is given the text and the objectives before it; the
    sum over O is that of the example. 0 where an objective is missing.

    Args:
      given: examples; their numbers are rounded as the model writes them.
      density: divide by the distance to the next number, for a density.

    Raises:
      InputError: a text or a target does not do.
    """
    data = self.dataset(given)
    found = self._score(data.texts, data.targets[:, None])[:, 0]
    if not density:
      return found
    return found - np.log(self.model.codec.widths(data.targets))

  def density(self, x: Any, values: Sequence[float]) -> np.ndarray:
    """Probability density of the first objective of a text at numbers (G,).

    Raises:
      InputError: a text or a number does not do.
    """
    codec = self.model.codec
    targets = codec.encode([[value] for value in values])
    logprob = self._score(self._texts([x]), targets[None])[0, :, 0]
    return np.exp(logprob) / codec.widths(targets)[:, 0]

  def _texts(self, xs: Iterable[Any]) -> Texts:
    if isinstance(xs, str):
      raise InputError("xs is one text: give a list of texts")
    return token_batches.read_texts(
      self.tokenizer, map(text_of, xs), self.max_length
    )

  def _known(self, given: Sequence[Any], count: int) -> np.ndarray:
    codec = self.model.codec
    if len(given) != count:
      raise InputError(f"{len(given)} known targets for {count} texts")
    known = codec.encode(given).reshape(count, codec.num_objectives, -1)
    # Objectives behind the last known one are drawn.
    there = known[:, :, 0] != MISSING
    later = np.cumsum(there[:, ::-1], axis=1)[:, ::-1]
    known = np.where((later > 0)[..., None], known, 0)
    return known.reshape(count, codec.length).astype(np.int32)

  def _score(self, texts: Texts, targets: np.ndarray) -> np.ndarray:
    """(B, S, O) of targets (B, S, T)."""
    shape = (*targets.shape[:2], self.num_objectives)
    found = np.empty(shape, np.float64)
    rows = targets.shape[1]
    for indices, filled, batch in sampling.calls(self.model, texts, rows):
      scores = sampling.score(self.model, self.params, *batch, targets[filled])
      found[indices] = np.asarray(scores)[: len(indices)]
    return found


def _sampling(temperature: float, top_p: float) -> Sampling:
  try:
    return Sampling(temperature=temperature, top_p=top_p)
  except (ValueError, TypeError) as error:
    raise InputError(str(error)) from error


def _check(
  max_length: Any, sizes: dict[str, Any], beside: Sequence[str] = ()
) -> None:
  """Raises InputError for what is no length, or no size to be chosen."""
  if not isinstance(max_length, int) or max_length < 1:
    raise InputError(f"max_length={max_length!r} is no positive integer")
  names = {field.name for field in dataclasses.fields(RegressionLMConfig)}
  for name in sizes.keys() - (names - set(beside)):
    raise InputError(f"{name}={sizes[name]!r}: there is no such size")


def make_tokenizer(
  tokenizer: str | Tokenizer, texts: Sequence[Any], vocab_size: int
) -> Tokenizer:
  """A tokenizer by name, or learned from texts (or examples).

  Raises:
    InputError: there is none, or nothing to learn from.
  """
  if isinstance(tokenizer, Tokenizer):
    return tokenizer
  if tokenizer not in tokenizing.LEARNED:
    return tokenizing.load(str(tokenizer))
  documents = [text_of(text) for text in texts]
  return tokenizing.learn(tokenizer, documents, vocab_size)
