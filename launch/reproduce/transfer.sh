#!/usr/bin/env bash
# The tables of transfer with calibrated intervals of
# docs/regression_lm_results.md, as JSON in OUT. One GPU, some nine minutes.
set -u

[[ $# -eq 2 && $1 != -* ]] || {
  echo "Usage: launch/reproduce/transfer.sh DATA OUT"
  echo "DATA holds programs/kernel_tuner/*_milo.csv.gz and nas/nasbench201.csv.gz."
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
DATA=$1 OUT=$2
# Models share one GPU, peers take the CPU's cores beside them; the last call of
# each table computes nothing, joins both, and writes the JSON.
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false
mkdir -p "$OUT/parts" runs
one() {  # NAME FILE "PEERS WITH FOLDS" "PEERS WITHOUT" [FLAGS of the models]
  local name=$1 path="$DATA/$2" with=$3 without=$4; shift 4
  local run="python experiments/transfer_rlm.py --flagfile=experiments/flagfiles/rlm_$name.flags --path=$path"
  OMP_NUM_THREADS=2 JAX_PLATFORMS=cpu $run "$@" --models=none --peers="$with" --workdir=runs/p1_"$name" > "$OUT/$name.p1.log" 2>&1 &
  local p1=$!
  OMP_NUM_THREADS=2 JAX_PLATFORMS=cpu $run "$@" --models=none --folds=0 --peers="$without" --workdir=runs/p2_"$name" > "$OUT/$name.p2.log" 2>&1 &
  local p2=$!
  $run "$@" --peers=none --workdir=runs/m_"$name" > "$OUT/$name.m.log" 2>&1
  local code=$?
  wait $p1 && wait $p2 && [[ $code -eq 0 ]] || {
    tail -qn 2 "$OUT/$name".{p1,p2,m}.log >&2
    echo "$name: a part failed" >&2
    kill $p1 $p2 2>/dev/null
    return 1
  }
  cp runs/p1_"$name"/*.npz runs/p2_"$name"/*.npz runs/m_"$name"/
  $run "$@" --workdir=runs/m_"$name" --result="$OUT/rlm_$name.json" > "$OUT/$name.log" 2>&1
  mkdir -p "$OUT/parts/$name"; cp runs/m_"$name"/*.npz "$OUT/parts/$name/"
  tail -n 12 "$OUT/$name.log" | cut -c1-200
}
one kernel_tuner_convolution programs/kernel_tuner/convolution_milo.csv.gz "XGBoost with sources" "XGBoost,ridge on TF-IDF,MLP" &
one kernel_tuner_dedispersion programs/kernel_tuner/dedispersion_milo.csv.gz "XGBoost with sources" "XGBoost,ridge on TF-IDF,MLP" --models=pretrained --ensemble=1 --pretrain_steps=1000 --learning_rate=1e-3 &
one latency nas/nasbench201.csv.gz "XGBoost per source + ridge,ridge per source + ridge" "XGBoost" --ensemble=2 --pretrain_steps=600 --learning_rate=3e-4 --steps_root=10 &
one nasbench201 nas/nasbench201.csv.gz "XGBoost" "ridge on TF-IDF,MLP,Gaussian process" &
failed=0
for job in $(jobs -p); do wait "$job" || failed=1; done
exit "$failed"
