"""Regression language models: predict a number from any text."""

import importlib

__all__ = ["Ensemble", "Example", "Prompt", "RegressionLM"]

_HOMES = {
  "Ensemble": "research.regression_lm.ensemble",
  "Example": "research.predictors.examples",
  "Prompt": "research.regression_lm.prompts",
  "RegressionLM": "research.regression_lm.api",
}


def __getattr__(name: str):
  # Names are imported at their first use: scripts read the options beside them
  # before they need a model.
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOMES[name]), name)
