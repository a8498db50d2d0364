import json
import sys

import pytest

from research.results import files, merging


@pytest.mark.parametrize(
  ("text", "left"),
  (
    ("--text=/data/books/test.txt.xz", "--text=test.txt.xz"),
    ("--model=runs/a,/data/b/model", "--model=runs/a,model"),
    ("/data/corpora", "corpora"),
    ("--rate=1e-3", "--rate=1e-3"),
    ("--prompt=a / b, c", "--prompt=a / b, c"),
    ("https://host/a=/", "https://host/a=/"),
    ("", ""),
  ),
)
def test_of_places_of_one_machine_the_name_is_left(text, left):
  assert files.without_places(text) == left


def test_a_result_names_paths_from_the_folder_of_the_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  words = [f"--text={tmp_path}/data/a.txt", f"--result={tmp_path}/r.json"]
  monkeypatch.setattr(sys, "argv", ["eval.py", *words, "--data=/else/where"])
  rows = [{"data": f"{tmp_path}/data/a.txt", "value": 1.0}, {"value": 2.0}]
  files.write_result(tmp_path / "r.json", rows, files.command(), 1.0)
  kept = json.loads((tmp_path / "r.json").read_text())
  assert kept["command"].endswith(" --text=data/a.txt --data=where")
  assert kept["rows"] == [{"data": "data/a.txt", "value": 1.0}, {"value": 2.0}]
  # The caller's rows are not changed.
  assert rows[0]["data"].startswith(str(tmp_path))


def result(path, device="NVIDIA H200 x1", **more):
  kept = {
    "command": "python experiments/eval.py --text=/data/a.txt",
    "commit": "1234567", "device": device, "versions": {"jax": "1"},
    "seconds": 2.0, "rows": [{"data": "/data/a.txt", "value": 1.0}],
  } | more  # fmt: skip
  path.write_text(json.dumps(kept))
  return str(path)


def test_joined_results_name_the_largest_host_and_no_places(tmp_path):
  one = result(tmp_path / "a.json")
  more = {"commit": "89abcde", "command": "python b.py", "complete": False}
  two = result(tmp_path / "b.json", "NVIDIA H200 x2", **more)
  merging.main(str(tmp_path / "all.json"), one, f"second={two}")
  joined = json.loads((tmp_path / "all.json").read_text())
  assert joined == {
    "command": "research/results/merging.py of: python experiments/eval.py"
    " --text=a.txt; python b.py",
    "commit": "1234567, 89abcde",
    "device": "NVIDIA H200 x2",
    "versions": {"jax": "1"},
    "seconds": 4.0,
    "complete": False,
    "rows": [
      {"data": "a.txt", "value": 1.0},
      {"data": "a.txt", "value": 1.0, "model": "second"},
    ],
  }


def test_results_of_other_versions_are_not_joined(tmp_path, capsys):
  one = result(tmp_path / "a.json")
  two = result(tmp_path / "b.json", versions={"jax": "2"})
  with pytest.raises(SystemExit) as left:
    merging.main(str(tmp_path / "all.json"), one, two)
  assert left.value.code == 2
  assert "b.json: its versions differs" in capsys.readouterr().err
  assert not (tmp_path / "all.json").exists()
