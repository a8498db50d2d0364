import functools
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import pytest

from models import language_model
from models.attamba_config import AttambaConfig
from models.errors import InputError
from models.mamba_config import MambaConfig
from models.state_format import StateFormat
from models.transformer_config import TransformerConfig
from ops import dispatch
from research.bench import ceilings, plan
from research.bench.suites import decoding
from research.bench.suites.language_model import Suite
from research.cost import language_model as cost
from research.cost.roofline import Ceilings
from research.cost.sizes import nbytes

ROOT = pathlib.Path(__file__).resolve().parents[4]


@pytest.fixture(autouse=True)
def given(monkeypatch):
  limits = Ceilings(flops=1e12, bytes=1e11), "measured"
  monkeypatch.setattr(ceilings, "find", lambda dtype: limits)


def run(**options):
  notes, chosen = [], plan.Plan(repeats=1, peers=["mamba_ssm", "transformers"])
  cases = Suite(**options).cases(chosen, notes.append)
  return list(plan.run(cases, chosen, print, notes.append)), notes


@pytest.mark.parametrize(
  ("spec", "part", "least"),
  [
    ("tiny_mamba2:2", "out_proj", 0.3),
    ("tiny_transformer:2x1", "o_proj", 0.01),
  ],
)
def test_the_error_of_decoding_sees_the_layers(spec, part, least):
  what = decoding.parse(spec)
  params = decoding.initial(what.config)
  without = jax.tree_util.tree_map_with_path(
    lambda path, leaf: 0 * leaf if part in str(path) else leaf, params
  )
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  exact = decoding.logits(what, wide, "xla")
  error = lambda params: (
    jnp.linalg.norm(decoding.logits(what, params, "xla") - exact)
    / jnp.linalg.norm(exact)
  )
  assert error(params) < 0.03
  assert error(without) > least


def test_a_smaller_state_stays_small_and_close():
  found = {}
  for dtype in ("float32", "bfloat16"):
    form = StateFormat.parse(dtype)
    what = decoding.parse("tiny_mamba2:2", state_format=form)
    params, state = decoding.initial(what.config), decoding.begin(what, 0, 1)
    step = jax.jit(functools.partial(language_model.decode, what.config))
    for token in range(3):
      tokens = jnp.asarray([[token], [token + 1]], jnp.int32)
      _, state = step(params, tokens, state)
    (found[dtype],) = (layer.ssm for layer in state.layers)
    assert found[dtype].dtype == dtype
  wide, narrow = (state.astype(jnp.float32) for state in found.values())
  distance = jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide)
  # Each step rounds to 8 bits.
  assert 1e-4 < distance < 3 * 2**-8


def test_a_smaller_state_has_a_lower_floor():
  wide, narrow = (
    decoding.case(decoding.parse("tiny_mamba2:64", state_format=form), ["xla"])
    for form in map(StateFormat.parse, ("float32", "bfloat16"))
  )
  assert narrow.columns["state_format"] == "bfloat16"
  c = MambaConfig.tiny()
  ssm = 64 * c.num_layers * c.num_heads * c.head_dim * c.d_state
  # Read and written, by two bytes less.
  assert wide.phases[0].bytes - narrow.phases[0].bytes == 2 * 2 * ssm


def test_few_bits_have_a_lower_floor_and_are_timed():
  rows, _ = run(
    decode=["tiny_mamba1:2", "tiny_mamba2:2", "tiny_transformer:2x16"],
    steps=["xla"],
    tokens=2,
    state_format=["int8+conv=int8"],
    weights_format=["int4:16/int8"],
  )
  for row in rows:
    assert row["weights_format"] == "int4:16/int8"
    if "mamba" in row["model"]:
      assert row["state_format"] == "int8:row+conv=int8:row"
    assert 0.001 < row["error"] < 0.5
    shape = row["shape"].replace(" C", "x").removeprefix("B")
    floats = decoding.parse(f"{row['model']}:{shape}", tokens=2)
    (phase,) = decoding.case(floats, ["xla"]).phases
    assert row["bytes_moved"] < 0.65 * phase.bytes


