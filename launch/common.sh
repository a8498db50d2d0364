# shellcheck shell=bash
# What the scripts of other machines share; sourced, not run.
# shellcheck disable=SC2034  # The scripts read what is set here.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
archive=$root/runs/.launch/checkout.tar.gz
dry_run=false

fail() {
  echo "error: $1" >&2
  exit 2
}

# Words as one line that a shell takes apart into the same words.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

# Sets dry_run, verb, and words, those behind it: take_options SCRIPT WORDS.
take_options() {
  local script=$1
  shift
  while [[ $# -gt 0 ]]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --dry-run) dry_run=true; shift ;;
      -*) fail "unknown option $1 ($script --help lists them)" ;;
      *) break ;;
    esac
  done
  [[ $# -gt 0 ]] || fail "no verb named ($script --help lists them)"
  verb=$1
  shift
  words=("$@")
}

# Runs a command; a dry run prints it instead, as a shell would take it.
run() {
  if $dry_run; then
    quoted "$@"
  else
    "$@"
  fi
}

# A tool must be there, but for a dry run: need TOOL REMEDY.
need() {
  $dry_run || command -v "$1" >/dev/null || fail "no $1 on PATH: $2"
}

# A variable must have a value: given NAME EXAMPLE.
given() {
  [[ -n ${!1:-} ]] || fail "$1 is not set (such as $1=$2)"
}

check_name() {
  [[ ${1:-} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "no name as '${1:-}': letters, digits and dashes, such as mamba2-60m"
}

# A script is named by its path in the checkout, which other machines have too.
check_script() {
  [[ -n ${1:-} ]] || fail "no script named (--help shows how)"
  [[ $1 != /* && -f $root/$1 ]] ||
    fail "no script at $1: name it from the root, experiments/train_lm.py"
}

# Sets `commit`, of what is sent to other machines: what is committed.
find_commit() {
  commit=$(git -C "$root" rev-parse HEAD 2>/dev/null) ||
    fail "$root is no git checkout: what is sent is what is committed"
  if [[ -n $(git -C "$root" status --porcelain 2>/dev/null) ]]; then
    echo "warning: changes that are not committed stay here" >&2
  fi
}
