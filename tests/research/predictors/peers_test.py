"""Peers choose their settings as a search over all of them would."""

import numpy as np
import pytest

from research.predictors import peers
from research.predictors.peers import Problem


@pytest.mark.parametrize("many", [1, 5000], ids=["ends early", "whole"])
def test_a_ridge_takes_the_penalty_of_the_whole_grid(many, monkeypatch):
  from sklearn.linear_model import Ridge
  from sklearn.model_selection import GridSearchCV

  draw = np.random.default_rng(0)
  words = "add mul dot conv relu norm sum".split()
  counts = draw.integers(0, 6, (80, len(words)))
  texts = [" ".join(np.repeat(words, count)) for count in counts]
  values = counts @ draw.normal(size=len(words)) + draw.normal(size=80)
  problem = Problem(
    train_texts=texts[:60],
    train_features=np.zeros((60, 0)),
    train_values=values[:60],
    test_texts=texts[60:],
    test_features=np.zeros((20, 0)),
  )
  train, test = peers._tfidf(problem.train_texts, problem.test_texts)
  mean, spread = values[:60].mean(), values[:60].std()
  whole = GridSearchCV(Ridge(), {"alpha": np.logspace(-3, 3, 13)}, cv=5)
  whole.fit(train, (values[:60] - mean) / spread)
  monkeypatch.setattr(peers, "_MANY", many)
  found = peers.predict("ridge on TF-IDF", problem, threads=1)
  expected = whole.predict(test) * spread + mean
  np.testing.assert_allclose(found, expected, rtol=1e-9)
