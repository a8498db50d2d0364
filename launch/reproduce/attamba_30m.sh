#!/usr/bin/env bash
# Trains Attamba of 34 million parameters with every compressor, and what it
# ought to beat, on the same tokens and for the same seconds; then what each
# recalls, and the ablations of the paper: tables, pictures and JSONs in OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/attamba_30m.sh DATA OUT [SECONDS]

DATA holds corpora/gutenberg_{train,valid}.txt.xz. A run that ends after SECONDS
(570) goes on where it stopped when it is started again: what it made lies in
runs/. On another machine RESUME=FOLDER, an earlier OUT, brings back what was
finished. OUT gets at most 7 files.

  GPUS=2         GPUs of this host, which share the jobs; 0 for the CPU, which
                 TINY=1 wants
  SUITE=quality  what is done:
    rates      a few hundred updates at three learning rates each, judged on the
               end of the training text; `quality` takes the best from then on
    quality    RUNS, each with all SEEDS, the first seed of all of them first
    seconds    the same RUNS, seed 0, for as many seconds of updates as p4 took
               in `quality`, by the speeds that its metrics tell
    large      p4, p8 and the Transformer of 64 million parameters, one seed
    changed    P and L changed, and texts of four times the length, by the
               models of `quality` that are still in runs/
    recall     pairs and needles, by all of MODELS, three seeds at once
    ablations  boundaries, P, L and the state's size, under both semantics
  RUNS="p4 ..."  all are p4 p8 transformer window window_p8 narrow narrow_p8
                 gated overlapping mean stride mamba2 hybrid
  SEEDS="0 1 2"
  MODELS="..."   of recall; all are transformer window attamba top gated
                 overlapping mean stride mamba2 hybrid; top sees the 8 best
                 chunks
  FLAGS=""       further flags of trainings, such as
                 --chunked_attention=mosaic_gpu
  TINY=1         small models and a few updates: a try on a CPU
TEXT
}

[[ $# -ge 2 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
export DATA=$1 OUT=$2 LIMIT=${3:-570} GPUS=${GPUS:-2} TINY=${TINY:-}
export FLAGS=${FLAGS:-} FOUND=runs/attamba_30m
SUITE=${SUITE:-quality} SEEDS=${SEEDS:-0 1 2}
RUNS=${RUNS:-p4 transformer gated mean window p8 stride mamba2 narrow overlapping hybrid window_p8 narrow_p8}
MODELS=${MODELS:-attamba transformer top gated mean window stride mamba2 overlapping hybrid}
export PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=$PWD/runs/attamba_jax
START=$(date +%s)
export START
mkdir -p "$FOUND/log" "$OUT"
[[ -f ${RESUME:-}/attamba_runs.tgz ]] && tar xzf "$RESUME/attamba_runs.tgz"

left() { echo $((LIMIT - $(date +%s) + START)); }
say() { echo "[$(($(date +%s) - START)) s] $*"; }

# The width of the MLP makes parameters alike, whatever a compressor takes.
flags_of() { # NAME
  case $1 in
    gated) echo "$(flags_of p4) --compressor=gated_pool --d_ff=1584" ;;
    overlapping)
      echo "$(flags_of p4) --compressor=overlapping_gated_pool --d_ff=1416" ;;
    mean | stride) echo "$(flags_of p4) --compressor=$1 --d_ff=1752" ;;
    *) echo "--flagfile=experiments/flagfiles/attamba_30m_$1.flags" ;;
  esac
}

# Architectures whose learning rates are chosen alike.
group_of() { # NAME
  case $1 in
    transformer | narrow*) echo transformer ;;
    window*) echo window ;;
    mamba2 | hybrid) echo "$1" ;;
    *) echo p4 ;;
  esac
}

# A cell of the ablations: SEMANTICS_P_L_BOUNDARIES_STATE.
cell() { # NAME
  local semantics p l boundaries state
  IFS=_ read -r semantics p l boundaries state <<<"$1"
  echo "--arch=attamba --preset=p4 --d_model=256 --d_ff=768 --heads=4" \
    "--kv_heads=4 --ssm_channels=128 --semantics=$semantics --chunk_size=$p" \
    "--window=$l --boundaries=$boundaries --d_state=$state --steps=400" \
    "--warmup=60 --learning_rate=3e-3 --document_mask=false --unroll=0" \
    "--vocab_size=8192 --checkpoint_every=400"
}

