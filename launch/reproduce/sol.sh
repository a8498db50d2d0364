#!/usr/bin/env bash
# Policies of SOL that cost next to nothing, beside the large one, on SmolLM2-135M:
# trained, and compared at equal net keep, FLOPs and bytes. The table is
# OUT/sol_light.json.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/sol.sh OUT [SECONDS]

For one Hopper GPU: two calls of ten minutes by estimate. A run that ends after
SECONDS (570) goes on where it stopped when it is started again: what it made
lies in runs/, and what must not be lost is packed into OUT/sol_light.tar. On
another machine RESUME=FOLDER, an earlier OUT, brings that back.

  POLICIES="scalars head large"   what is trained; the first must be scalars
  TRAIN="--hold=4 ..."            further flags of all trainings
  EVAL="--max_windows=64 ..."     further flags of the evaluation
TEXT
}

[[ $# -ge 1 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
OUT=$1 LIMIT=${2:-570} POLICIES=${POLICIES:-scalars head large}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
FLAGS=experiments/flagfiles/sol_smollm2_h200_light
FOUND=runs/sol_light
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=2
mkdir -p "$FOUND" "$OUT"
if [[ -n ${RESUME:-} && -s $RESUME/sol_light.tar ]]; then
  tar -xf "$RESUME/sol_light.tar"
fi

say() { echo "[$SECONDS s] $*"; }

pack() { # What has been trained, and the curves of the trainings.
  local kept
  kept=$(find "$FOUND" -path '*policy/policy.*' -o -name metrics.jsonl \
    -o -name flags.json)
  [[ -n $kept ]] && xargs tar -cf "$OUT/sol_light.tar" <<<"$kept"
}

run() { # NAME COMMAND...: until the time is over; Ctrl-C saves.
  local name=$1 left=$((LIMIT - SECONDS)); shift
  [[ $left -gt 20 ]] || { say "no time for $name"; return 1; }
  timeout -s INT -k 15 $left "$@" >>"$FOUND/$name.log" 2>&1
  local code=$?
  say "$name: exit $code"
  tail -n 3 "$FOUND/$name.log" | cut -c1-150
  return $code
}

# TRAIN and EVAL are lists of flags.
# shellcheck disable=SC2086
train() { # POLICY
  [[ -s $FOUND/$1/policy/policy.json ]] && return
  local width=()
  [[ $1 == large ]] && width=(--width=256)
  run "$1" "$PY" experiments/train_sol.py --flagfile=$FLAGS.flags \
    --policy="$1" "${width[@]}" ${TRAIN:-} --workdir="$FOUND/$1"
}

others=
for policy in $POLICIES; do
  train "$policy" || { pack; exit 3; }
  [[ $policy == scalars ]] || others+=${others:+,}$policy=$FOUND/$policy
done
pack
# shellcheck disable=SC2086
run eval "$PY" experiments/eval_sol.py --flagfile=${FLAGS}_eval.flags \
  --policies="$others" ${EVAL:-} --result="$OUT/sol_light.json"
code=$?
cp "$FOUND"/*.log "$FOUND"/scalars/report.md "$OUT/" 2>/dev/null
pack
exit $code