def test_formats_are_timed_side_by_side_and_prompts_too():
  rows, _ = run(
    decode=["tiny_mamba2:2"],
    prefill=["tiny_mamba2:2x16"],
    steps=["xla"],
    tokens=2,
    state_format=["bfloat16", "int8"],
    weights_format=["bfloat16", "int8"],
  )
  kept = [(r["op"], r["weights_format"], r["state_format"]) for r in rows]
  assert kept == [
    ("decode", "bfloat16", "bfloat16"),
    ("decode", "int8", "int8:row"),
    ("prefill", "bfloat16", "bfloat16"),
    ("prefill", "int8", "int8:row"),
  ]
  for wide, narrow in (rows[:2], rows[2:]):
    assert narrow["weights_bytes"] < 0.6 * wide["weights_bytes"]
    assert narrow["state_bytes"] < wide["state_bytes"]
  prompt = rows[2]
  assert prompt["shape"] == "B2 L16" and prompt["ms"] > 0
  work = cost.forward(MambaConfig.tiny(), 16)
  assert prompt["gflop"] == pytest.approx(
    2 * (16 * (work["layers"] + work["mixing"]) + work["head"]) / 1e9
  )
  assert prompt["tokens_per_second"] == pytest.approx(32e3 / prompt["ms"])


def test_decoding_and_training_are_timed():
  rows, notes = run(
    decode=["tiny_mamba2:2", "tiny_transformer:2x16"],
    train=["transformer/tiny:1x32"],
    tokens=2,
    unroll=0,
  )
  assert [(row["op"], row["model"], row["shape"]) for row in rows] == [
    ("decode", "tiny_mamba2", "B2"),
    ("decode", "tiny_transformer", "B2 C16"),
    ("update", "transformer/tiny", "B1 L32"),
  ]
  recurrent, cached, update = rows
  for row in rows:
    assert row["ms"] > row["floor_ms"] > 0 and row["peer_ms"] is None
  # bfloat16 has 8 bits; the logits are sums of some layers' roundings.
  assert 0 < recurrent["error"] < 0.05 and 0 < cached["error"] < 0.05
  assert recurrent["state_format"] == "float32"
  assert cached["state_format"] == "bfloat16"
  assert update["params"] > 1e5 and update["implementation"] == "default"
  assert len(notes) == 4
  for part, count in (
    ("mamba_ssm", 1),
    ("transformers", 1),
    ("'mosaic_gpu' does not run here", 2),
  ):
    assert sum(part in note for note in notes) == count


def test_a_model_without_a_kernel_says_so():
  case = decoding.case(decoding.parse("tiny_mamba1:1"), ["mosaic_gpu"])
  with pytest.raises(dispatch.UnsupportedError, match="mamba1 has no step by"):
    case.ours["mosaic_gpu"]()


def test_bytes_of_a_transformer_are_weights_and_the_filled_cache():
  what = decoding.parse("tiny_transformer:3x16", tokens=8)
  case = decoding.case(what, ["xla"])
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


def test_steps_that_read_some_pages_are_timed():
  rows, _ = run(
    decode=["tiny_transformer:2x64"], steps=["xla"], tokens=2,
    keep_pages=[1.0, 0.5],
  )  # fmt: skip
  dense, some = rows
  assert [row["shape"] for row in rows] == ["B2 C64", "B2 C64 keep 0.5"]
  c = TransformerConfig.tiny()
  cache = 2 * 2 * 65.5 * 2 * c.num_layers * c.num_kv_heads * c.head_dim
  # Summaries are two numbers for the 32 of a page.
  saved = dense["bytes_moved"] - some["bytes_moved"]
  assert saved == pytest.approx((1 - 0.5 - 1 / 16) * cache)
  assert max(row["error"] for row in rows) < 0.03
  with pytest.raises(InputError, match="has no cache"):
    decoding.parse("tiny_mamba2:2", keep_pages=0.5)