recall_of() { # MODEL
  local heads="--heads=2 --kv_heads=2" space="--d_state=64 --head_dim=32"
  case $1 in
    transformer) echo "--arch=transformer --d_ff=128 $heads" ;;
    mamba2) echo "--arch=mamba2 $space" ;;
    hybrid) echo "--arch=hybrid $space --attention_every=2 $heads" ;;
    window) echo "$(recall_of attamba) --compressor=none --window=64" ;;
    gated) echo "$(recall_of attamba) --compressor=gated_pool" ;;
    overlapping)
      echo "$(recall_of attamba) --compressor=overlapping_gated_pool" ;;
    mean | stride) echo "$(recall_of attamba) --compressor=$1" ;;
    top) echo "$(recall_of attamba) --top_chunks=8" ;;
    attamba) echo "--arch=attamba --chunk_size=4 --window=16 --d_ff=128 $heads" \
      "--d_state=32 --ssm_channels=64 --head_dim=32" ;;
  esac
}

language_model() { # FOLDER FLAGS...
  local run=$FOUND/$1; shift
  local tiny=() eval=(--eval_every=175 --eval_windows=100000)
  [[ -n $TINY ]] && eval=() tiny=(--layers=2 --d_model=64 --steps=10 --batch=4
    --length=64 --vocab_size=512 --eval_windows=8 --warmup=5 --eval_every=5
    --checkpoint_every=10 --cache=runs/tokens_tiny)
  # Flagfiles name cuDNN, which a CPU has not.
  ((GPUS)) || tiny+=(--attention=xla)
  # shellcheck disable=SC2086 # Flags are words.
  timeout -k 20 "$(left)" "$PY" experiments/train_lm.py "$@" \
    "${eval[@]}" --text="$DATA/corpora/gutenberg_train.txt.xz" \
    --workdir="$run" $FLAGS "${tiny[@]}"
}

# Updates that take as long as all of p4's, of which a share is warmup.
steps_of() { # NAME
  "$PY" - "$FOUND" "$1" <<'PYTHON'
import json, pathlib, statistics, sys
found = pathlib.Path(sys.argv[1])
def rows(name):
  lines = (found / f"quality_{name}_0" / "metrics.jsonl").read_text()
  return [json.loads(line) for line in lines.splitlines()]
def speed(name):
  found = rows(name)
  return statistics.median(row["tokens_per_second"] for row in found[1:] or found)
steps = 1 + rows("p4")[-1]["step"]
print(max(2, round(steps * speed(sys.argv[2]) / speed("p4"))))
PYTHON
}

