"""Recipes beside each other: quality against bytes of weights.

Every recipe is judged by the same held-out text, once as a whole and once
decoded token by token with the state that the recipe keeps, along texts that
the float model draws, and by tasks. Intervals are paired with the float model.
Models of several training seeds are quantized one after the other in the same
process, since they run the same programs, and their mean is told beside each.
"""

import dataclasses
import functools
import multiprocessing
import pathlib
import pickle
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from models import input_files, language_model
from models.convert import load
from models.errors import InputError
from research.core import files, metrics
from research.core import workdir as workdir_lib
from research.cost import sizes as cost
from research.quantization import apply, llama_cpp, quality, smoothing
from research.quantization.measures import Judge, Plan, Sample, Seen, mean_of
from research.quantization.recipes import LLAMA_CPP, RECIPES, get
from research.text.tokenizing import of_checkpoint

FLOAT = "float"
# How the line of a recipe ends that the folder had already.
BEFORE = "done before"
# Channels behind every norm that are planted.
_PLANTED = 4
_SETUP = "setup.pickle"
# Characters by which tokenizers are compared.
_PROBE = 20_000
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """A comparison, as every process is given it.

  Attributes:
    name: of the models, in tables.
    models: what `convert.load` takes, one a training seed.
    tokenizer: as `of_checkpoint` takes it.
    plan: what to judge by.
    plant: factor of planted outliers; 0 plants none.
    seed: of the channels.
    precision: of float32 matrix products.
    arrays: whether weights of our recipes are judged as the arrays that they
      stand for, by a program that most recipes share.
    flags: all that decides the numbers, as JSON values.
  """

  name: str
  models: tuple[str, ...]
  tokenizer: str | None
  plan: Plan
  plant: float
  seed: int
  precision: str
  arrays: bool
  flags: Mapping[str, Any]


def names_for(config: language_model.Config) -> list[str]:
  """The methods and baselines that a model can take; formats are asked for."""
  mixes = language_model.layers_may_differ(config)
  names = [n for n, one in RECIPES.items() if mixes or not one.float_share]
  return [*names, *LLAMA_CPP]


def compare(
  setup: Setup,
  names: Sequence[str],
  workers: int,
  workdir: str | None = None,
) -> Iterator[tuple[str, Rows, str]]:
  """Judges the float models, and then every recipe.

  Args:
    setup: of the comparison.
    names: of recipes, and of `LLAMA_CPP`.
    workers: recipes at a time, each in a process of its own; 1 stays in this
      one. Most of the time goes to compiling.
    workdir: folder of what is done, which is read from there when the same
      comparison is asked for again; None keeps nothing.

  Yields:
    As they are done: the name, rows of a result file, and a line about them.
  """
  if workdir is None:
    with tempfile.TemporaryDirectory() as folder:
      yield from compare(setup, names, workers, folder)
    return
  folder = pathlib.Path(workdir)
  workdir_lib.claim(folder, setup.flags)
  # A search takes longest, and so begins first.
  names = [FLOAT, *sorted(names, key=lambda name: not _searches(name))]
  if workers == 1:
    own = Comparison(setup, folder)
    yield from map(own.part, names)
    return
  files.write_bytes(folder / _SETUP, pickle.dumps(setup))
  spawn = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(workers, spawn) as pool:
    # Every recipe is compared with what the float models say, so these come
    # first.
    numbers = range(len(setup.models))
    for job in [pool.submit(_look, folder, number) for number in numbers]:
      job.result()
    jobs = [pool.submit(_part, folder, name) for name in names]
    try:
      for job in futures.as_completed(jobs):
        yield job.result()
    finally:
      pool.shutdown(cancel_futures=True)


def _searches(name: str) -> bool:
  ours = name not in (FLOAT, *LLAMA_CPP)
  return ours and bool(get(name).float_share)


# A process keeps its models, and what it compiled for them, from job to job.
@functools.cache
def _opened(folder: pathlib.Path) -> "Comparison":
  return Comparison(pickle.loads((folder / _SETUP).read_bytes()), folder)


def _look(folder: pathlib.Path, number: int) -> None:
  _opened(folder).first(number)


def _part(folder: pathlib.Path, name: str) -> tuple[str, Rows, str]:
  return _opened(folder).part(name)


