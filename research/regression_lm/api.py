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
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np

from models import tokenizer as tokenizer_lib
from models.convert import t5gemma
from models.errors import InputError
from models.numbers import START, Ieee, NumberFormat, TargetCodec
from models.regression_lm import Compute, Params
from models.regression_lm_config import RegressionLMConfig
from models.tokenizer import Tokenizer
from research.predictors.calibration import Margins, Prediction
from research.predictors.examples import Example, text_of
from research.predictors.plausible import Range
from research.regression_lm import (
  arguments,
  artefact,
  fine_tuning,
  prompts,
  sampling,
  token_batches,
  weights,
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
    found = arguments.make_tokenizer(tokenizer, texts, vocab_size)
    codec = TargetCodec(format=numbers, num_objectives=num_objectives)
    arguments.sizes(max_length, sizes)
    config = RegressionLMConfig.named(
      size,
      vocab_size=found.vocab_size,
      target_vocab_size=len(codec.tokens),
      target_length=codec.length,
      **sizes,
    )
    model = Model(config=config, codec=codec, compute=Compute(dtype=dtype))
    key = jax.random.key(arguments.seed(seed))
    params = weights.random(config, key, param_dtype)
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
      tokenizing.load(str(encoder.folder)),
      encoder.config.vocab_size,
      encoder.folder,
    )
    codec = TargetCodec(format=numbers, num_objectives=num_objectives)
    arguments.sizes(max_length, sizes, beside=("encoder", "t5gemma"))
    config = RegressionLMConfig.on_t5gemma(
      encoder.config,
      size,
      target_vocab_size=len(codec.tokens),
      target_length=codec.length,
      **sizes,
    )
    key = jax.random.key(arguments.seed(seed))
    params = weights.random(config, key, param_dtype, without="encoder")
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
    train = arguments.listed("train", train)
    valid = validation and arguments.listed("validation", validation)
    train_data, valid_data = self.datasets(train, valid, options.prompt_shots)
    values = self.model.codec.values(train_data.targets)
    self.params, history = fine_tuning.fine_tune(
      self.model,
      self.params,
      train_data,
      valid_data,
      options,
      values=values,
      valid_values=valid_data and self.model.codec.values(valid_data.targets),
      on_epoch=on_epoch,
    )
    self.learn_range(values)
    return history

  def learn_range(self, values: np.ndarray) -> None:
    """Learns what is plausible from training targets (N, O), NaN where missing.

    Margins of intervals that other weights had are forgotten.
    """
    self.info["range"] = Range.fit(values).to_json()
    self.info.pop("margins", None)

  def calibrate(
    self, held_out: Sequence[Example], num_samples: int = 64, *,
    level: float = 0.9, **options: Any,
  ) -> Margins:  # fmt: skip
    """Learns how wide intervals must be, from examples not trained on.

    Intervals of `predict` at this level are moved by it from then on, and
    `save` keeps it (`calibration.Margins`).

    Args:
      held_out: examples, such as those of validation.
      num_samples: draws a text, as many as `predict` will take.
      level: probability of the interval.
      **options: of `sample`.

    Raises:
      InputError: an example or an option does not do.
    """
    held_out = arguments.listed("held_out", held_out)
    data = self.dataset(held_out)
    draws = self.sample(held_out, num_samples, **options)
    truth = self.model.codec.values(data.targets)
    margins = Margins.fit(draws, truth, arguments.level(level))
    kept = self.info.setdefault("margins", {})
    kept[repr(margins.level)] = margins.to_json()
    return margins

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
    xs = arguments.listed("xs", xs)
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
    plausible: bool = True,
    first: int = 0,
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
      plausible: draw anew what lies far outside of all training targets
        (`plausible.Range`); models of before know no range.
      first: place of `xs[0]`: calls for parts of many texts draw what one call
        for all of them does.

    Raises:
      InputError: a text or an option does not do.
    """
    rule, seed = arguments.sampling(temperature, top_p), arguments.seed(seed)
    num_samples = arguments.integer("num_samples", num_samples, 1)
    xs, codec = arguments.listed("xs", xs), self.model.codec
    first = arguments.integer("first", first, 0)
    if not xs:
      return np.empty((0, num_samples, codec.num_objectives))
    if prompt is not None and not isinstance(prompt, Prompt):
      prompt = Prompt(examples=arguments.listed("prompt", prompt))
    texts = self._texts(xs if prompt is None else self.prompted(xs, prompt))
    known = None
    if given is not None:
      given = arguments.listed("given", given)
      known = sampling.known_ids(self.model, given, len(xs))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed),
      np.arange(first, first + len(xs), dtype=np.uint32),
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
    draws, limits = codec.values(ids), self._restored(Range, "range")
    if limits is None or not plausible:
      return draws
    if prompt is not None:
      shown = codec.encode([example.y for example in prompt.examples])
      limits = limits.joined(Range.fit(codec.values(shown)))
    free = None
    if known is not None:
      free = known[:, :: codec.format.length] == START
    special = codec.format.special
    return limits.cut(draws, seed, free, keep_infinite=special, first=first)

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
    plausible: bool = True,
    first: int = 0,
  ) -> Prediction:
    """Mean, median, quantiles and a central interval, from draws.

    The interval is that of the draws, moved by what `calibrate` learned.

    Args:
      xs: B texts, or examples.
      num_samples: draws a text.
      level: probability of the interval.
      temperature: as for `sample`.
      top_p: as for `sample`.
      seed: as for `sample`.
      given: as for `sample`.
      prompt: as for `prompted`.
      plausible: as for `sample`.
      first: as for `sample`.

    Raises:
      InputError: a text or an option does not do.
    """
    level = arguments.level(level)
    draws = self.sample(
      xs,
      num_samples,
      temperature=temperature,
      top_p=top_p,
      seed=seed,
      given=given,
      prompt=prompt,
      plausible=plausible,
      first=first,
    )
    margins = self.info.get("margins", {}).get(repr(level))
    return Prediction(draws, level, margins and Margins.from_json(margins))

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
    grid, codec = arguments.integer("grid", grid, 2), self.model.codec
    known = arguments.listed("known", known)
    targets = codec.encode([getattr(y, "y", y) for y in known])
    fitted = Scale.fit(scale, codec.values(targets))
    xs = arguments.listed("xs", xs)
    if not xs:
      return np.empty((0, codec.num_objectives))
    numbers = fitted.grid(codec, grid)
    found = sampling.expected_scores(
      self.model, self.params, self._texts(xs), numbers
    )
    return fitted.values(found)

  def log_prob(
    self, given: Sequence[Example], *, density: bool = False
  ) -> np.ndarray:
    """Exact log-probability (B, O) of targets, renormalised over the grammar.

    That of an objective is given the text and the objectives before it; the
    sum over O is that of the example. 0 where an objective is missing. The
    probability of zero is the sum over its spellings.

    Args:
      given: examples; their numbers are rounded as the model writes them.
      density: divide by the distance to the next number, for a density.

    Raises:
      InputError: a text or a target does not do.
    """
    given = arguments.listed("given", given)
    if not given:
      return np.empty((0, self.num_objectives))
    data = self.dataset(given)
    found = sampling.score_texts(
      self.model, self.params, data.texts, data.targets[:, None]
    )[:, 0]
    if not density:
      return found
    return found - np.log(self.model.codec.widths(data.targets))

  def density(self, x: Any, values: Sequence[float]) -> np.ndarray:
    """Probability density of the first objective of a text at numbers (G,).

    Raises:
      InputError: a text or a number does not do.
    """
    codec = self.model.codec
    values = arguments.listed("values", values)
    if not values:
      return np.empty(0)
    targets = codec.encode([[value] for value in values])
    logprob = sampling.score_texts(
      self.model, self.params, self._texts([x]), targets[None]
    )[0, :, 0]
    return np.exp(logprob) / codec.widths(targets)[:, 0]

  def _texts(self, xs: Sequence[Any]) -> Texts:
    return token_batches.read_texts(
      self.tokenizer, map(text_of, xs), self.max_length
    )

  def _restored(self, kind: Any, name: str) -> Any:
    """What `info` keeps under a name, as `kind.from_json` reads it."""
    return kind.from_json(self.info[name]) if name in self.info else None
