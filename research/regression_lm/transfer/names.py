"""Names of the models and peers of a transfer comparison."""

from research.predictors import peers

MODELS = ("scratch", "pretrained")
WITH_SOURCES = "XGBoost with sources"
# Peers that predict every source first, and what they do that with.
PER_SOURCE = {
  "XGBoost per source + ridge": "XGBoost",
  "ridge per source + ridge": "ridge",
}
PEERS = (*peers.NAMES, WITH_SOURCES, *PER_SOURCE)
