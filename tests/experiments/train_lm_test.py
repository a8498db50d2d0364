"""train_lm.py and plot_lm.py as a user runs them, on a text of one page."""

import dataclasses
import json
import math
import re
import signal
import time
import typing

import jax
import numpy as np
import pytest

from models import convert, language_model, tokenizer
from models.text import load_text
from research.core import metrics
from research.language_model import architectures, recall
from research.language_model.options import Options
from research.text import packing, token_cache
from tests.experiments import scripts
from tests.experiments.processes import ROOT, run, run_together, start
from tests.models import parameter_counts

FLAGFILES = sorted(
  path
  for path in (ROOT / "experiments/flagfiles").glob("*.flags")
  if "--arch=" in path.read_text()
)
STATE_SPACES = ("mamba2", "hybrid")
STEPS = 40
TRAIN = [
  "experiments/train_lm.py",
  "--flagfile=experiments/flagfiles/transformer_tiny.flags",
  "--tokenizer=bytes",
  "--layers=1",
  "--d_model=32",
  "--d_ff=64",
  "--length=32",
  "--batch=32",
  f"--steps={STEPS}",
  "--learning_rate=0.03",
  "--warmup=5",
  "--eval_every=10",
  "--eval_windows=16",
  "--checkpoint_every=6",
  "--log_every=1",
  "--peak_tflops=0.1",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Holds a short text, and the programs that runs compiled."""
  home = tmp_path_factory.mktemp("lm")
  (home / "text.txt").write_text(load_text("gutenberg:slice")[:30000])
  return home


def train_flags(home, workdir):
  return (
    f"--text={home / 'text.txt'}",
    f"--cache={home / 'cache'}",
    f"--workdir={workdir}",
  )


def lines_of(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def trained(home):
  workdir = home / "trained"
  code, out, err = run(home, TRAIN, *train_flags(home, workdir))
  assert code == 0, err
  assert "Traceback" not in err and "Warning" not in err
  return workdir, out


def test_a_run_learns_and_says_so(trained):
  workdir, out = trained
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(STEPS))
  evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
  assert len(evaluations) == 4
  assert rows[0]["loss"] == pytest.approx(math.log(257), abs=0.5)
  assert evaluations == sorted(evaluations, reverse=True)
  found = re.search(r"unigram entropy of the training text (\S+) nats", out)
  counts = np.bincount(list((workdir.parent / "text.txt").read_bytes()))
  share = counts[counts > 0] / counts.sum()
  # The document's boundary, and the held-out end that is left out.
  entropy = -np.sum(share * np.log(share))
  assert float(found[1]) == pytest.approx(entropy, abs=0.01)
  assert evaluations[-1] < float(found[1])
  assert "the loss is below it" in out
  assert f"held-out loss {evaluations[-1]:.4f} nats" in out


def test_a_run_writes_its_workdir(trained):
  workdir, out = trained
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  keys = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"}
  assert keys <= rows[0].keys()
  assert rows[-1]["tokens"] == STEPS * 32 * 32
  flags = json.loads((workdir / "flags.json").read_text())
  assert flags["arch"] == "transformer" and flags["steps"] == STEPS
  assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
  result = json.loads((workdir / "result.json").read_text())
  assert result["rows"][0]["value"] == rows[-1]["eval_loss"]
  assert result["device"].startswith("cpu")
  report = (workdir / "report.md").read_text()
  assert "held-out perplexity" in report and "curves.png" in report
  assert f"model: {workdir / 'model'}" in out


def test_the_model_can_be_read_and_scores_as_it_was_told(home, trained):
  workdir, _ = trained
  checkpoint = convert.load(workdir / "model")
  text = tokenizer.load_tokenizer(checkpoint)
  assert text.decode(text.encode("é")) == "é"
  corpus = token_cache.load_corpus(
    [str(home / "text.txt")], text, home / "cache", progress=False
  )
  (batch,) = packing.held_out(
    corpus.split(0.02)[1], rows=16, length=32, most=16
  )
  tokens = batch["tokens"]
  logits = jax.jit(
    lambda tokens: language_model.forward(
      checkpoint.config, checkpoint.params, tokens
    )
  )(tokens[:, :-1])
  # The table was padded to 384 rows, which no program must see.
  assert logits.shape[-1] == checkpoint.params["embed"]["table"].shape[0] == 257
  logits = np.asarray(logits, np.float64)
  chosen = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
  loss = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
  last = metrics.read_jsonl(workdir / "metrics.jsonl")[-1]
  assert last["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_killed_it_goes_on_and_ends_the_same(home, trained):
  workdir = home / "killed"
  process = start(home, TRAIN, *train_flags(home, workdir))
  until = time.monotonic() + 300
  while len(lines_of(workdir)) < 9 and process.poll() is None:
    assert time.monotonic() < until
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=300)
  assert process.returncode == -signal.SIGKILL
  assert 9 <= len(lines_of(workdir)) < STEPS
  assert not (workdir / "model").exists()
  code, out, err = run(home, TRAIN, *train_flags(home, workdir))
  assert code == 0, err
  one, other = (
    [metrics.without_timing(row) for row in metrics.read_jsonl(path)]
    for path in (workdir / "metrics.jsonl", trained[0] / "metrics.jsonl")
  )
  assert one == other
  name = "model/model.safetensors"
  assert (workdir / name).read_bytes() == (trained[0] / name).read_bytes()

  plot, result = home / "plots/p.png", home / "plots/r.json"
  code, out, err = scripts.run(
    "plot_lm",
    f"--runs={trained[0]},{workdir}",
    f"--plot={plot}",
    f"--result={result}",
  )
  assert code == 0, err
  assert "| trained |" in out and "| killed " in out
  assert plot.read_bytes().startswith(b"\x89PNG")
  rows = json.loads(result.read_text())["rows"]
  assert rows[0]["value"] == rows[1]["value"] == pytest.approx(
    math.exp(one[-1]["eval_loss"])
  )  # fmt: skip


@pytest.mark.parametrize(
  "arguments, says",
  [
    (("--preset=7b",), ("--preset='7b'", "tiny, 60m, 130m")),
    (("--arch=mamba3",), ("arch", "mamba1", "hybrid")),
    (("--length=40000",), ("--length=40000", "--text")),
  ],
)
def test_a_mistake_is_one_line_and_exit_2(home, arguments, says):
  workdir = home / "mistake"
  flags = (*TRAIN[1:], *train_flags(home, workdir), *arguments)
  code, _, err = scripts.run("train_lm", *flags)
  assert code == 2, err
  (line,) = [s for s in err.splitlines() if s.startswith("error: ")]
  assert "Traceback" not in err
  for part in says:
    assert part in line
  assert not workdir.exists()


def test_a_workdir_takes_no_other_flags(home, trained):
  before = {p: p.read_bytes() for p in trained[0].rglob("*") if p.is_file()}
  flags = (*TRAIN[1:], *train_flags(home, trained[0]), "--beta1=0.5")
  code, _, err = scripts.run("train_lm", *flags)
  assert code == 2
  (line,) = [s for s in err.splitlines() if s.startswith("error: ")]
  assert "--beta1 is 0.5" in line and "--workdir" in line
  after = {p: p.read_bytes() for p in trained[0].rglob("*") if p.is_file()}
  assert after == before


def options_of(path):
  """Options of a flagfile, and the flags that are the script's own."""
  fields = {field.name: field for field in dataclasses.fields(Options)}
  words = [s[2:] for s in path.read_text().splitlines() if s.startswith("--")]
  given = dict(word.split("=", 1) for word in words)
  # A flagfile says by which script it is run.
  recalls = "experiments/train_recall.py" in path.read_text()
  name = "train_recall" if recalls else "train_lm"
  code = (ROOT / f"experiments/{name}.py").read_text()
  script = set(re.findall(r'\(\s*"(\w+)"', code))
  if recalls:
    script |= {field.name for field in dataclasses.fields(recall.Task)}
  assert given.keys() <= fields.keys() | script
  values = {}
  for name in given.keys() & fields.keys():
    kind, *_ = typing.get_args(fields[name].type) or (fields[name].type,)
    value = given[name]
    values[name] = value == "true" if kind is bool else kind(value)
  return Options(**values)


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_flagfiles_describe_models(path):
  options = options_of(path)
  config = architectures.config_of(options, options.vocab_size)
  expected = {"60m": 58e6, "30m": 34e6, "recall": 1e5}
  expected = next((n for k, n in expected.items() if k in path.stem), 5e5)
  assert parameter_counts.expected(config) == pytest.approx(expected, rel=0.35)


def test_30m_flagfiles_are_alike():
  paths = [path for path in FLAGFILES if "attamba_30m" in path.stem]
  found = [options_of(path) for path in paths]
  counts = [
    parameter_counts.expected(architectures.config_of(o, o.vocab_size))
    for o in found
  ]
  assert len(found) == 9 and max(counts) < 1.025 * min(counts)
  attention = [n for n, o in zip(counts, found) if o.arch not in STATE_SPACES]
  assert len(attention) == 7 and max(attention) < 1.005 * min(attention)
  names = [field.name for field in dataclasses.fields(Options)]
  for name in names[names.index("tie_embeddings") :]:
    assert len({getattr(options, name) for options in found}) == 1, name


def test_60m_attamba_flagfiles_are_alike():
  paths = [path for path in FLAGFILES if "attamba_60m" in path.stem]
  found = [options_of(path) for path in paths]
  counts = [
    parameter_counts.expected(architectures.config_of(o, o.vocab_size))
    for o in found
  ]
  assert len(found) == 3 and min(counts) > 6e7
  assert max(counts) < 1.005 * min(counts)
  names = [field.name for field in dataclasses.fields(Options)]
  for name in names[names.index("tie_embeddings") :]:
    assert len({getattr(options, name) for options in found}) == 1, name


def test_60m_flagfiles_read_the_same_tokens():
  names = ("transformer", "mamba1", "mamba2")
  found = [
    options_of(ROOT / f"experiments/flagfiles/lm_60m_{name}.flags")
    for name in names
  ]
  assert [options.arch for options in found] == list(names)
  alike = [dataclasses.replace(o, arch="transformer") for o in found]
  assert alike[0] == alike[1] == alike[2]


def test_two_processes_are_one_and_one_of_them_writes(home, trained):
  first, second = home / "first", home / "second"
  told = run_together(
    home, TRAIN, [train_flags(home, first), train_flags(home, second)]
  )
  assert [code for code, _, _ in told] == [0, 0], told[0][2] + told[1][2]
  assert not second.exists()
  names = lambda folder: {path.name for path in folder.iterdir()}
  assert names(first) == names(trained[0])
  one, two = (
    metrics.read_jsonl(folder / "metrics.jsonl")
    for folder in (trained[0], first)
  )
  # Another order of sums grows with every update, in gradients first.
  for name, count in (("loss", STEPS), ("grad_norm", 8)):
    np.testing.assert_allclose(
      [row[name] for row in two[:count]],
      [row[name] for row in one[:count]],
      rtol=1e-4,
    )
