#!/usr/bin/env bash
# Trains Attamba of 34 million parameters with every compressor, and what it
# ought to beat, on the same tokens: a table, a picture and a JSON in OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/attamba_30m.sh DATA OUT [SECONDS]

DATA holds corpora/gutenberg_{train,valid}.txt.xz. A run that ends after SECONDS
(570) goes on where it stopped when it is started again: what it made lies in
runs/. On another machine RESUME=FOLDER, an earlier OUT, brings back what was
finished.

  RUNS="p4 ..."  which; all are p4 p8 transformer narrow window gated overlapping
                 mean stride
  SEEDS=0        seeds of each
  TINY=1         two layers and a few updates: a try on a CPU, in minutes
TEXT
}

[[ $# -ge 2 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
DATA=$1 OUT=$2 LIMIT=${3:-570}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
FOUND=runs/attamba_30m
mkdir -p "$FOUND" "$OUT"
[[ -n ${RESUME:-} ]] && cp -r "$RESUME"/runs/. "$FOUND/"
FLAGS=()
[[ -n ${TINY:-} ]] && FLAGS=(--layers=2 --d_model=64 --steps=10
  --batch=4 --length=64 --vocab_size=512 --eval_windows=8 --warmup=5
  --checkpoint_every=10 --cache=runs/tokens_tiny)

# The width of the MLP makes parameters alike, whatever a compressor takes.
of() { # NAME
  case $1 in
    p4 | p8 | transformer | narrow | window)
      echo "--flagfile=experiments/flagfiles/attamba_30m_$1.flags" ;;
    gated) echo "$(of p4) --compressor=gated_pool --d_ff=1584" ;;
    overlapping)
      echo "$(of p4) --compressor=overlapping_gated_pool --d_ff=1416" ;;
    mean | stride) echo "$(of p4) --compressor=$1 --d_ff=1752" ;;
  esac
}

FOLDERS=() NAMES=() MISSING=
for seed in ${SEEDS:-0}; do
  for name in ${RUNS:-p4 transformer window gated mean stride narrow overlapping p8}; do
    run=$FOUND/${name}_$seed
    if [[ ! -s $run/result.json ]]; then
      left=$((LIMIT - SECONDS))
      ((left > 0)) || { MISSING+=" $name"; continue; }
      attention=(--attention=xla)
      [[ -z ${TINY:-} ]] && attention=()
      # shellcheck disable=SC2046 # Flags are words.
      timeout -s INT -k 20 "$left" "$PY" experiments/train_lm.py $(of "$name") \
        --text="$DATA/corpora/gutenberg_train.txt.xz" \
        --eval_text="$DATA/corpora/gutenberg_valid.txt.xz" --seed="$seed" \
        --workdir="$run" "${FLAGS[@]}" "${attention[@]}" \
        >>"$FOUND/${name}_$seed.log" 2>&1
      echo "[$SECONDS s] $name, seed $seed: exit $?"
    fi
    [[ -s $run/result.json ]] || { MISSING+=" $name"; continue; }
    mkdir -p "$OUT/runs/${name}_$seed"
    cp "$run"/{flags.json,metrics.jsonl,result.json} "$OUT/runs/${name}_$seed/"
    FOLDERS+=("$run") NAMES+=("$name")
  done
done
if ((${#FOLDERS[@]})); then
  join() { local IFS=,; echo "$*"; }
  "$PY" experiments/plot_lm.py --runs="$(join "${FOLDERS[@]}")" \
    --names="$(join "${NAMES[@]}")" --plot=runs/attamba_30m.png \
    --title="34 million parameters on the same tokens" \
    --result="$OUT/attamba_30m.json" && cp runs/attamba_30m.png "$OUT/"
fi
[[ -z $MISSING ]] || {
  echo "missing:$MISSING; start it again to go on, or see $FOUND/*.log"
  exit 3
}
