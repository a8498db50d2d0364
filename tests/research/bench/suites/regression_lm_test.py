import sys
import textwrap

import pytest

from models.errors import InputError
from models.regression_lm_config import RegressionLMConfig
from research.bench import ceilings, plan
from research.bench.suites import regression_lm as suites
from research.bench.suites.regression_lm import Suite
from research.cost import regression_lm as cost
from research.cost.roofline import Ceilings

TRAIN, SAMPLE = "16/1+1:2x16:bfloat16", "16/1+1:2x16x3:float32"


def run(**options):
  notes, chosen = [], plan.Plan(repeats=1)
  cases = Suite(**options).cases(chosen, notes.append)
  return list(plan.run(cases, chosen, print, notes.append)), notes


@pytest.fixture
def known(monkeypatch):
  limits = Ceilings(flops=1e12, bytes=1e11), "measured"
  monkeypatch.setattr(ceilings, "find", lambda dtype: limits)


def test_an_update_and_draws_are_timed(known):
  rows, notes = run(train=[TRAIN], sample=[SAMPLE])
  assert ["regress-lm is left out" in line for line in notes] == [True]
  assert [(row["op"], row["pass"]) for row in rows] == [
    ("update", "fwd+bwd"),
    ("draws", "fwd"),
  ]
  assert rows[1]["shape"] == "B2 L16 S3"
  for row in rows:
    assert row["model"] == "16/1+1" and row["params"] > 0
    assert row["ms"] > row["floor_ms"] > 0
    assert row["texts_per_second"] == pytest.approx(2e3 / row["ms"])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A peer that prints what it was asked for, and times of a second each."""
  (tmp_path / "regress_lm").mkdir()
  script = """
    import json, sys
    plan = json.loads(sys.argv[-1])
    print("warming up")
    for kind, name in (("train", "update"), ("sample", "draws")):
      for work in plan[kind]:
        row = {**work, "work": name, "seconds": 1.0, "params": 5}
        row |= {"compiled": work["setting"] != "tf32"} if kind == "train" else {
          "timed_texts": min(plan["peer_texts"], work["texts"])}
        print(json.dumps(row))
    sys.exit(plan["vocab_size"] != 32100)
  """
  path = tmp_path / "python"
  path.write_text(f"#!{sys.executable}\n{textwrap.dedent(script)}")
  path.chmod(0o755)
  # What ours takes is not looked at.
  stub = lambda model, work: suites.Call(start=lambda: None)
  monkeypatch.setattr(suites, "_update_call", stub)
  monkeypatch.setattr(suites, "_draw_call", stub)
  return {"peer": str(tmp_path), "peer_python": str(path)}


def test_the_peer_stands_beside_ours_by_setting(known, checkout):
  wide = TRAIN.replace("bfloat16", "float32")
  rows, notes = run(train=[TRAIN, wide], sample=[SAMPLE], **checkout)
  assert notes == []
  assert [(row["op"], row["dtype"], row["peer_detail"]) for row in rows] == [
    ("update", "bfloat16", "bfloat16"),
    ("update", "float32", "float32"),
    ("update", "float32", "tf32, not compiled"),
    ("draws", "float32", "float32"),
    ("draws", "float32", "tf32"),
  ]
  for row in rows:
    assert row["peer_ms"] == 1000.0 and row["peer_params"] == 5
  rows, _ = run(
    sample=[SAMPLE], **checkout, peer_texts=1, peer_settings=["tf32"],
  )  # fmt: skip
  assert rows[0]["peer_detail"] == "tf32, scaled up from 1 texts"


def test_a_peer_that_ends_early_is_said(known, checkout, monkeypatch):
  monkeypatch.setattr(suites, "_VOCAB", 9)
  rows, notes = run(train=[TRAIN], **checkout)
  assert notes == ["peer regress-lm is left out: exit code 1"]
  assert rows[0]["peer_ms"] == 1000.0  # What it told before is kept.


def test_products_by_hand():
  c = RegressionLMConfig.tiny()
  heads = c.num_heads * c.head_dim
  weights = c.d_model * (2 * heads + 2 * c.num_kv_heads * c.head_dim)
  layer = weights + 3 * c.d_model * c.d_ff + 2 * 10 * heads
  keys = 2 * c.d_model * c.num_kv_heads * c.head_dim
  found = c.encoder_layers * layer + c.decoder_layers * keys
  assert cost.encoder(c, 10) == 2 * 10 * found
  weights += 2 * c.d_model * heads
  layer = weights + 3 * c.d_model * c.d_ff
  layer += 2 * heads * (10 + c.target_length / 2)
  found = c.decoder_layers * layer + c.d_model * c.target_vocab_size
  assert cost.decoder(c, 10) == 2 * found


@pytest.mark.parametrize(
  "options, part",
  [
    ({"train": ["512/2+2:64:bfloat16"]}, "DECODER:BATCHxLENGTH"),
    ({"train": ["512/2+2:64x8:float64"]}, "write WIDTH"),
    ({"sample": ["500/2+2:4x8x2:float32"]}, "a multiple of 16"),
    ({"peer": "/nowhere"}, "give a checkout"),
    ({"peer_settings": ["int8"]}, "take from float32"),
  ],
)
def test_mistakes_name_the_flag(options, part):
  with pytest.raises(InputError) as caught:
    run(**options)
  assert part in str(caught.value)