job() { # KIND NAME SEED
  local run=$FOUND/$1_$2_$3 log=$FOUND/log/$1_$2_$3.log rate=() steps
  [[ -s $run/result.json || $(left) -lt 40 ]] && return 0
  [[ $GPUS -gt 0 ]] && export CUDA_VISIBLE_DEVICES=$((LANE % GPUS))
  # shellcheck disable=SC2046,SC2086 # Flags are words.
  case $1 in
    rates) # A share of the training text that no other suite is judged by.
      language_model "$1_$2_$3" $(flags_of "$2") --learning_rate="$3" \
        --steps=200 --warmup=40 ;;
    quality)
      [[ -s $FOUND/rates/$(group_of "$2") ]] &&
        rate=(--learning_rate="$(<"$FOUND/rates/$(group_of "$2")")")
      language_model "$1_$2_$3" $(flags_of "$2") "${rate[@]}" --seed="$3" \
        --eval_text="$DATA/corpora/gutenberg_valid.txt.xz" ;;
    seconds)
      if [[ $2 == p4 ]]; then
        mkdir -p "$run"
        cp "$FOUND"/quality_p4_0/{result.json,flags.json,metrics.jsonl} "$run"
        return
      fi
      [[ -s $FOUND/rates/$(group_of "$2") ]] &&
        rate=(--learning_rate="$(<"$FOUND/rates/$(group_of "$2")")")
      steps=$(steps_of "$2") || return
      language_model "$1_$2_$3" $(flags_of "$2") "${rate[@]}" --seed="$3" \
        --steps="$steps" --checkpoint_every="$steps" \
        --warmup=$((steps / 7 + 1)) \
        --eval_text="$DATA/corpora/gutenberg_valid.txt.xz" ;;
    large)
      [[ -s $FOUND/rates/$(group_of "$2") ]] &&
        rate=(--learning_rate="$(<"$FOUND/rates/$(group_of "$2")")")
      language_model "$1_$2_$3" --seed="$3" \
        --flagfile="experiments/flagfiles/attamba_60m_$2.flags" "${rate[@]}" \
        --eval_text="$DATA/corpora/gutenberg_valid.txt.xz" ;;
    ablations)
      language_model "$1_$2_$3" $(cell "$2") --seed="$3" \
        --eval_text="$DATA/corpora/gutenberg_valid.txt.xz" ;;
    recall)
      # Keys, values and fillers of 128 tokens each are learned in few updates.
      local sizes="--symbols=128 --layers=2 --d_model=128 --length=256 --pairs=16"
      sizes+=" --batch=128 --steps=3000 --warmup=200 --seeds=0,1,2"
      sizes+=" --test_lengths=256,512,1024 --test_pairs=4,16,64"
      [[ -n $TINY ]] && sizes+=" --steps=4 --warmup=1 --batch=4 --length=64" &&
        sizes+=" --pairs=4 --seeds=0,1 --test_texts=8 --test_lengths=64" &&
        sizes+=" --test_pairs=2,4"
      timeout -k 20 "$(left)" "$PY" experiments/train_recall.py \
        --task="$3" --name="$2" $(recall_of "$2") $sizes \
        --vocab_size=512 --dtype=float32 --learning_rate=2e-3 \
        --weight_decay=0.01 --workdir="$run" ;;
    changed)
      [[ -d $FOUND/quality_$2_0/model ]] || return 0
      mkdir -p "$run"
      local length=4096 own=()
      case $3 in
        as_trained) length=1024 ;;
        longer) ;;
        *_*) length=1024 own=(--chunk_size="${3%_*}" --chunk_window="${3#*_}") ;;
      esac
      [[ -n $TINY ]] && length=$((length / 16))
      timeout -k 5 "$(left)" "$PY" experiments/eval_lm.py "${own[@]}" \
        --model="$FOUND/quality_$2_0/model" --window=$length \
        --max_length=$length --batch_tokens=65536 ${TINY:+--windows=4} \
        --text="$DATA/corpora/gutenberg_valid.txt.xz" \
        --dtype=bfloat16 --result="$run/result.json" ;;
  esac >>"$log" 2>&1
  say "$1 $2 $3: exit $?"
}
export -f left say flags_of group_of cell recall_of language_model steps_of job

jobs_of() { # The jobs of a suite, the most wanted first.
  local seed name
  case $SUITE in
    rates) for name in p4 transformer mamba2 window hybrid; do
        for seed in 1e-3 2e-3 4e-3; do echo "rates $name $seed"; done
      done ;;
    quality) for seed in $SEEDS; do
        for name in $RUNS; do echo "quality $name $seed"; done
      done ;;
    seconds) for name in $RUNS; do echo "seconds $name 0"; done ;;
    large) for name in p4 transformer p8; do echo "large $name 0"; done ;;
    changed) for name in p4 p8 gated mean; do
        for seed in as_trained longer 2_32 8_32 4_8 4_128 8_64 16_64; do
          echo "changed $name $seed"
        done
      done
      for name in transformer mamba2 window hybrid; do
        for seed in as_trained longer; do echo "changed $name $seed"; done
      done ;;
    recall) for seed in pairs needle; do
        for name in $MODELS; do echo "recall $name $seed"; done
      done ;;
    ablations) for name in 8_8_cyclic_32 8_8_uniform_32 8_8_random_32 \
        8_1_cyclic_32 8_64_cyclic_32 4_8_cyclic_32 64_1_cyclic_32 \
        64_64_cyclic_32 8_8_cyclic_8 8_8_cyclic_128; do
        for seed in paper released; do echo "ablations ${seed}_$name 0"; done
      done ;;
    *) echo "SUITE=$SUITE: take rates, quality, seconds, large, changed, recall or" \
        "ablations" >&2
      return 2 ;;
  esac
}

