#!/usr/bin/env bash
# The set of 38,000 JAX programs, and models of their costs beside the peers: the
# tables of programs of docs/regression_lm_results.md, as JSON in OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/programs.sh set OUT [SECONDS]
       launch/reproduce/programs.sh SPLIT OUT UPDATES

First the set, on all cores but two: called again it adds to what is in
runs/programs until the programs are all there (some 5 core-hours). Then a
table for each SPLIT: random 3600, operators 1800, sizes 1800; one GPU, some
seven minutes each. P=24 peers are trained at a time, each on a core: threads of
more than there are cores wait for each other most of the time. Called again it
goes on where it stopped.
TEXT
}

[[ $# -ge 2 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
export PYTHONPATH=$PWD
OUT=$2
mkdir -p "$OUT" runs
if [[ $1 == set ]]; then
  JAX_PLATFORMS=cpu python experiments/make_program_metrics.py --count=38000 \
    --workers=$(($(nproc) - 2)) --seconds="${3:-400}" --views=source,typed \
    --workdir=runs/programs --output=runs/programs.jsonl.xz \
    --result="$OUT/program_metrics.json"
  exit
fi
[[ $# -eq 3 ]] || { usage; exit 2; }
split=$1 steps=$3 name=rlm_programs_$1
path=runs/programs.jsonl.xz
peers="XGBoost on token counts,XGBoost on sizes,ridge on TF-IDF,XGBoost,cost analysis,XGBoost on the cost analysis"
P=${P:-24}
( OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu nice -n 5 python experiments/eval_rlm.py --model=none --data=programs \
  --text_column=sized --split="$split" --targets=flops,bytes_accessed,peak_bytes,latency_us \
  --path="$path" --limit=4000 --peers="$peers" --peers_dir="runs/peers_$split" --processes="$P" > "$OUT/$name.peers.log" 2>&1 ) &
peer=$!
[[ -f runs/$name/model/config.json ]] || python experiments/train_rlm.py --flagfile=experiments/flagfiles/rlm_programs.flags \
  --path="$path" --split="$split" --steps="$steps" --warmup=100 --workdir="runs/$name" > "$OUT/$name.train.log" 2>&1
[[ -f runs/$name/model/config.json ]] || {
  tail -n 3 "$OUT/$name.train.log"; kill "$peer"; exit 1
}
wait "$peer" || { tail -n 3 "$OUT/$name.peers.log"; exit 1; }
python experiments/eval_rlm.py --model=runs/"$name/model" --path="$path" --samples=32 --limit=4000 \
  --peers="$peers" --peers_dir="runs/peers_$split" --bootstrap=100 --answers="$OUT/$name.jsonl" \
  --result="$OUT/$name.json" > "$OUT/$name.eval.log" 2>&1
code=$?
tail -n 30 "$OUT/$name.eval.log" | cut -c1-150
[[ $code -eq 0 ]] && xz -9 "$OUT/$name.jsonl"
exit "$code"
