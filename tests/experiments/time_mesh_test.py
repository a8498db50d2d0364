"""Times on meshes as a user takes them; what rows hold is tested beside it."""

import json
import os
import subprocess

from tests.experiments.processes import ROOT, run

SCRIPT = ("experiments/time_mesh.py", "--measure=.01", "--dtype=float32")


def test_losses_of_one_device_and_of_many_are_compared(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  path = tmp_path / "rows.json"
  before = {"case": "tiny_mamba2:4x16@data:2", "ms": 3.0}
  begun = {"rows": [before], "seconds": 100.0, "begun": "rlm=x"}
  path.write_text(json.dumps(begun))
  code, out, err = run(
    tmp_path,
    SCRIPT,
    f"--case={before['case']}",
    "--case=losses=tiny_transformer:4x16@data:2",
    "--updates=4",
    f"--result={path}",
  )
  assert code == 0, err
  found = json.loads(path.read_text())
  assert found["complete"] is True and found["left_out"] == []
  assert found["seconds"] > 100 and "begun" not in found
  # What the file held before is left as it was.
  assert found["rows"][0] == before and before["case"] not in out
  (losses,) = found["rows"][1:]
  assert (losses["mesh"], losses["moved_to"]) == ("data:2", "data:1")
  assert losses["first_loss"] != losses["last_loss"]
  # Sums of float32 in another order.
  assert losses["most_relative"] < 1e-5 > losses["most_relative_moved"]


def test_the_script_of_all_sizes_prints_its_commands(tmp_path):
  def commands(**more):
    done = subprocess.run(
      ["launch/reproduce/scaling.sh", "--dry-run", tmp_path / "out"],
      cwd=ROOT, env=os.environ | more, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    return done.stdout.splitlines()

  lines = commands(GPUS="4")
  one, two, four, losses = (line for line in lines if line[0] != "#")
  assert "CUDA_VISIBLE_DEVICES=0 " in one and "@data:1 " in one
  # Sizes below that of the host have GPUs of their own.
  assert "CUDA_VISIBLE_DEVICES=1,2 " in two and "tensor:2" in two
  assert "CUDA_VISIBLE_DEVICES=0,1,2,3 " in four and "weak.lm=" in four
  assert "--dtype=float32" in losses and "--updates=50" in losses
  assert "# left out: 8 devices (GPUS=4)" in lines
  from research.bench.mesh_cases import Case

  cases = [word for line in lines for word in line.split() if "--case=" in word]
  texts = [word.removeprefix("--case=") for word in cases]
  assert len({Case.parse(text).text for text in texts}) == len(texts) > 40
