#!/usr/bin/env bash
# Makes .venv ready, once: what requirements.lock pins, and this checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.ready     # holds what the environment was made for
busy=$venv/.installing # there while pip works: left behind by a broken run
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

fail() {
  echo "error: $1" >&2
  exit 2
}

modern() {
  "$@" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# The folder is part of it: an editable install does not survive a move.
wanted=$(cat requirements.lock pyproject.toml <(pwd) | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && modern $venv/bin/python; then
  exit 0
fi

install() {
  local log=$venv/install.log status=0
  touch $busy
  $venv/bin/python -m pip install -q "$@" >"$log" 2>&1 </dev/null || status=$?
  rm -f $busy
  if [[ $status -ne 0 ]]; then
    tail -n 5 "$log" >&2
    fail "pip install $* failed: is a package index in reach? (log: $log)"
  fi
}

if [[ -e $busy ]] || ! modern $venv/bin/python ||
  ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=
  for name in ${PYTHON:-python3.12 python3}; do
    if modern "$name"; then
      python=$name
      break
    fi
  done
  [[ -n $python ]] ||
    fail "no Python >= 3.12 as ${PYTHON:-python3.12 or python3}: install it"
  echo "creating $venv with $python"
  rm -rf $venv
  "$python" -m venv $venv >/dev/null 2>&1 </dev/null || {
    rm -rf $venv
    fail "$python -m venv failed: install its venv module (python3.12-venv)"
  }
fi

echo "installing requirements.lock into $venv (once; some minutes)"
rm -f $stamp
install -r requirements.lock
install --no-deps -e .
echo "$wanted" >$stamp
