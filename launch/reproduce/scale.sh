#!/usr/bin/env bash
# Times of training on two GPUs for docs/meshes.md: FSDP and tensor parallelism at
# 1B and 8B sizes, and 256k tokens of Mamba-2 over two devices, as JSON in OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/scale.sh OUT [SECONDS]

Each line of cases is a process of its own, which takes both GPUs; what does not
fit into SECONDS (300) is left out, and a case that fails is in its log.
TEXT
}

[[ $# -ge 1 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
OUT=$1 LIMIT=${2:-300}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=2
mkdir -p "$OUT" runs/scale_log

time_it() { # NAME MOST_SECONDS CASE...
  local name=$1 left=$((LIMIT - SECONDS)) most=$2; shift 2
  [[ $left -gt 20 ]] || { echo "[$SECONDS s] no time for $name"; return; }
  [[ $most -lt $left ]] || most=$left
  timeout -k 5 "$most" "$PY" experiments/time_mesh.py "${@/#/--case=}" \
    --updates=2 --result="$OUT/$name.json" >"runs/scale_log/$name.log" 2>&1
  echo "[$SECONDS s] $name: exit $?"
  tail -n 4 "runs/scale_log/$name.log" | cut -c1-400
}

time_it scale_256k 80 mamba2_370m:1x262144@sequence:2 \
  mamba2_1_3b:1x262144@sequence:2
time_it scale_1b 100 llama3_2_1b:8x2048@data:1 llama3_2_1b:16x2048@data:2 \
  llama3_2_1b:16x2048@fsdp:2 llama3_2_1b:16x2048@tensor:2 \
  mamba2_1_3b:8x2048@data:1 mamba2_1_3b:16x2048@fsdp:2 \
  mamba2_1_3b:16x2048@tensor:2
time_it scale_8b 120 llama3_1_8b:4x2048@fsdp:2 llama3_1_8b:4x2048@tensor:2