LIST=$(jobs_of) || exit 2
# The first job makes tokens that the others share.
read -r kind name seed <<<"$LIST"
LANE=0 job "$kind" "$name" "$seed"
tail -n +2 <<<"$LIST" | xargs -r -P "$((GPUS > 0 ? GPUS : 1))" \
  --process-slot-var=LANE -L 1 bash -c 'job "$@"' _

missing=() folders=() names=()
while read -r kind name seed; do
  run=$FOUND/${kind}_${name}_$seed
  if [[ -s $run/result.json ]]; then
    folders+=("$run")
    names+=("$name")
  else
    missing+=("$name/$seed")
  fi
done <<<"$LIST"
join() { local IFS=,; echo "$*"; }
export JAX_PLATFORMS=cpu
if ((${#folders[@]})); then
  case $SUITE in
    rates) "$PY" - "$FOUND" "${folders[@]}" <<'PYTHON'
import json, pathlib, sys
found, best = pathlib.Path(sys.argv[1]), {}
for folder in map(pathlib.Path, sys.argv[2:]):
  _, name, rate = folder.name.split("_")
  loss = json.loads((folder / "result.json").read_text())["rows"][0]["value"]
  print(f"{name} at {rate}: {loss:.4f} nats a token")
  best[name] = min(best.get(name, (loss, rate)), (loss, rate))
(found / "rates").mkdir(exist_ok=True)
for name, (_, rate) in best.items():
  (found / "rates" / name).write_text(rate)
PYTHON
      ;;
    quality | seconds | large | ablations)
      title="34 million parameters on the same tokens"
      [[ $SUITE == seconds ]] && title="34 million parameters, equal seconds"
      [[ $SUITE == large ]] && title="64 million parameters on the same tokens"
      [[ $SUITE == ablations ]] && title="Boundaries, P, L and state, both semantics"
      "$PY" experiments/plot_lm.py --runs="$(join "${folders[@]}")" \
        --names="$(join "${names[@]}")" --plot="$OUT/attamba_$SUITE.png" \
        --cost_plot="$OUT/attamba_${SUITE}_costs.png" --costs=8192 \
        --title="$title" --result="$OUT/attamba_$SUITE.json" ;;
    recall) for task in pairs needle; do
        own=()
        for folder in "${folders[@]}"; do
          [[ $folder == *_"$task" ]] && own+=("$folder")
        done
        ((${#own[@]})) && "$PY" experiments/plot_recall.py \
          --runs="$(join "${own[@]}")" --plot="$OUT/attamba_recall_$task.png" \
          --title="Recall: $task" --result="$OUT/attamba_recall_$task.json"
      done ;;
    changed)
      pairs=()
      for folder in "${folders[@]}"; do
        name=${folder#"$FOUND"/changed_}
        pairs+=("${name//_/ }=$folder/result.json")
      done
      "$PY" -m research.results.merging "$OUT/attamba_changed.json" \
        "${pairs[@]}" ;;
  esac
fi
tar czf "$OUT/attamba_runs.tgz" "$FOUND"/rates \
  "$FOUND"/*/{result.json,flags.json,metrics.jsonl} 2>/dev/null
for log in "$FOUND"/log/*.log; do
  echo "== $log"; tr '\r' '\n' <"$log" | tail -n 8 | cut -c1-300
done >"$OUT/attamba.log"
[[ ${#missing[@]} -eq 0 ]] || {
  echo "missing: ${missing[*]}; start it again to go on, or see $OUT/attamba.log"
  exit 3
}