class Comparison:
  """Float models, and what is found of recipes for them.

  Args:
    setup: of the comparison.
    folder: where what is done is kept.

  Raises:
    InputError: the models differ in more than their numbers, or the held-out
      text is too short.
  """

  def __init__(self, setup: Setup, folder: pathlib.Path):
    jax.config.update("jax_default_matmul_precision", setup.precision)
    self._setup, self._folder = setup, folder
    probe, opened = setup.plan.text.text[:_PROBE], []
    self._models: list[quality.Model] = []
    for model in setup.models:
      checkpoint = load(model)
      config, params = checkpoint.config, checkpoint.params
      tokenizer = of_checkpoint(checkpoint, setup.tokenizer)
      opened.append((config, tuple(tokenizer.encode(probe))))
      if opened[-1] != opened[0]:
        raise InputError(
          f"--model={model}: has other sizes or another tokenizer than"
          f" {setup.models[0]}: models of one comparison differ in their seeds"
        )
      if setup.plant:
        params = smoothing.plant_outliers(
          config,
          params,
          factor=setup.plant,
          count=_PLANTED,
          seed=setup.seed,
        )
      self._models.append((config, params))
    self._judge = Judge(tokenizer, setup.plan)

  def part(self, name: str) -> tuple[str, Rows, str]:
    """The name, rows of a recipe for all models, and a line about them."""
    path = self._folder / f"{name}.json"
    if path.exists():
      again = "remove it, and the recipe runs again"
      rows = input_files.read_kept(path, list, again)
      return name, rows, f"{name}: {BEFORE}"
    rows, line = self._part(name)
    files.write_json(path, metrics.to_json_value(rows))
    return name, rows, line

  def first(self, number: int) -> Seen:
    """What is seen of a float model."""
    path = self._folder / f"float_{number}.npz"
    owner = {**self._setup.flags, "number": number}
    look = lambda: self._judge.look(self._models[number], None).arrays()
    return Seen.of(files.kept(path, owner, look))

  def _part(self, name: str) -> tuple[Rows, str]:
    sizes, samples = [], []
    seconds = {"quantize": 0.0, "judge": 0.0}
    for number, model in enumerate(self._models):
      began, first = time.perf_counter(), self.first(number)
      seen, model, size = first, *self._quantized(name, model)
      made = time.perf_counter()
      if name != FLOAT:
        seen = self._judge.look(model, first.drawn)
      samples.append(self._judge.compare(seen, first))
      sizes.append(size)
      seconds["quantize"] += made - began
      seconds["judge"] += time.perf_counter() - made
    rows = self._rows(name, sizes, samples)
    value = {row["metric"]: row["value"] for row in rows}
    line = (
      f"{name}: {rows[0]['bytes'] / 1e6:,.1f} MB, perplexity"
      f" {value['perplexity']:.3f}, decoding x {value['decoding_ratio']:.4f};"
      f" quantized in {seconds['quantize']:.0f} s, judged in"
      f" {seconds['judge']:.0f} s"
    )
    return rows, line

  def _quantized(self, name: str, model: quality.Model):
    """A model by a recipe, and its bytes."""
    config, params = model
    if name == FLOAT:
      return model, cost.weight_bytes(config, params)
    if name in LLAMA_CPP:
      params, size = llama_cpp.round_trip(config, params, name)
      return (config, params), size
    recipe = get(name)
    batches = self._setup.plan.batches if recipe.is_static else None
    config, params = apply.quantize(config, params, recipe, batches)
    size = cost.weight_bytes(config, params)
    if self._setup.arrays:
      params = jax.jit(apply.as_arrays)(params)
    return (config, params), size

  def _rows(
    self, name: str, sizes: list[int], samples: list[dict[str, Sample]]
  ) -> Rows:
    """Rows of each model where there are several, and those of their mean."""
    whole = cost.weight_bytes(*self._models[0])
    count = len(samples)
    groups = [({"seeds": count}, samples, sizes)]
    if count > 1:
      groups = [
        ({"seed": number, "seeds": 1}, [samples[number]], [sizes[number]])
        for number in range(count)
      ] + groups
    idea, what = _described(name)
    found = []
    for more, some, own in groups:
      size = round(float(np.mean(own)))
      common = {
        "system": self._models[0][0].family,
        "model": self._setup.name,
        "data": self._setup.plan.text.data,
        "method": name,
        "idea": idea,
        "what": what,
        "budget": size / whole,
        "bytes": size,
        **more,
      }
      for metric in some[0]:
        sample = mean_of([one[metric] for one in some])
        interval = sample.interval()._asdict()
        found.append({**common, "metric": metric, **interval})
    return found


def _described(name: str) -> tuple[str, str]:
  """Whose idea it is, and what it is."""
  if name == FLOAT:
    return FLOAT, "no rounding"
  if name in LLAMA_CPP:
    return "llama.cpp", "weights as llama.cpp keeps them"
  return get(name).method, get(name).text
