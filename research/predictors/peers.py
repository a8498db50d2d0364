"""Tabular and text peers on the same split: ridge, XGBoost, MLP.

They are given what a practitioner would give them: TF-IDF of words to a ridge
whose strength is chosen by cross-validation; the features of a table to XGBoost
and an MLP, and an SVD of the TF-IDF of texts that say more. A Gaussian process
takes features that are counts. Of programs a compiler's own counts predict the
time, and sizes that can be counted in the text predict everything. Numbers that
are far apart are given to all as logarithms.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from models.errors import InputError
from research.predictors.number_scale import NumberScale

NAMES = (
  "ridge on TF-IDF",
  "XGBoost",
  "XGBoost on token counts",
  "MLP",
  "Gaussian process",
)
# These peers are given `Problem.train_costs`.
COST_NAMES = ("cost analysis", "XGBoost on the cost analysis")
# This takes `Problem.train_sizes`.
SIZE_NAMES = ("XGBoost on sizes",)
# So many rows are worth several processes or threads.
_MANY = 5000
_KNOWN = (*NAMES, *COST_NAMES, *SIZE_NAMES)


class PeerError(InputError):
  """A peer that can do nothing with these rows; others may."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """Training and test parts of one objective.

  Attributes:
    train_texts: N texts.
    train_features: (N, F), F may be 0.
    train_values: (N,) finite.
    test_texts: M texts.
    test_features: (M, F).
    seed: of what is random.
    train_words: N texts that say more than the features; none where they say
      the same.
    test_words: M texts likewise.
    train_costs: (N, C) non-negative counts of a compiler; C may be 0.
    test_costs: (M, C).
    train_sizes: (N, K) that can be counted in the text; K may be 0.
    test_sizes: (M, K).
    scale: of the numbers; None takes that of `train_values`.
  """

  train_texts: Sequence[str]
  train_features: np.ndarray
  train_values: np.ndarray
  test_texts: Sequence[str]
  test_features: np.ndarray
  seed: int = 0
  train_words: Sequence[str] = ()
  test_words: Sequence[str] = ()
  train_costs: np.ndarray | None = None
  test_costs: np.ndarray | None = None
  train_sizes: np.ndarray | None = None
  test_sizes: np.ndarray | None = None
  scale: NumberScale | None = None


def predict(
  name: str, problem: Problem, *, threads: int | None = None
) -> np.ndarray:
  """Trains a peer and predicts the test part, (M,).

  Args:
    name: of `NAMES` or `COST_NAMES`.
    problem: what is known and asked.
    threads: of linear algebra and of trees, and processes of a search; None
      for as many as there are cores.

  Raises:
    InputError: the peer is unknown, or its package is not installed.
    PeerError: it can do nothing with these rows.
  """
  asked([name])
  scale = problem.scale or NumberScale.of(problem.train_values)
  values = scale.forward(problem.train_values)
  mean, spread = values.mean(), values.std() or 1.0
  try:
    # The limit of threads holds for libraries that are loaded, so they are
    # imported first.
    import sklearn.linear_model  # noqa: F401
    import threadpoolctl

    with threadpoolctl.threadpool_limits(threads):
      found = _peers()[name](problem, (values - mean) / spread, threads)
  except ImportError as error:
    raise InputError(
      f"peer {name!r} needs {error.name}: pip install -e '.[dev]'"
    ) from error
  except InputError:
    raise
  except Exception as error:  # Of a library, on numbers it cannot take.
    line = " ".join(str(error).split())[:200]
    raise PeerError(f"{type(error).__name__}: {line}") from error
  found = np.asarray(found, np.float64) * spread + mean
  if scale.is_log:
    # The logarithm is bounded, because one far beyond the training values
    # would become infinite.
    low = 0.0 if scale.unit else values.min() - 5
    found = np.clip(found, low, values.max() + 5)
  return scale.back(found)


def _peers() -> dict[str, Callable[..., np.ndarray]]:
  """The function of every name."""
  functions = (_ridge, _xgboost, _token_counts, _mlp, _process, _cost_line,
               _cost_trees, _size_trees)  # fmt: skip
  return dict(zip(_KNOWN, functions))


def asked(
  names: Sequence[str], known: Sequence[str] = _KNOWN, what: str = "peer"
) -> list[str]:
  """The names without "none", which stands for no peer.

  Args:
    names: as a user gives them.
    known: those that there are.
    what: they are of.

  Raises:
    InputError: one is unknown.
  """
  for name in names:
    if name not in (*known, "none"):
      raise InputError(f"{what} {name!r} is unknown: take some of {known}")
  return [name for name in names if name != "none"]


def _tfidf(train_texts: Sequence[str], test_texts: Sequence[str]):
  from sklearn.feature_extraction.text import TfidfVectorizer

  vectorizer = TfidfVectorizer(
    lowercase=False,
    token_pattern=r"[A-Za-z_]+|\d|[^\sA-Za-z_\d]",
    ngram_range=(1, 3),
    max_features=50000,
    sublinear_tf=True,
  )
  train = vectorizer.fit_transform(train_texts)
  return train, vectorizer.transform(test_texts)


def _ridge(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  from sklearn.linear_model import Ridge
  from sklearn.model_selection import cross_val_score

  train, test = _tfidf(problem.train_texts, problem.test_texts)
  folds = min(5, len(values))
  if folds < 2:
    return np.zeros(test.shape[0])
  jobs = _workers(values, threads)
  found, best, worse = 1.0, -np.inf, 0
  # Solving takes longer the weaker the penalty is (a minute instead of a
  # second, of 30,000 texts), so strong ones come first, and where rows are
  # many the search ends after two in a row that are worse than the best.
  for alpha in np.logspace(3, -3, 13):
    score = cross_val_score(
      Ridge(alpha=alpha), train, values, cv=folds, n_jobs=jobs
    ).mean()
    worse = 0 if score >= best else worse + 1
    if not worse:
      found, best = alpha, score
    elif worse == 2 and len(values) >= _MANY:
      break
  return Ridge(alpha=found).fit(train, values).predict(test)


def _workers(values: np.ndarray, threads: int | None) -> int:
  """One where rows are few: starting others takes longer than they save."""
  return 1 if len(values) < _MANY else threads or -1


def _dense(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
  """The features, and an SVD of the words where these say more."""
  features = problem.train_features, problem.test_features
  if not features[0].shape[1]:
    return _svd(problem.train_texts, problem.test_texts, problem.seed)
  if not len(problem.train_words):
    return features
  words = _svd(problem.train_words, problem.test_words, problem.seed)
  return tuple(np.hstack(pair) for pair in zip(features, words))


def _svd(train_texts, test_texts, seed: int) -> tuple[np.ndarray, np.ndarray]:
  from sklearn.decomposition import TruncatedSVD

  train, test = _tfidf(train_texts, test_texts)
  size = min(100, train.shape[1] - 1, train.shape[0] - 1)
  svd = TruncatedSVD(max(size, 1), random_state=seed)
  return svd.fit_transform(train), svd.transform(test)


def _xgboost(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  return _boosted(problem, values, threads, *_dense(problem))


def _token_counts(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  """How often each word, whole number and sign stands in the text."""
  from sklearn.feature_extraction.text import CountVectorizer

  vectorizer = CountVectorizer(
    lowercase=False,
    token_pattern=r"[A-Za-z_]\w*|\d+|[^\sA-Za-z_\d]",
    max_features=5000,
    dtype=np.float32,
  )
  train = vectorizer.fit_transform(problem.train_texts)
  test = vectorizer.transform(problem.test_texts)
  return _boosted(problem, values, threads, train, test)


def _cost_line(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  """A line through the logarithms of the counts: powers, as a roofline has."""
  from sklearn.linear_model import LinearRegression

  train, test = np.log1p(problem.train_costs), np.log1p(problem.test_costs)
  return LinearRegression().fit(train, values).predict(test)


def _cost_trees(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  return _boosted(
    problem, values, threads, problem.train_costs, problem.test_costs
  )


def _size_trees(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  return _boosted(
    problem, values, threads, problem.train_sizes, problem.test_sizes
  )


def _boosted(
  problem: Problem, values: np.ndarray, threads: int | None, train, test
) -> np.ndarray:
  import xgboost

  model = xgboost.XGBRegressor(
    n_estimators=500,
    learning_rate=0.05,
    max_depth=6,
    subsample=0.8,
    colsample_bytree=0.8,
    min_child_weight=1,
    random_state=problem.seed,
    n_jobs=_workers(values, threads),
  )
  return model.fit(train, values).predict(test)


def _process(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  """Of ranks, by the roots of counts; kernel and noise by their likelihood."""
  from sklearn.gaussian_process import GaussianProcessRegressor, kernels

  known, asked = problem.train_features, problem.test_features
  if not known.shape[1] or not min(known.min(), asked.min()) >= 0:
    raise PeerError("peer 'Gaussian process' needs features that are counts")
  level = np.linspace(0, 1, len(values))
  ranks = np.interp(values, np.sort(values), level)
  kernel = kernels.ConstantKernel() * kernels.RBF(3.0) + kernels.WhiteKernel(
    0.1
  )
  model = GaussianProcessRegressor(kernel, normalize_y=True)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model.fit(np.sqrt(known), ranks)
  return np.interp(model.predict(np.sqrt(asked)), level, np.sort(values))


def _without_gaps(
  train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Medians of the training part in the place of NaN, and where they stand."""
  gaps = np.isnan(train).any(axis=0) | np.isnan(test).any(axis=0)
  there = ~np.isnan(train)
  medians = np.array(
    [np.median(c[t]) if t.any() else 0.0 for c, t in zip(train.T, there.T)]
  )
  fill = lambda part: np.concatenate(
    [np.where(np.isnan(part), medians, part), np.isnan(part[:, gaps])], axis=1
  )
  return fill(train), fill(test)


def _mlp(
  problem: Problem, values: np.ndarray, threads: int | None
) -> np.ndarray:
  from sklearn.exceptions import ConvergenceWarning
  from sklearn.neural_network import MLPRegressor
  from sklearn.preprocessing import StandardScaler

  train, test = _without_gaps(*_dense(problem))
  scaler = StandardScaler().fit(train)
  model = MLPRegressor(
    hidden_layer_sizes=(128, 128),
    alpha=1e-3,
    max_iter=400,
    early_stopping=len(values) >= 50,
    n_iter_no_change=20,
    random_state=problem.seed,
  )
  with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
    model.fit(scaler.transform(train), values)
  # A column that is nearly constant in training must not decide alone.
  return model.predict(np.clip(scaler.transform(test), -10, 10))