def test_an_attamba_is_asked_for_by_its_context():
  what = decoding.parse("tiny_attamba:3x16", tokens=8)
  case = decoding.case(what, ["xla"])
  assert case.shape == "B3 C16" and not case.peers
  c = AttambaConfig.tiny()
  params = sum(
    leaf.size for leaf in jax.tree.leaves(decoding.initial(what.config))
  )
  # Six chunks of 24 tokens and that of token 0, and a window of three.
  keys = 2 * c.num_layers * 3 * (6 + 1 + 3) * c.kv_width
  state = jax.eval_shape(lambda: decoding.begin(what, 0, 24))
  cache = state.layers[0].cache
  assert cache.chunk_k.size + cache.chunk_v.size + 2 * cache.ring_k.size == keys
  (phase,) = case.phases
  assert phase.bytes == 2 * params + nbytes(state)
  with pytest.raises(InputError, match="an Attamba MODEL:BATCHxCONTEXT"):
    decoding.parse("tiny_attamba:3")
  with pytest.raises(
    dispatch.UnsupportedError, match="does not run here: needs an"
  ):
    case.ours["xla"].func("mosaic_gpu")


def test_a_call_begins_at_the_same_context_every_time():
  what = decoding.parse("tiny_transformer:2x16", tokens=3)
  call = decoding.case(what, ["xla"]).ours["xla"]()
  for _ in range(3):
    (batch,) = call.inputs()
    assert batch.state.tokens.tolist() == [0, 0]
    leaves = jax.tree.leaves(batch.state.model)
    counts = [x for x in leaves if x.dtype == jnp.int32]
    assert counts and all(x.tolist() == [16, 16] for x in counts)
    (size,) = {x.shape[2] for x in leaves if x.ndim == 5}
    assert size == 16 + 3
    assert call.start(batch).tokens.shape == (2, 3, 1)


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
    ({"state_format": ["int5"]}, "there is no number format 'int5'"),
    ({"weights_format": ["int4:128/int5"]}, "^weights_format=.*'int5'"),
    (
      {"weights_format": ["int8"] * 2, "state_format": ["int8"] * 3},
      "weights_format: 2 for 3 of state_format",
    ),
    ({"prefill": ["mamba2_130m:1"]}, "prefill=.*write MODEL:BATCHxTOKENS"),
    ({"prefill": ["mamba3:1x8"]}, "with MODEL one of"),
  ],
)
def test_bad_input_names_the_flag(options, part):
  with pytest.raises(InputError, match=part):
    run(**options)


def test_the_script_of_all_formats_prints_its_commands():
  script = pathlib.Path("launch/reproduce/quantized_speed.sh")
  done = subprocess.run(
    ["bash", ROOT / script, "--dry-run", "runs/x"],
    capture_output=True, text=True, check=True,
    env={**os.environ, "GPUS": "2", "MODELS": "mamba2_8b mamba_2_8b"},
  )  # fmt: skip
  lines = done.stdout.splitlines()
  timed = [line for line in lines if "--result=" in line]
  # A line for each pair of formats to compile, and one for each model to time.
  assert len(lines) == 2 * 6 + 2 and len(timed) == 2
  for line, name in zip(timed, ("mamba2_8b", "mamba_2_8b"), strict=True):
    given = dict(word.split("=") for word in line.split() if "=" in word)
    assert given["--result"] == f"runs/x/quantized_speed_{name}.json"
    options = {
      option: given[f"--{option}"].split(",")
      for option in ("decode", "prefill", "weights_format", "state_format")
    }
    cases = list(Suite(**options).cases(plan.Plan(), print))
    assert len(cases) == 6 * (4 + 2)
    assert {case.model for case in cases} == {name}
