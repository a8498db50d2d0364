#!/usr/bin/env bash
# Times of regression LMs and of Mamba's ops on a Hopper GPU beside their peers:
# the H200's tables of docs/regression_lm_results.md and docs/ops.md, as JSON in
# OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/speed.sh REGRESS_LM OUT [SECONDS]

REGRESS_LM is a checkout of google-deepmind/regress-lm. mamba_ssm with its CUDA
scan and causal_conv1d are taken from where Python finds them; a peer that is
not there is left out, and its file says so. With two GPUs both halves run side
by side, some six minutes; with one after each other. What does not fit into
SECONDS (570) is left out.

  GPUS=2   GPUs of this host
TEXT
}

[[ $# -ge 2 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
PEER=$1 OUT=$2 LIMIT=${3:-570} GPUS=${GPUS:-2}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
mkdir -p "$OUT" runs/speed_log

say() { echo "[$SECONDS s] $*"; }

time_it() { # NAME FLAGS...
  local name=$1 left=$((LIMIT - SECONDS)); shift
  [[ $left -gt 15 ]] || { say "no time for $name"; return; }
  timeout -k 5 $left "$PY" experiments/bench.py "$@" \
    --result="$OUT/$name.json" >"runs/speed_log/$name.log" 2>&1
  say "$name: exit $?"
  tail -n 8 "runs/speed_log/$name.log" | cut -c1-150
}

regression_lms() {
  local suite=(--suite=regression_lm "--peer=$PEER")
  time_it rlm_speed "${suite[@]}" --train=512/2+2:64x2048:bfloat16 \
    --peer_settings=bfloat16 --repeats=3
  time_it rlm_speed_draws "${suite[@]}" --sample=512/2+2:512x2048x64:bfloat16 \
    --peer_settings=bfloat16 --repeats=3
  time_it rlm_speed_float32 "${suite[@]}" --train=512/2+2:64x2048:float32 \
    --peer_settings=float32,tf32 --repeats=3
}

ops() {
  local suite=(--suite=ops --implementations=mosaic_gpu --passes=fwd,fwd+bwd
    --peers=mamba_ssm --seconds=.4)
  time_it ops_ssd "${suite[@]}" --ops=ssd \
    --shapes=130m:8x2048,1.3b:8x4096,2.8b:1x32768
  time_it ops_selective_scan "${suite[@]}" --ops=selective_scan \
    --shapes=130m:8x2048,1.3b:8x4096
  time_it ops_causal_conv1d "${suite[@]}" --ops=causal_conv1d \
    --shapes=130m:8x2048,1.3b:8x4096
}

CUDA_VISIBLE_DEVICES=0 regression_lms & first=$!
[[ $GPUS -gt 1 ]] || wait $first
CUDA_VISIBLE_DEVICES=$((GPUS - 1)) ops & second=$!
wait $first $second
say "end"
