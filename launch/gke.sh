#!/usr/bin/env bash
# One run on a TPU slice of GKE, from a machine with kubectl:
#   launch/gke.sh run NAME --image=IMAGE --accelerator=tpu-v6e-slice --topology=4x4 [--spot]
#       -- --config=configs/sft.py:qwen2.5_7b --workdir=gs://BUCKET/sft
#   launch/gke.sh logs NAME        follow the first process
#   launch/gke.sh delete NAME      stop it (it saves); the same `run` again resumes
# The cluster needs JobSet and nodes of that kind. The image is this checkout, installed:
#   git archive HEAD | docker build --file=launch/Dockerfile --tag=IMAGE -
# A run that was stopped, preempted or killed begins again by itself and resumes (gke.yaml).
#
# IMAGE, ACCELERATOR, TOPOLOGY, NAMESPACE and SERVICE_ACCOUNT in the environment stand in for flags.
# Further flags:
#   --dry_run                   print the manifest and the command, and run none
#   --chips-per-host=4          8 for slices of one host with eight chips
#   --service-account=default   one of Kubernetes that may read and write the bucket
#   --namespace=default
#   --max-restarts=20           how often to begin again
set -euo pipefail

refuse() {
    echo "jaxconv: refused: $1" >&2
    exit 2
}

verb=${1:-}
case $verb in
run | logs | delete) shift ;;
help | --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
*) refuse "verb ${verb:-missing}; it may be run, logs, delete or help" ;;
esac
name=
image=${IMAGE:-}
accelerator=${ACCELERATOR:-}
topology=${TOPOLOGY:-}
namespace=${NAMESPACE:-default}
service_account=${SERVICE_ACCOUNT:-default}
chips=4
max_restarts=20
spot=no
dry_run=no
command=()
while (($#)); do
    flag=${1%%=*}
    flag=${flag//_/-} # --dry_run and --dry-run are the same
    case $flag in
    --)
        shift
        command=("$@")
        break
        ;;
    --dry-run) dry_run=yes ;;
    --spot) spot=yes ;;
    --image | --accelerator | --topology | --namespace | --service-account | --chips-per-host | \
        --max-restarts)
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        else
            (($# > 1)) || refuse "$1 has no value"
            value=$2
            shift
        fi
        case $flag in
        --image) image=$value ;;
        --accelerator) accelerator=$value ;;
        --topology) topology=$value ;;
        --namespace) namespace=$value ;;
        --service-account) service_account=$value ;;
        --chips-per-host) chips=$value ;;
        --max-restarts) max_restarts=$value ;;
        esac
        ;;
    -*) refuse "$1 is no flag of $0; flags of the run come after --" ;;
    *) name=$1 ;;
    esac
    shift
done
[[ -n $name ]] || refuse "the name of the run is missing; give it after $verb"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    refuse "$name is no name of a run; it may have 40 lower-case letters, digits and hyphens"

do_it() {
    if [[ $dry_run == yes ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# One string as JSON, which YAML reads too.
json_string() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

manifest() {
    local hosts=1 side arguments='' argument text
    for side in ${topology//x/ }; do
        hosts=$((hosts * side))
    done
    ((hosts % chips == 0)) ||
        refuse "--topology=$topology has $hosts chips, no multiple of --chips-per-host=$chips"
    hosts=$((hosts / chips))
    for argument in "${command[@]}" --distributed; do
        arguments+="${arguments:+, }$(json_string "$argument")"
    done
    text=$(<"$(dirname "${BASH_SOURCE[0]}")/gke.yaml")
    text=${text#*$'\n# The line with gke-spot stays only for --spot.\n'}
    if [[ $spot == no ]]; then
        text=$(grep -v gke-spot <<<"$text")
    fi
    text=${text//"\${NAME}"/"$name"}
    text=${text//"\${IMAGE}"/"$image"}
    text=${text//"\${ACCELERATOR}"/"$accelerator"}
    text=${text//"\${TOPOLOGY}"/"$topology"}
    text=${text//"\${SERVICE_ACCOUNT}"/"$service_account"}
    text=${text//"\${CHIPS}"/"$chips"}
    text=${text//"\${HOSTS}"/"$hosts"}
    text=${text//"\${MAX_RESTARTS}"/"$max_restarts"}
    printf '%s\n' "${text//"\${ARGUMENTS}"/"[$arguments]"}" # last, it may hold anything
}

run() {
    local text workdir=
    for argument in ${command[@]+"${command[@]}"}; do
        case $argument in --workdir=?*) workdir=${argument#*=} ;; esac
    done
    [[ -n $image ]] || refuse "--image is missing; or set IMAGE"
    [[ -n $accelerator ]] ||
        refuse "--accelerator is missing, such as tpu-v6e-slice; or set ACCELERATOR"
    [[ -n $topology ]] || refuse "--topology is missing, such as 4x4; or set TOPOLOGY"
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
        refuse "--topology=$topology; it must be such as 4x4 or 4x4x4"
    [[ $chips =~ ^[1-9][0-9]*$ ]] || refuse "--chips-per-host=$chips; it must be a number"
    [[ $max_restarts =~ ^[0-9]+$ ]] || refuse "--max-restarts=$max_restarts; it must be a number"
    ((${#command[@]})) || refuse "the run is missing; give -- --config=… --workdir=gs://…"
    [[ $workdir == gs://* || $workdir == s3://* ]] ||
        refuse "--workdir=$workdir; it must be on gs:// or s3://, a pod loses its disk"
    text=$(manifest) || exit
    # Not apply: what is there under this name is a run, perhaps one that goes on.
    if [[ $dry_run == yes ]]; then
        printf '%s\n' "kubectl create --namespace=$namespace --filename=- <<'END'" "$text" END
    else
        kubectl create --namespace="$namespace" --filename=- <<<"$text"
    fi
}

case $verb in
run) run ;;
logs)
    first=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
    do_it kubectl logs --namespace="$namespace" --follow --tail=-1 --selector="$first"
    ;;
delete) do_it kubectl delete jobset "$name" --namespace="$namespace" ;;
esac
