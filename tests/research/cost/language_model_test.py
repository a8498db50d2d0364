"""Work of language models; Attamba's keys are counted one by one."""

import numpy as np
import pytest

from models import chunks
from models.attamba_config import AttambaConfig
from models.transformer_config import TransformerConfig
from research.cost import language_model


@pytest.mark.parametrize(
  "compressor, top", [("ssm", 0), ("mean", 0), ("mean", 3), ("none", 0)]
)
def test_keys_of_attamba_are_those_that_queries_see(compressor, top):
  length = 37
  config = AttambaConfig.tiny(
    compressor=compressor, window=5, sink=True, top_chunks=top
  )
  seen = np.zeros(length)
  for run in config.runs:
    own = np.array([min(t, config.window) + 1 for t in range(length)], float)
    spans = [(0, 0)]
    if compressor != "none":
      lasts = range(run.size - 1, length, run.size)
      spans += [(last - run.size + 1, last) for last in lasts]
    opens, ends = np.array(spans).T
    far = np.zeros(length)
    for first in np.asarray(chunks.seen_from(config, opens, ends)):
      far[first:] += 1
    # All are scored, and of as many as are chosen the values are mixed.
    own += (far + (np.minimum(far, top) if top else far)) / 2
    seen += run.num_layers * own
  found = language_model.forward(config, length)["mixing"]
  spaces = config.num_layers * (1 if config.share_kv else 2)
  mixer = config.mixer
  states = 4.0 * mixer.d_inner * mixer.d_state if compressor == "ssm" else 0.0
  expected = 4.0 * config.num_heads * config.head_dim * seen.mean()
  assert found == pytest.approx(expected + spaces * states)


@pytest.mark.parametrize("length", [3, 5, 37])
def test_keys_of_sliding_layers_are_those_of_their_window(length):
  config = TransformerConfig.tiny_gemma()
  every = np.arange(1, length + 1)
  seen = every.mean() + 2 * np.minimum(every, config.behind + 1).mean()
  found = language_model.forward(config, length)["mixing"]
  expected = 4.0 * config.num_heads * config.head_dim * seen
  assert found == pytest.approx(expected)
