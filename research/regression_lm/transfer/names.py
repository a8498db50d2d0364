"""Names of the models and peers of a transfer comparison."""

from research.predictors import peers

MODELS = ("scratch", "pretrained")
WITH_SOURCES = "XGBoost with sources"
# Peers that predict every source first, and what they do that with.
PER_SOURCE = {
  "XGBoost per source + ridge": "XGBoost",
  "ridge per source + ridge": "ridge",
}
BY_RIDGE = "ridge on its sources"
# Ridges are fitted to the numbers as they are, also where these are far apart:
# their errors are so many units, and they may predict less than nothing.
PLAIN = (*PER_SOURCE, BY_RIDGE)
PEERS = (*peers.NAMES, WITH_SOURCES, *PER_SOURCE)
