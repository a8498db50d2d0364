#!/usr/bin/env bash
# Runs a script on this machine with XLA and JAX set up for training.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh [--dry-run] SCRIPT [ARGUMENT...]

Sets the environment of XLA and JAX, then becomes `python SCRIPT ARGUMENT...`.
What is set already stays as it is:

  XLA_PYTHON_CLIENT_MEM_FRACTION  share of GPU memory taken at the start (0.92);
                                  XLA_PYTHON_CLIENT_PREALLOCATE=false takes it
                                  bit by bit, for a GPU that others use too
  JAX_COMPILATION_CACHE_DIR       compiled programs, kept from run to run
                                  (${XDG_CACHE_HOME:-~/.cache}/frugax/jax)
  XLA_FLAGS                       with an NVIDIA GPU: transfers between devices
                                  are scheduled behind computation
  PYTHONPATH                      this checkout first
  PYTHON                          the interpreter (.venv/bin/python, or python3)

Options:
  --dry-run   print environment and command, run nothing
  -h, --help  print this
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 2
}

dry_run=false
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift ;;
    -*) fail "unknown option $1 (launch/local.sh --help lists them)" ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "no script named (launch/local.sh --help shows how)"
[[ -f $1 ]] || fail "no script at $1"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then
  python=python3
fi
command -v "$python" >/dev/null || fail "no Python at $python (try: make test)"

export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-true}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/frugax/jax
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export XLA_FLAGS=${XLA_FLAGS:-}
scheduler=--xla_gpu_enable_latency_hiding_scheduler
if command -v nvidia-smi >/dev/null && [[ $XLA_FLAGS != *"$scheduler"* ]]; then
  XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$scheduler=true"
fi

if $dry_run; then
  for name in XLA_PYTHON_CLIENT_PREALLOCATE XLA_PYTHON_CLIENT_MEM_FRACTION \
    JAX_COMPILATION_CACHE_DIR PYTHONPATH XLA_FLAGS; do
    printf '%s=%q\n' "$name" "${!name}"
  done
  printf '%q ' "$python" "$@"
  echo
  exit 0
fi
exec "$python" "$@"
