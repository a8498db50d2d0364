"""What trained models keep to decode, and attend to, beside what they reach."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import input_files, language_model
from research.core import plots
from research.cost import language_model as flops
from research.cost import sizes
from research.language_model import architectures
from research.language_model.curves import Curve, by_name
from research.language_model.options import Options


def cache_bytes(config: language_model.Config, length: int) -> int:
  """Bytes that a text of `length` tokens leaves to decode from, in bfloat16."""
  state = jax.eval_shape(
    lambda: language_model.init_state(
      config, 1, cache_size=length, dtype=jnp.dtype("bfloat16")
    )
  )
  return sizes.nbytes(state)


def of_run(flags: Mapping[str, Any], length: int) -> dict[str, Any]:
  """Costs of the model that flags of a run describe.

  Args:
    flags: of `flags.json`.
    length: tokens that it has read when it decodes.

  Returns:
    "parameters", "cache_tokens", "cache_bytes", and "mixing_flops": of
    attention or recurrence, a token of a forward pass of the trained length.

  Raises:
    InputError: they are no flags of train_lm.py.
  """
  with input_files.errors_at("flags.json", wrong="is none of train_lm.py"):
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: flags[name] for name in names if name in flags})
    config = architectures.config_of(options, options.vocab_size)
  return {
    "parameters": language_model.num_params(config),
    "cache_tokens": length,
    "cache_bytes": cache_bytes(config, length),
    "mixing_flops": flops.forward(config, options.length)["mixing"],
  }


def add(
  rows: Sequence[dict[str, Any]], curves: Sequence[Curve], length: int
) -> list[dict[str, Any]]:
  """`rows` of `curves.rows` with the costs of their models."""
  first = {name: seeds[0].flags for name, seeds in by_name(curves).items()}
  return [row | of_run(first[row["model"]], length) for row in rows]


def plot(
  path: pathlib.Path, rows: Sequence[Mapping[str, Any]], title: str
) -> None:
  """Draws perplexity over cache, work of attention, and speed of training.

  Args:
    path: of the PNG.
    rows: of `add`; bars are the least and the greatest of the seeds.
    title: what the picture shows.
  """

  def series(x):
    return [
      plots.Series(
        name=row["model"],
        x=np.array([x(row)]),
        y=np.array([row["value"]]),
        low=None if row["low"] is None else np.array([row["low"]]),
        high=None if row["high"] is None else np.array([row["high"]]),
      )
      for row in rows
    ]

  length = rows[0]["cache_tokens"]
  panels = {
    f"cache at {length:,} tokens (MB)": series(
      lambda r: r["cache_bytes"] / 1e6
    ),
    "attention (MFLOP a token)": series(lambda r: r["mixing_flops"] / 1e6),
  }
  if all(row["tokens_per_second"] for row in rows):
    panels["training (thousand tokens/s)"] = series(
      lambda r: r["tokens_per_second"] / 1e3
    )
  plots.panels_plot(path, panels, "held-out perplexity (less is better)", title)
