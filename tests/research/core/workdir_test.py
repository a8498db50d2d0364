import json
import subprocess
import sys

import pytest

from models.errors import InputError
from research.core import workdir

_HOLD = """
import sys
from models.errors import InputError
from research.core import workdir
try:
  workdir.claim(sys.argv[1], {"seed": 1})
except InputError as error:
  sys.exit(f"error: {error}")
print("held", flush=True)
sys.stdin.read()
"""


def _process(folder):
  return subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(folder)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_one_process_has_a_workdir_until_it_ends_however_it_ends(tmp_path):
  with _process(tmp_path) as first:
    assert first.stdout.readline() == "held\n"
    with pytest.raises(InputError) as error:
      workdir.claim(tmp_path, {"seed": 1})
    words = f"is in use by process {first.pid} on "
    assert words in str(error.value) and " since 20" in str(error.value)
    first.kill()
  workdir.claim(tmp_path, {"seed": 1})
  workdir.claim(tmp_path, {"seed": 1})
  with _process(tmp_path) as second:
    assert "is in use by process" in second.communicate()[1]
  assert second.returncode == 1


def test_a_workdir_that_was_removed_and_made_again_is_locked_again(tmp_path):
  place = tmp_path / "run"
  workdir.claim(place, {})
  for file in place.iterdir():
    file.unlink()
  place.rmdir()
  workdir.claim(place, {"seed": 1})
  with _process(place) as second:
    assert "is in use by process" in second.communicate()[1]


def test_a_claim_keeps_flags_and_clears_drafts_away(tmp_path):
  (tmp_path / ".model.0123abcd.draft").mkdir()
  workdir.claim(tmp_path, {"rate": 0.5, "text": ("a",)})
  assert json.loads((tmp_path / "flags.json").read_text()) == {
    "rate": 0.5,
    "text": ["a"],
  }
  assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "flags.json"]
  with pytest.raises(InputError, match="--rate is 1 but .* with 0.5"):
    workdir.claim(tmp_path, {"rate": 1, "text": ["a"]})
  (tmp_path / "flags.json").write_text("[]")
  with pytest.raises(InputError, match=r"flags.json: is damaged"):
    workdir.claim(tmp_path, {})


def test_of_flags_with_parts_those_that_differ_are_told(tmp_path):
  given = {"source": {"kind": "csv", "train": 0.8}}
  (tmp_path / workdir.FLAGS).write_text(json.dumps(given))
  with pytest.raises(InputError) as caught:
    workdir.claim(tmp_path, {"source": {"kind": "csv", "train": 9}})
  assert "is {'train': 9} but" in str(caught.value)
  assert "started with {'train': 0.8}" in str(caught.value)
