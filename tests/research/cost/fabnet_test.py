"""Counts of FABNet and its peers against closed forms, and a traced program."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from models import fabnet
from models.fabnet_config import FABNetConfig
from research.cost.fabnet import count
from research.lra import architectures
from research.lra.options import Options

LENGTH = 2048


def named(task, model, **options):
  return architectures.config(Options(task=task, model=model, **options))


@pytest.mark.parametrize("d, h, n", [(128, 256, 2), (64, 64, 6), (64, 128, 1)])
def test_fabnet_takes_what_the_papers_formulas_say(d, h, n):
  config = named("listops", "fabnet", d_model=d, d_ff=h, layers=n)
  bits = math.log2
  transforms = LENGTH * 2 * d * bits(d) + d * 2 * LENGTH * bits(LENGTH)
  # h outputs from ceil(h / d) stacks of d; d outputs from one stack of h.
  butterflies = LENGTH * 2 * h * (bits(d) + bits(h))
  found = count(config, LENGTH)
  assert found["mixers"].multiplications == n * transforms
  assert found["ffns"].multiplications == n * butterflies
  blocks = architectures.block_parameters(config)
  untied = 2 * h * (bits(d) + bits(h)) + d + h + 4 * d
  assert blocks == n * untied
  tied = dataclasses.replace(config, tied_butterflies=True)
  shared = (h // d) * 4 * (d - 1) + 4 * (h - 1)
  assert architectures.block_parameters(tied) == n * (shared + d + h + 4 * d)
  assert count(tied, LENGTH) == found


def test_a_contraction_takes_all_its_stacks():
  # From 256 to 1,024 channels are four stacks; the published count has one.
  config = named("retrieval", "fabnet", d_model=1024, d_ff=256)
  ffns = count(config, 4096)["ffns"].multiplications
  pair, layers = 2, 2
  assert ffns == pair * layers * 4096 * (2 * 1024 * 10 + 4 * 2 * 256 * 8)


def test_the_transformer_takes_what_its_formula_says():
  d, h, n = 64, 128, 2
  config = named("listops", "transformer")
  found = count(config, LENGTH)["blocks"].multiplications
  assert found == n * (
    2 * LENGTH**2 * d + 4 * LENGTH * d**2 + 2 * LENGTH * d * h
  )


# Quotients of the Transformer's to FABNet's multiplications and parameters of
# blocks, and all parameters. The paper says 10 to 66 and 2 to 22.
RATIOS = {
  "listops": (24.0, 3.903, 0.658),
  "text": (20.15, 1.743, 0.2755),
  "image": (60.95, 17.73, 1.661),
  "pathfinder32": (14.48, 4.378, 1.397),
  "retrieval": (6.476, 0.7106, 0.0433),
}


@pytest.mark.parametrize("task", RATIOS)
def test_quotients_of_the_published_sizes(task):
  both = [named(task, model) for model in ("transformer", "fabnet")]
  length = both[0].max_length
  work = [count(one, length)["blocks"].multiplications for one in both]
  size = [architectures.block_parameters(one) for one in both]
  whole = [fabnet.num_params(one) for one in both]
  found = [dense / ours for dense, ours in (work, size, whole)]
  assert found == pytest.approx(RATIOS[task], rel=1e-3)


def _products(jaxpr) -> float:
  """Multiplications of all matrix products of a program."""
  found = 0.0
  for equation in jaxpr.eqns:
    inner = 1
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      found += math.prod(equation.outvars[0].aval.shape) * math.prod(
        left[axis] for axis in contracted
      )
    if equation.primitive.name == "scan":
      inner = equation.params["length"]
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
    ):
      sub = getattr(value, "jaxpr", value)
      if hasattr(sub, "eqns"):
        found += inner * _products(sub)
  return found


@pytest.mark.parametrize(
  "changes",
  [
    {"ffn": "dense", "projections": "dense"},
    {"ffn": "low_rank", "projections": "monarch", "rank": 3},
    {"ffn": "block_diagonal", "projections": "dense", "blocks": 4},
  ],
)
def test_a_traced_program_multiplies_as_much(changes):
  config = FABNetConfig.tiny(
    fourier_layers=0, attention_layers=2, d_model=16, d_ff=32, **changes
  )
  params = fabnet.abstract_params(config)
  tokens = jax.ShapeDtypeStruct((1, 16), np.int32)
  lengths = jax.ShapeDtypeStruct((1,), np.int32)
  compute = fabnet.Compute(attention="xla")
  traced = jax.make_jaxpr(
    lambda *a: fabnet.logits(config, *a, compute=compute)
  )(params, tokens, lengths)
  found = count(config, 16)
  wanted = found["blocks"].multiplications + found["head"].multiplications
  assert _products(traced.jaxpr) == wanted
