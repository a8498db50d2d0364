#!/usr/bin/env bash
# Runs scripts on TPUs of a GKE cluster by xpk, which makes a JobSet of them.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Usage: launch/gke_xpk.sh [--dry-run] VERB [NAME] [ARGUMENT...]

  create                         makes the cluster
  run NAME SCRIPT [ARGUMENT...]  sends the checkout and starts a script on all
                                 hosts; one that is evicted starts again
  logs NAME                      follows the output of all hosts
  delete NAME                    ends a run
  delete-cluster                 deletes the cluster

What is sent is what is committed. A run's --workdir is on a volume that all
hosts mount (`xpk storage attach`, such as a Filestore): it goes on from there.

  CLUSTER      name of the cluster; must be set
  ZONE         of the cluster; must be set
  PROJECT      of the cluster; must be set
  TYPE         kind of slice (v5litepod-16)
  SLICES       how many of them (1)
  SPOT=true    `create` takes cheaper nodes, which may be taken away
  RESTARTS     times that a run starts again (50)
  IMAGE        an image with Frugax's packages, from which nothing is installed
               at the start; else BASE_IMAGE (python:3.12) and pip
  MULTIHOST=false  leaves out --multihost, which `run` gives the script: each
                   host then trains by itself

Options:
  --dry-run   print every command, run nothing
  -h, --help  print this
TEXT
}

take_options launch/gke_xpk.sh "$@"
set -- "${words[@]}"
case $verb in
  run | logs | delete)
    check_name "${1:-}"
    name=$1
    shift
    ;;
  create | delete-cluster) ;;
  *) fail "unknown verb $verb (launch/gke_xpk.sh --help lists them)" ;;
esac
[[ $verb == run || $# -eq 0 ]] || fail "$verb does not take '$1'"
given CLUSTER frugal
given ZONE us-central2-b
given PROJECT my-project
place=(--cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT")
slices=(--tpu-type="${TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}")
xpk_remedy="pip install xpk, in an environment of its own"

case $verb in
  create)
    need xpk "$xpk_remedy"
    capacity=--on-demand
    [[ ${SPOT:-false} == true ]] && capacity=--spot
    run xpk cluster create "${place[@]}" "${slices[@]}" "$capacity"
    ;;
  run)
    need xpk "$xpk_remedy"
    check_script "${1:-}"
    find_commit
    multihost=()
    [[ ${MULTIHOST:-true} == true ]] && multihost=(--multihost)
    line="FRUGAX_COMMIT=$commit $(quoted launch/local.sh "$@" "${multihost[@]}")"
    image=(--base-docker-image="${BASE_IMAGE:-python:3.12}")
    if [[ -n ${IMAGE:-} ]]; then
      image=(--base-docker-image="$IMAGE")
    else
      line="pip install -q -c requirements.lock -e '.[tpu]' && $line"
    fi
    # xpk puts a folder into the image: that of the commit, without what lies
    # beside it in the checkout. It has the name of the run, since others may be
    # sent at once, and lies where no --workdir does.
    folder=${archive%/*}/checkout-$name
    archive=$folder.tar.gz
    run rm -rf "$folder"
    run mkdir -p "$folder"
    run git -C "$root" archive --format=tar.gz --output="$archive" "$commit"
    run tar -xzf "$archive" -C "$folder"
    run xpk workload create "${place[@]}" "${slices[@]}" --workload="$name" \
      "${image[@]}" --script-dir="$folder" \
      --max-restarts="${RESTARTS:-50}" --command="$line"
    ;;
  logs)
    need gcloud "install the Google Cloud CLI"
    need kubectl "gcloud components install kubectl"
    # Clusters of xpk are regional: the zone without its letter.
    run gcloud container clusters get-credentials "$CLUSTER" \
      --region="${ZONE%-*}" --project="$PROJECT"
    run kubectl logs --follow --prefix --tail=-1 --all-containers \
      --max-log-requests=256 \
      --selector="jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  delete)
    need xpk "$xpk_remedy"
    run xpk workload delete "${place[@]}" --workload="$name" --force
    ;;
  delete-cluster)
    need xpk "$xpk_remedy"
    run xpk cluster delete "${place[@]}" --force
    ;;
esac
