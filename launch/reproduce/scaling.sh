#!/usr/bin/env bash
# Scaling on 1, 2, 4 and 8 GPUs of one host, for docs/scale.md: weak and strong
# scaling of training, tensor parallelism at 8B, long rows cut over devices, and
# losses on one device and on all, as JSON in OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/scaling.sh [--dry-run] OUT [SECONDS]

Sizes below all GPUs of the host run side by side, each on GPUs of its own, within
half of SECONDS (570); then that of all, and losses. Each size has a file in OUT,
scaling_N.json, and scaling.json holds the rows of all. What a file in OUT holds
is not measured again, so the same command goes on; what there was no time for is
told in scaling.log. --dry-run prints the commands.

  GPUS=8    GPUs to use; by default those that nvidia-smi lists
  SIZES=    numbers of devices; by default 1 2 4 8 as far as GPUS goes
  GROUPS_="weak methods tensor long strong losses"
            what is measured
  FROM=     folder of an earlier OUT, whose rows are taken over
  TINY=1    tiny models on fake devices of a CPU, to try the script
TEXT
}

dry_run=
[[ ${1:-} != --dry-run ]] || { dry_run=1; shift; }
[[ $# -ge 1 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
OUT=$1 LIMIT=${2:-570} TINY=${TINY:-} FROM=${FROM:-}
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
GROUPS_=${GROUPS_:-weak methods tensor long strong losses}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=2 XLA_PYTHON_CLIENT_MEM_FRACTION=.92
[[ $GPUS -ge 1 ]] || { echo "error: no GPU: set GPUS" >&2; exit 2; }
if [[ -z ${SIZES:-} ]]; then
  SIZES=
  for n in 1 2 4 8; do [[ $n -gt $GPUS ]] || SIZES+="$n "; done
fi
log=$OUT/scaling.log

# Sets `cases` to those of a group on N devices: cases_of GROUP N.
cases_of() {
  local n=$2 rows axis m
  cases=()
  axes() { [[ $n == 1 ]] && echo data || echo data fsdp; }
  case $1 in
    weak) # So many rows a device.
      for m in $WEAK; do
        rows=${m##*:}
        for axis in $(axes); do
          cases+=("weak.lm=${m%:*}:$((n * ${rows%x*}))x${rows#*x}@$axis:$n")
        done
      done ;;
    strong) # So many rows in all.
      for m in $STRONG; do cases+=("strong.lm=$m@data:$n"); done ;;
    methods)
      rows=${SOL##*:}
      cases+=("methods.sol=${SOL%:*}:$((n * ${rows%x*}))x${rows#*x}@data:$n")
      rows=${RLM##*:}
      cases+=("methods.rlm=${RLM%:*}:$((n * ${rows%x*}))x${rows#*x}@data:$n") ;;
    long)
      for m in $LONG; do cases+=("long.$m@sequence:$n"); done
      [[ $n == 1 ]] || for m in $LONGEST; do
        cases+=("long.$m@sequence:$n")
      done ;;
    tensor)
      [[ $n != 2 ]] || cases+=("tensor.lm=$TENSOR@tensor:2"
        "tensor.lm=$TENSOR@fsdp:2")
      [[ $n != 4 ]] || cases+=("tensor.lm=$TENSOR@tensor:4"
        "tensor.lm=$TENSOR@fsdp:2,tensor:2") ;;
    losses) # Of float32, so a process of their own.
      [[ $n == 1 ]] || for m in $LOSSES; do cases+=("losses=$m:$n"); done ;;
    *) echo "error: GROUPS_: there is no group $1" >&2; exit 2 ;;
  esac
}
WEAK="transformer/60m:64x1024 mamba2/60m:64x1024 llama3_2_1b:8x2048
  mamba2_1_3b:8x2048"
STRONG="transformer/60m:64x1024 mamba2/60m:64x1024 llama3_2_1b:16x2048"
SOL=llama3_2_1b:8x512 RLM=512/2+2:64x2048 TENSOR=llama3_1_8b:4x2048
LONG="ssd=64x64x128:1x262144 attention=8x128:1x262144 ssd=64x64x128:1x1048576
  lm=mamba2_370m:1x262144"
