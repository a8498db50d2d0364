#!/usr/bin/env bash
# Makes a Cloud TPU VM, runs scripts on all of its workers, and deletes it.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh [--dry-run] VERB NAME [ARGUMENT...]

  create NAME                      makes the TPU VM, copies the checkout to all
                                   workers and installs it there
  copy NAME                        copies the checkout again, after a commit
  run NAME SCRIPT [ARGUMENT...]    starts a script on all workers and leaves it
                                   running; the same command goes on after an end
  logs NAME                        follows the output of a worker
  stop NAME                        SIGTERM on all workers: trainers save and end
  delete NAME                      deletes the TPU VM and all that lies on it

What is copied is what is committed. A run's --workdir is on a disk that all
workers share, such as a mounted Filestore; else what it made ends with the VM.

  ZONE         of the VM; must be set
  PROJECT      of the VM; else that of `gcloud config`
  TYPE         accelerator type (v5litepod-16)
  VERSION      of its software (v2-alpha-tpuv5-lite; v2-alpha-tpuv6e for v6e)
  SPOT=true    a cheaper VM, which may be taken away: `create` and `run` again
  WORKER       whose output `logs` shows (0)
  MULTIHOST=false  leaves out --multihost, which `run` gives the script: each
                   worker then trains by itself

Options:
  --dry-run   print every command, run nothing
  -h, --help  print this
TEXT
}

take_options launch/tpu_vm.sh "$@"
set -- "${words[@]}"
case $verb in
  create | copy | run | logs | stop | delete) ;;
  *) fail "unknown verb $verb (launch/tpu_vm.sh --help lists them)" ;;
esac
check_name "${1:-}"
name=$1
shift
[[ $verb == run || $# -eq 0 ]] || fail "$verb takes a name alone, not '$1'"
given ZONE us-central2-b
need gcloud "install the Google Cloud CLI"

place=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
tpu=(gcloud compute tpus tpu-vm)

# On WORKERS: a command line, in the home of whoever logs in.
on() {
  run "${tpu[@]}" ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

copy() {
  find_commit
  run mkdir -p "$(dirname "$archive")"
  run git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
  run "${tpu[@]}" scp "$archive" "$name:checkout.tar.gz" "${place[@]}" \
    --worker=all
  # Modules of before would be imported still, so their folders go first; runs/
  # and .venv stay.
  on all "mkdir -p frugax/runs && cd frugax && rm -rf ops models research \
experiments launch tests && tar -xzf ../checkout.tar.gz && \
echo $commit >runs/commit"
}

# The VM's own Python is older than 3.12, so uv brings one along.
install() {
  on all "cd frugax && python3 -m pip install -q --user uv && \
python3 -m uv venv -q --allow-existing --python 3.12 .venv && \
python3 -m uv pip install -q --python .venv -c requirements.lock -e '.[tpu]'"
}

# Whether the script that the file names still runs: the number may be that of
# another process by now. It sets `pid`.
running="read -r pid script 2>/dev/null <runs/launch.pid && \
grep -qaF -e \"\$script\" /proc/\$pid/cmdline 2>/dev/null"

case $verb in
  create)
    spot=()
    [[ ${SPOT:-false} == true ]] && spot=(--spot)
    run "${tpu[@]}" create "$name" "${place[@]}" \
      --accelerator-type="${TYPE:-v5litepod-16}" \
      --version="${VERSION:-v2-alpha-tpuv5-lite}" "${spot[@]}"
    copy
    install
    ;;
  copy)
    copy
    install
    ;;
  run)
    check_script "${1:-}"
    multihost=()
    [[ ${MULTIHOST:-true} == true ]] && multihost=(--multihost)
    line=$(quoted launch/local.sh "$@" "${multihost[@]}")
    # A TPU serves one process. The script is a session of its own, so that it
    # lives on when the connection ends.
    on all "cd frugax || exit 2; mkdir -p runs; \
if $running; then \
echo 'error: a script runs here: logs, or stop' >&2; exit 2; fi; \
export FRUGAX_COMMIT=\$(cat runs/commit 2>/dev/null); \
setsid $line >>runs/launch.log 2>&1 </dev/null & \
echo \$! $(quoted "$1") >runs/launch.pid"
    ;;
  logs)
    on "${WORKER:-0}" "tail -n +1 -F frugax/runs/launch.log"
    ;;
  stop)
    on all "cd frugax || exit 2; if $running; then kill -TERM \$pid; \
else echo 'error: no script runs here' >&2; exit 2; fi"
    ;;
  delete)
    run "${tpu[@]}" delete "$name" "${place[@]}" --quiet
    ;;
esac
