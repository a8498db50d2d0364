"""Scripts of other machines, against tools that record their arguments.

The tools are stubs on PATH: each writes what it was called with, and some do
what the tool would do on one machine. No cloud and no cluster is asked.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.house_rules_test import ROOT

SHELLS = [
  *sorted((ROOT / "launch").glob("*.sh")),
  ROOT / "launch" / "slurm.sbatch",
  ROOT / ".ci" / "run",
  *sorted((ROOT / "launch" / "reproduce").glob("*.sh")),
]
# What reproduce/ does on purpose: flags of a recipe are split into words, and
# values with commas stand in arrays.
SPLITS = "--exclude=SC2046,SC2054,SC2086,SC2155"
TRAIN = "experiments/train_lm.py"
CLOUD = {"ZONE": "us-a1-b", "PROJECT": "p", "CLUSTER": "c"}
RECORD = """#!{python}
import json, os, subprocess, sys
with open(os.environ["CALLS"], "a") as file:
  print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
command = [a for a in sys.argv if a.startswith("--command=")]
if os.environ.get("VM") and "ssh" in sys.argv:
  line = command[0].partition("=")[2]
  home = os.environ["VM"]
  sys.exit(subprocess.run(["bash", "-c", line], cwd=home).returncode)
"""


@pytest.fixture
def tools(tmp_path):
  """Runs a script of launch/ among stubs: what ended, and the calls."""
  folder, calls = tmp_path / "bin", tmp_path / "calls"
  folder.mkdir()
  for name in ("gcloud", "xpk", "kubectl", "sbatch", "scancel", "tail"):
    path = folder / name
    path.write_text(RECORD.format(python=sys.executable))
    path.chmod(0o755)
  # A checkout of one commit: what is sent is what git holds.
  root = tmp_path / "checkout"
  shutil.copytree(ROOT / "launch", root / "launch")
  (root / TRAIN).parent.mkdir()
  (root / TRAIN).write_text("print('trained')\n")
  git = ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b.c"]
  for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "One."]):
    subprocess.run([*git, *words], check=True)

  def run(script, *arguments, without=(), **environment):
    for name in without:
      (folder / name).unlink()
    calls.write_text("")
    done = subprocess.run(
      ["bash", root / "launch" / script, *arguments],
      capture_output=True,
      text=True,
      timeout=60,
      env={
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "USER": "someone",
        "CALLS": str(calls),
        "PYTHON": sys.executable,
        **environment,
      },
    )
    made = [json.loads(line) for line in calls.read_text().splitlines()]
    return done, made

  run.root, run.folder = root, folder
  return run


@pytest.mark.parametrize("path", SHELLS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
  tool = Path(sys.executable).with_name("shellcheck")
  more = [SPLITS] if path.parent.name == "reproduce" else []
  done = subprocess.run(
    [tool, "-x", *more, path], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
  "script, verb",
  [
    ("tpu_vm.sh", ["create", "a"]),
    ("tpu_vm.sh", ["copy", "a"]),
    ("tpu_vm.sh", ["run", "a", TRAIN, "--prompt=it's $HOME"]),
    ("tpu_vm.sh", ["logs", "a"]),
    ("tpu_vm.sh", ["stop", "a"]),
    ("tpu_vm.sh", ["delete", "a"]),
    ("gke_xpk.sh", ["create"]),
    ("gke_xpk.sh", ["run", "a", TRAIN, "--prompt=it's $HOME"]),
    ("gke_xpk.sh", ["logs", "a"]),
    ("gke_xpk.sh", ["delete", "a"]),
    ("gke_xpk.sh", ["delete-cluster"]),
    ("slurm.sbatch", ["run", "a", TRAIN, "--prompt=it's $HOME"]),
    ("slurm.sbatch", ["delete", "a"]),
  ],
  ids=lambda words: words if isinstance(words, str) else words[0],
)
def test_a_dry_run_prints_what_a_run_runs(tools, script, verb):
  printed, called = tools(script, "--dry-run", *verb, **CLOUD)
  assert printed.returncode == 0 and called == [], printed.stderr
  done, made = tools(script, *verb, **CLOUD)
  assert done.returncode == 0, done.stderr
  told = [shlex.split(line) for line in printed.stdout.splitlines()]
  own = ("mkdir", "git", "rm", "tar")
  assert made
  assert [words for words in told if words[0] not in own] == made


def test_a_tpu_vm_is_made_and_prepared(tools):
  done, made = tools(
    "tpu_vm.sh", "create", "a", **CLOUD, TYPE="v6e-16", SPOT="true", VERSION="v"
  )
  assert done.returncode == 0, done.stderr
  create, copy, unpack, install = made
  assert create == [
    *("gcloud", "compute", "tpus", "tpu-vm", "create", "a", "--zone=us-a1-b"),
    *("--project=p", "--accelerator-type=v6e-16", "--version=v", "--spot"),
  ]
  assert copy[4:6] == ["scp", str(tools.root / "runs/.launch/checkout.tar.gz")]
  for call in (copy, unpack, install):
    assert "--worker=all" in call
  assert ".[tpu]" in install[-1] and "requirements.lock" in install[-1]


def test_a_script_lives_on_all_workers_until_it_is_stopped(tools, tmp_path):
  vm = tmp_path / "vm"
  vm.mkdir()
  (tools.root / TRAIN).write_text(
    "import os, signal, sys, time\n"
    "def end(*_): print('saved', flush=True); sys.exit(143)\n"
    "signal.signal(signal.SIGTERM, end)\n"
    "print(sys.argv[1:], os.environ['FRUGAX_COMMIT'], flush=True)\n"
    "time.sleep(60)\n"
  )
  git = ["git", "-C", tools.root, "-c", "user.name=a", "-c", "user.email=a@b.c"]
  subprocess.run([*git, "commit", "-qam", "Two."], check=True)
  commit = subprocess.run(
    [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
  ).stdout.strip()
  # Of `copy`, the stub does what unpacks, and not what needs a network.
  done, made = tools("tpu_vm.sh", "copy", "a", **CLOUD)
  assert done.returncode == 0, done.stderr
  shutil.copy(tools.root / "runs/.launch/checkout.tar.gz", vm)
  line = made[1][-1].partition("=")[2]
  subprocess.run(["bash", "-c", line], cwd=vm, check=True)
  start = ("tpu_vm.sh", "run", "a", TRAIN, "--steps=3 4")
  done, _ = tools(*start, **CLOUD, VM=str(vm))
  assert done.returncode == 0, done.stderr
  log, until = vm / "frugax/runs/launch.log", time.monotonic() + 30
  try:
    while "--multihost" not in log.read_text():
      assert time.monotonic() < until
      time.sleep(0.02)
    assert log.read_text() == f"['--steps=3 4', '--multihost'] {commit}\n"
    done, _ = tools(*start, **CLOUD, VM=str(vm))
    assert done.returncode == 2 and "a script runs here" in done.stderr
  finally:
    done, _ = tools("tpu_vm.sh", "stop", "a", **CLOUD, VM=str(vm))
  while "saved" not in log.read_text():
    assert time.monotonic() < until
    time.sleep(0.02)
  # The number of what has ended may be that of another process.
  pid = tmp_path / "vm/frugax/runs/launch.pid"
  assert pid.read_text().split()[1:] == [TRAIN]
  other = subprocess.Popen(["sleep", "60"])
  try:
    pid.write_text(f"{other.pid} {TRAIN}\n")
    done, _ = tools("tpu_vm.sh", "stop", "a", **CLOUD, VM=str(vm))
    assert done.returncode == 2 and "no script runs here" in done.stderr
    assert other.poll() is None
  finally:
    other.kill()
    other.wait()


def test_xpk_is_given_the_commit_and_a_command(tools):
  (tools.root / "not_committed.txt").write_text("x")
  done, (call,) = tools("gke_xpk.sh", "run", "a", TRAIN, "--steps=3", **CLOUD)
  assert done.returncode == 0
  assert done.stderr == "warning: changes that are not committed stay here\n"
  sent = tools.root / "runs/.launch/checkout-a"
  assert (sent / TRAIN).exists() and not (sent / "not_committed.txt").exists()
  assert f"--script-dir={sent}" in call
  command = call[-1].removeprefix("--command=")
  assert command.startswith("pip install ")
  assert command.endswith(f"launch/local.sh {TRAIN} --steps=3 --multihost")
  _, (call,) = tools(
    "gke_xpk.sh", "run", "a", TRAIN, **CLOUD, IMAGE="i", MULTIHOST="false"
  )
  assert "--base-docker-image=i" in call
  assert call[-1].startswith("--command=FRUGAX_COMMIT=")
  assert call[-1].endswith(f"launch/local.sh {TRAIN}")


def test_slurm_gets_a_process_a_gpu(tools):
  done, (call,) = tools(
    "slurm.sbatch", "run", "a", TRAIN, NODES="2", GPUS="4", PARTITION="big"
  )
  assert done.returncode == 0, done.stderr
  assert {
    *("--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--partition=big"),
    *("--job-name=frugax-a", "--cpus-per-task=8", f"--chdir={tools.root}"),
  } <= set(call)
  script = str(tools.root / "launch/slurm.sbatch")
  words = [script, "job", "launch/local.sh", TRAIN, "--multihost"]
  assert call[call.index(script) :] == words
  directives = Path(script).read_text().splitlines()[1:4]
  assert "#SBATCH --requeue" in directives
  assert "#SBATCH --signal=B:USR1@120" in directives
  _, (call,) = tools("slurm.sbatch", "run", "a", TRAIN, GPUS="1")
  assert "--multihost" not in call
  # A job of the user that has the same name, of another program, goes on.
  _, (call,) = tools("slurm.sbatch", "delete", "a")
  assert call == ["scancel", "--name=frugax-a", "--user=someone"]


@pytest.mark.parametrize(
  "number, code, again",
  [(signal.SIGUSR1, 143, True), (signal.SIGTERM, 143, False), (None, 0, False)],
)
def test_a_job_is_queued_again_when_its_time_is_over(
  tools, tmp_path, number, code, again
):
  # srun is the step: it saves and ends on TERM, which scancel sends it; Slurm
  # sends TERM to steps by itself when it preempts a job or it is cancelled.
  (tools.folder / "srun").write_text(
    "#!/bin/bash\n"
    "echo srun $*; echo $$ >$STEP; [[ -n $LONG ]] || exit 0\n"
    "trap 'echo saved; exit 143' TERM\n"
    "for ((i = 0; i < 600; i++)); do sleep .05; done\n"
  )
  (tools.folder / "scancel").write_text(
    '#!/bin/bash\n[[ "$*" == "--signal=TERM 7" ]] && kill -TERM $(<$STEP)\n'
  )
  (tools.folder / "scontrol").write_text("#!/bin/bash\necho scontrol $*\n")
  for name in ("srun", "scancel", "scontrol"):
    (tools.folder / name).chmod(0o755)
  step = tmp_path / "step"
  job = subprocess.Popen(
    ["bash", tools.root / "launch/slurm.sbatch", "job", "launch/local.sh"],
    stdout=subprocess.PIPE,
    text=True,
    env={
      "PATH": f"{tools.folder}{os.pathsep}{os.environ['PATH']}",
      "SLURM_JOB_ID": "7",
      "SLURM_CPUS_PER_TASK": "6",
      "STEP": str(step),
      "LONG": "" if number is None else "1",
    },
  )
  until = time.monotonic() + 30
  while not step.exists() or not step.read_text().strip():
    assert time.monotonic() < until
    time.sleep(0.02)
  if number is not None:
    # The trap of the step follows the line that it tells its number by.
    time.sleep(0.2)
    job.send_signal(number)
    if number == signal.SIGTERM:
      os.kill(int(step.read_text()), number)
  out, _ = job.communicate(timeout=30)
  assert job.returncode == code, out
  words = "--kill-on-bad-exit=0 --wait=300 --cpus-per-task=6 launch/local.sh"
  assert out.startswith(f"srun {words}\n")
  assert ("scontrol requeue 7" in out) is again
  assert ("saved" in out) is (number is not None)


@pytest.mark.parametrize(
  "words, says",
  [
    (["tpu_vm.sh"], "no verb named"),
    (["tpu_vm.sh", "start", "a"], "unknown verb start"),
    (["tpu_vm.sh", "--fast"], "unknown option --fast"),
    (["tpu_vm.sh", "run", "A b", TRAIN], "no name as 'A b'"),
    (["tpu_vm.sh", "run", "a"], "no script named"),
    (["tpu_vm.sh", "run", "a", "train.py"], "no script at train.py"),
    (["tpu_vm.sh", "delete", "a", "b"], "delete takes a name alone, not 'b'"),
    (["gke_xpk.sh", "create", "a"], "create does not take 'a'"),
    (["gke_xpk.sh", "logs"], "no name as ''"),
    (["slurm.sbatch", "run", "a", "/bin/ls"], "no script at /bin/ls"),
    (["slurm.sbatch", "logs", "a"], "no log at"),
  ],
  ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(tools, words, says):
  done, made = tools(*words, **CLOUD)
  assert done.returncode == 2 and done.stdout == "" and made == []
  assert done.stderr.startswith("error: ") and says in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "words, missing",
  [
    (["tpu_vm.sh", "logs", "a"], "ZONE"),
    (["gke_xpk.sh", "create"], "CLUSTER"),
    (["gke_xpk.sh", "delete", "a"], "PROJECT"),
  ],
)
def test_what_must_be_set_is_named(tools, words, missing):
  known = {name: value for name, value in CLOUD.items() if name != missing}
  done, _ = tools(*words, **known)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {missing} is not set")


def test_a_missing_tool_is_named_with_its_remedy(tools):
  done, _ = tools("gke_xpk.sh", "create", without=["xpk"], **CLOUD)
  assert done.returncode == 2
  assert done.stderr == (
    "error: no xpk on PATH: pip install xpk, in an environment of its own\n"
  )


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch"])
def test_usage(name):
  done = subprocess.run(
    [ROOT / "launch" / name, "--help"], capture_output=True, text=True
  )
  assert done.returncode == 0
  assert done.stdout.startswith(f"Usage: launch/{name} [--dry-run] VERB ")