LONGEST=attention=8x128:1x1048576 # A minute on one device.
LOSSES="transformer/60m:16x512@data mamba2/60m:16x512@fsdp"
own=(--dtype=bfloat16 --attention=cudnn --measure=.7)
alike=(--dtype=float32 --updates=50)
if [[ $TINY ]]; then
  WEAK="tiny_transformer:2x32 tiny_mamba2:2x32" STRONG=tiny_transformer:8x32
  SOL=tiny_transformer:1x32 RLM=32/1+1:2x16 TENSOR=tiny_transformer:2x32
  LONG="ssd=2x16x8:1x64 lm=tiny_mamba2:1x64" LONGEST=attention=2x16:1x64
  LOSSES="tiny_transformer:8x16@data tiny_mamba2:8x16@fsdp"
  own=(--dtype=float32 --measure=.01) alike=(--dtype=float32 --updates=4)
  export JAX_PLATFORMS=cpu
fi

say() {
  if [[ $dry_run ]]; then echo "# $*"; else echo "[$SECONDS s] $*" | tee -a "$log"; fi
}

# measure N FIRST_GPU END FLAGS... -- GROUP...: until END, in seconds of this run.
measure() {
  local n=$1 first=$2 end=$3 flags=() all=() group command left try code
  shift 3
  while [[ $1 != -- ]]; do flags+=("$1"); shift; done
  shift
  for group in "$@"; do
    [[ " $GROUPS_ " == *" $group "* ]] || continue
    cases_of "$group" "$n"
    all+=("${cases[@]/#/--case=}")
  done
  [[ ${#all[@]} -gt 0 ]] || return 0
  local devices=("CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + n - 1)))")
  [[ -z $TINY ]] || devices=("JAX_NUM_CPU_DEVICES=$n")
  # A case that ends its process is the last one of the second try.
  for try in 1 2; do
    left=$((end - SECONDS))
    [[ $left -gt 30 ]] || { say "no time for $n devices: $*"; return; }
    command=(env "${devices[@]}" timeout -k 5 "$left" "$PY"
      experiments/time_mesh.py "${flags[@]}" "${all[@]}"
      "--seconds=$((left - 15))" "--result=$OUT/scaling_$n.json")
    if [[ $dry_run ]]; then echo "${command[*]}"; return; fi
    "${command[@]}" >>"runs/scaling_log/$n.log" 2>&1
    code=$?
    say "$n devices, $*: exit $code (try $try)"
    grep "^no time was left" "runs/scaling_log/$n.log" | tee -a "$log"
    grep "failed" "runs/scaling_log/$n.log" | cut -c1-300 | tee -a "$log"
    [[ $code != 0 ]] || return 0
    tail -n 3 "runs/scaling_log/$n.log" | cut -c1-300 | tee -a "$log"
  done
}

[[ $dry_run ]] || {
  mkdir -p "$OUT" runs/scaling_log
  rm -f runs/scaling_log/*.log
  [[ -z $FROM ]] || cp -n "$FROM"/scaling_*.json "$OUT/"
}
for n in 1 2 4 8; do
  [[ " $SIZES " == *" $n "* ]] || say "left out: $n devices (GPUS=$GPUS)"
done
timed=(weak methods tensor long strong)
first=0 half=$((LIMIT / 2))
for n in $SIZES; do
  [[ $n -lt $GPUS ]] || continue
  if [[ $TINY || $dry_run ]]; then
    measure "$n" "$first" "$half" "${own[@]}" -- "${timed[@]}"
  else
    measure "$n" "$first" "$half" "${own[@]}" -- "${timed[@]}" &
  fi
  first=$((first + n))
done
wait
if [[ " $SIZES " == *" $GPUS "* ]]; then
  measure "$GPUS" 0 $((LIMIT - 80)) "${own[@]}" -- "${timed[@]}"
  measure "$GPUS" 0 $((LIMIT - 5)) "${alike[@]}" -- losses
fi
[[ $dry_run ]] ||
  "$PY" -m research.results.merging "$OUT/scaling.json" "$OUT"/scaling_*.json
say "end"
