"""Discrete searches: spaces, methods that propose, and the fronts they find.

  space = Product({"width": (64, 128), "engines": (16, 32, 64)})
  found = run(space, evaluate, Regularised(), budget=100, seed=0)
  found.front()

`evaluate` takes a list of genomes and gives (N, M) values, of which less is
better. A search depends on its seed and the values alone; so one that was
interrupted goes on when `store.kept` remembers the values. A `Genome` is a
point of a space, one number a decision; `METHODS` holds the methods by name.
"""

from research.search.methods import (
  METHODS,
  Exhaustive,
  Genetic,
  Random,
  Regularised,
  Reinforce,
  named,
)
from research.search.preference import Spread, Weighted
from research.search.running import Found, run
from research.search.space import Genome, Product, Space, Subsets

__all__ = [
  "METHODS",
  "Exhaustive",
  "Found",
  "Genetic",
  "Genome",
  "Product",
  "Random",
  "Regularised",
  "Reinforce",
  "Space",
  "Spread",
  "Subsets",
  "Weighted",
  "named",
  "run",
]
