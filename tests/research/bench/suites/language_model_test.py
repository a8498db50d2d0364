import jax
import jax.numpy as jnp
import pytest

from models.errors import InputError
from models.mamba_config import MambaConfig
from models.transformer_config import TransformerConfig
from research.bench import ceilings, plan
from research.bench.suites import decoding
from research.bench.suites.language_model import Suite
from research.cost.roofline import Ceilings


@pytest.fixture(autouse=True)
def given(monkeypatch, quickly_compiled):
  limits = Ceilings(flops=1e12, bytes=1e11), "measured"
  monkeypatch.setattr(ceilings, "find", lambda dtype: limits)


def run(**options):
  notes, chosen = [], plan.Plan(repeats=1, peers=["mamba_ssm", "transformers"])
  cases = Suite(**options).cases(chosen, notes.append)
  return list(plan.run(cases, chosen, print, notes.append)), notes


@pytest.mark.parametrize(
  "config", [MambaConfig.tiny(num_layers=2), TransformerConfig.tiny()]
)
def test_the_error_of_decoding_sees_the_layers(config):
  params = decoding.initial(config)
  without = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      0 * leaf if "out_proj" in str(path) or "o_proj" in str(path) else leaf
    ),
    params,
  )
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  exact = decoding.logits(config, wide, 2, "xla")
  error = lambda params: (
    jnp.linalg.norm(decoding.logits(config, params, 2, "xla") - exact)
    / jnp.linalg.norm(exact)
  )
  assert error(params) < 0.03
  assert error(without) > (0.3 if config.family == "mamba2" else 0.01)


def test_decoding_and_training_are_timed():
  rows, notes = run(
    decode=["tiny_mamba2:2", "tiny_transformer:2x16"],
    train=["mamba2/tiny:1x32"],
    tokens=2,
    unroll=0,
  )
  assert [(row["op"], row["model"], row["shape"]) for row in rows] == [
    ("decode", "tiny_mamba2", "B2"),
    ("decode", "tiny_transformer", "B2 C16"),
    ("update", "mamba2/tiny", "B1 L32"),
  ]
  recurrent, cached, update = rows
  for row in rows:
    assert row["ms"] > row["floor_ms"] > 0 and row["peer_ms"] is None
  # bfloat16 has 8 bits; the logits are sums of some layers' roundings.
  assert 0 < recurrent["error"] < 0.05 and 0 < cached["error"] < 0.05
  assert recurrent["state_dtype"] == "float32"
  assert cached["state_dtype"] == "bfloat16"
  assert update["params"] > 1e5 and update["implementation"] == "default"
  assert len(notes) == 4
  for part in (
    "mamba_ssm",
    "transformers",
    "'mosaic_gpu' does",
    "only Mamba-2",
  ):
    assert sum(part in note for note in notes) == 1


def test_bytes_of_a_transformer_are_weights_and_the_filled_cache():
  case = decoding.case("tiny_transformer:3x16", ["xla"], 8)
  c = TransformerConfig.tiny()
  layer = c.d_model * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
  layer += 3 * c.d_model * c.d_ff
  # Norms are not counted. In the mean of 8 steps 16 and 4.5 tokens are seen.
  weights = c.num_layers * layer + c.vocab_size * c.d_model
  token = 2 * c.num_layers * c.num_kv_heads * c.head_dim
  (phase,) = case.phases
  assert phase.bytes == 2 * (weights + 3 * 20.5 * token)
  seen = 2 * 20.5 * c.num_layers * c.num_heads * c.head_dim
  assert phase.flops == 2 * 3 * (weights + seen)


def test_a_call_begins_at_the_same_context_every_time():
  build = decoding.case("tiny_transformer:2x16", ["xla"], 3).ours["xla"]
  call = build()
  for _ in range(3):
    _, state = arguments = call.inputs()
    assert state.length.tolist() == [16, 16]
    assert float(jnp.abs(state.k).min()) >= 0 and state.k.shape[2] == 19
    call.start(*arguments)


@pytest.mark.parametrize(
  "options, part",
  [
    ({"decode": ["mamba2_70b:1"]}, "write MODEL:BATCH"),
    ({"decode": ["mamba2_130m"]}, "write MODEL:BATCH"),
    ({"decode": ["mamba2_130m:1x8"]}, "write MODEL:BATCH"),
    ({"decode": ["llama3_2_1b:1"]}, "MODEL:BATCHxCONTEXT"),
    ({"train": ["mamba2/60m"]}, "write ARCH/PRESET:BxL"),
    ({"train": ["mamba2/70b:1x8"]}, "preset"),
    ({"train": ["rnn/60m:1x8"]}, "unknown"),
    ({"steps": ["cuda"]}, "take from xla"),
  ],
)
def test_bad_input_names_the_flag(options, part):
  with pytest.raises(InputError, match=part):
    run(**options)
