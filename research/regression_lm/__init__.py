"""Regression language models: predict a number from any text."""

from research.predictors.examples import Example
from research.regression_lm.api import RegressionLM
from research.regression_lm.ensemble import Ensemble
from research.regression_lm.prompts import Prompt

__all__ = ["Ensemble", "Example", "Prompt", "RegressionLM"]
