#!/usr/bin/env bash
# One run on a Cloud TPU slice, from a machine with gcloud:
#   launch/tpu_vm.sh run NAME --zone=ZONE --accelerator-type=TYPE --runtime-version=VERSION [--spot]
#       -- --config=configs/sft.py:qwen2.5_7b --workdir=gs://BUCKET/sft
#   launch/tpu_vm.sh logs NAME --zone=ZONE [--worker=N|all]  follow the run again
#   launch/tpu_vm.sh stop NAME --zone=ZONE                   let it save and leave; the slice stays
#   launch/tpu_vm.sh fetch NAME --zone=ZONE -- --workdir=…   copy its report into runs/NAME
#   launch/tpu_vm.sh delete NAME --zone=ZONE                 delete the slice
# `run` makes the slice NAME as a queued resource, or takes the one that is there, copies the tracked
# files of this checkout, installs, runs the command after -- on all workers, follows worker 0,
# and copies the report. When the slice is preempted, or the run was stopped by a signal, it begins
# again and the run resumes. When it fails, the last lines of the workers that ended unlike most are
# shown. Ctrl-C ends only the following. It can be repeated at any time.
#
# TPU_NAME, ZONE, PROJECT_ID, ACCELERATOR_TYPE and RUNTIME_VERSION in the environment stand in for
# NAME and flags. Further flags:
#   --dry_run           print every command and run none
#   --delete            delete the slice once the run has ended (not when it was stopped)
#   --max-restarts=20   how often to begin again
#   --worker=0          whose output to follow: that of a worker, or all
#   --internal-ip       reach the workers by their internal addresses
#   --spot --reserved --network=… --subnetwork=… --internal-ips --service-account=… --scopes=…
#   --labels=… --tags=… --metadata=… --valid-until-duration=… --boot-disk=… --data-disk=…
#                       as of `gcloud compute tpus queued-resources create`
# Exit status: that of the run (0 done, 1 failed, 2 refused, 3 done in part, 4 stopped on request).
set -euo pipefail

refuse() {
    echo "jaxconv: refused: $1" >&2
    exit 2
}

verb=${1:-}
case $verb in
run | logs | stop | fetch | delete) shift ;;
help | --help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
*) refuse "verb ${verb:-missing}; it may be run, logs, stop, fetch, delete or help" ;;
esac
name=${TPU_NAME:-}
zone=${ZONE:-}
project=${PROJECT_ID:-}
accelerator_type=${ACCELERATOR_TYPE:-}
runtime_version=${RUNTIME_VERSION:-}
worker=0
dry_run=no
delete_at_end=no
max_restarts=20
create_flags=()
ssh_flags=()
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
    --delete) delete_at_end=yes ;;
    --spot | --reserved | --internal-ips) create_flags+=("$flag") ;;
    --internal-ip) ssh_flags+=("$flag") ;;
    --zone | --project | --accelerator-type | --runtime-version | --max-restarts | --worker | --network | \
        --subnetwork | --service-account | --scopes | --labels | --tags | --metadata | \
        --valid-until-duration | --boot-disk | --data-disk)
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        else
            (($# > 1)) || refuse "$1 has no value"
            value=$2
            shift
        fi
        case $flag in
        --zone) zone=$value ;;
        --project) project=$value ;;
        --accelerator-type) accelerator_type=$value ;;
        --runtime-version) runtime_version=$value ;;
        --max-restarts) max_restarts=$value ;;
        --worker) worker=$value ;;
        *) create_flags+=("$flag=$value") ;;
        esac
        ;;
    -*) refuse "$1 is no flag of $0; flags of the run come after --" ;;
    *) name=$1 ;;
    esac
    shift
done
workdir=
for argument in ${command[@]+"${command[@]}"}; do
    case $argument in --workdir=?*) workdir=${argument#*=} ;; esac
done

[[ -n $name ]] || refuse "the name of the slice is missing; give it after $verb, or TPU_NAME"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    refuse "$name is no name of a slice; it may have lower-case letters, digits and hyphens"
[[ -n $zone ]] || refuse "--zone is missing, such as --zone=us-east5-b; or set ZONE"
[[ $max_restarts =~ ^[0-9]+$ ]] || refuse "--max-restarts=$max_restarts; it must be a number"
[[ $worker =~ ^([0-9]+|all)$ ]] || refuse "--worker=$worker; it may be a number from 0, or all"
if [[ $verb == run ]]; then
    [[ -n $accelerator_type ]] ||
        refuse "--accelerator-type is missing, such as v6e-32; or set ACCELERATOR_TYPE"
    [[ -n $runtime_version ]] ||
        refuse "--runtime-version is missing, such as v2-alpha-tpuv6e; or set RUNTIME_VERSION"
    ((${#command[@]})) || refuse "the run is missing; give -- --config=… --workdir=…"
fi
if [[ $verb == run || $verb == fetch ]]; then
    [[ -n $workdir ]] || refuse "--workdir=… is missing after --"
    if [[ " ${create_flags[*]-} " == *" --spot "* && $workdir != gs://* ]]; then
        refuse "--workdir=$workdir; with --spot it must be on gs://, a preempted slice loses its disks"
    fi
    # Chips or cores: up to 8 are those of one host. Only the run can tell whether an absolute path
    # is on a file system that all workers have mounted.
    size=${accelerator_type##*-}
    if [[ $size =~ ^[0-9]+$ ]] && ((10#$size > 8)) && [[ $workdir != gs://* && $workdir != /* ]]; then
        refuse "--workdir=$workdir; $accelerator_type has several hosts, so it must be on gs://"
    fi
fi

where=(--zone="$zone")
if [[ -n $project ]]; then
    where+=(--project="$project")
fi
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
this_one=(--filter="name~/$name\$") # names are projects/…/NAME
archive=${TMPDIR:-/tmp}/jaxconv-$name.tar.gz
worker_script=jaxconv/launch/tpu_worker.sh
max_failures=10 # in a row, half a minute apart, to ask all workers how the run is
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec 3>&1 # for --dry_run, also where the output of a command is taken

say() {
    echo "jaxconv: $1" >&2
}

# Runs a command, or prints it.
do_it() {
    if [[ $dry_run == yes ]]; then
        local word
        for word in "$@"; do
            if [[ $word =~ ^[-A-Za-z0-9_./:=,@+~]+$ ]]; then
                printf '%s ' "$word"
            else
                printf "'%s' " "${word//\'/\'\\\'\'}"
            fi
        done >&3
        echo >&3
    else
        "$@"
    fi
}

on_workers() { # on_workers all|0 COMMAND
    do_it "${tpu[@]}" ssh "$name" "${where[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} \
        --worker="$1" --command="$2"
}

slice_state() {
    do_it "${tpu[@]}" list "${where[@]}" "${this_one[@]}" --format='value(state)'
}

queue_state() {
    do_it "${queue[@]}" list "${where[@]}" "${this_one[@]}" --format='value(state.state)'
}

delete_slice() {
    local request
    request=$(queue_state)
    if [[ $dry_run == yes || -n $request ]]; then
        do_it "${queue[@]}" delete "$name" "${where[@]}" --force --quiet
    elif [[ -n $(slice_state) ]]; then # made by `tpu-vm create`
        do_it "${tpu[@]}" delete "$name" "${where[@]}" --quiet
    fi
}

# Returns when the slice is ready; asks for it when there is none or only what is left of one.
wait_for_slice() {
    local state request asked=no said=
    while :; do
        state=$(slice_state)
        case $state in
        READY) return 0 ;;
        PREEMPTED | TERMINATED)
            say "slice $name is $state; deleting it"
            delete_slice
            continue
            ;;
        STOPPED) do_it "${tpu[@]}" start "$name" "${where[@]}" ;;
        '')
            request=$(queue_state)
            state=$request
            case $request in
            FAILED | SUSPENDED)
                if [[ $asked == yes ]]; then
                    say "failed: the request for slice $name is $request:"
                    "${queue[@]}" describe "$name" "${where[@]}" --format='yaml(state)' >&2
                    exit 1
                fi
                say "an earlier request for slice $name is $request; deleting it"
                delete_slice
                continue
                ;;
            '')
                do_it "${queue[@]}" create "$name" --node-id="$name" "${where[@]}" \
                    --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" \
                    ${create_flags[@]+"${create_flags[@]}"} --async
                asked=yes
                state=requested
                ;;
            esac
            ;;
        esac
        if [[ $dry_run == yes ]]; then
            slice_state # and so on, until it is READY
            return 0
        fi
        if [[ $state != "$said" ]]; then
            say "slice $name: $state"
            said=$state
        fi
        sleep 30
    done
}

copy_and_install() {
    do_it bash -o pipefail -c \
        "git ls-files -z | tar --null --files-from=- --create --gzip --file='$archive'" &&
        do_it "${tpu[@]}" scp "$archive" "$name:jaxconv.tar.gz" "${where[@]}" \
            ${ssh_flags[@]+"${ssh_flags[@]}"} --worker=all &&
        do_it rm "$archive" &&
        on_workers all "mkdir -p jaxconv && cd jaxconv && \
tar -tzf ../jaxconv.tar.gz | cut -d/ -f1 | sort -u | xargs rm -rf && \
tar -xzf ../jaxconv.tar.gz && bash launch/tpu_worker.sh install"
}

# The words of all workers, one a line; status 1 when one of them could not be asked.
words_of_run() {
    local answers
    answers=$(on_workers all "test ! -f $worker_script || bash $worker_script status") || return 1
    sed -n 's/^.*jaxconv status: //p' <<<"$answers"
}

# The word of all workers together: the one that decides what comes next.
decide() { # decide WORDS
    local words word
    words=$(sort -u <<<"$1" | tr '\n' ' ')
    for word in running 2 stopped lost; do
        if [[ " $words" == *" $word "* ]]; then
            echo "$word"
            return 0
        fi
    done
    for word in $words; do # killed by a signal, as when memory ran out or a peer was gone
        if [[ $word =~ ^[0-9]+$ ]] && ((word > 4)); then
            echo "$word"
            return 0
        fi
    done
    for word in 1 4 3 0 none; do
        if [[ " $words" == *" $word "* ]]; then
            echo "$word"
            return 0
        fi
    done
}

# The last lines of the workers that ended unlike most, or a few of each when all ended alike. The
# one with the cause may be any; worker 0 may only tell that it waited.
show_ends() { # show_ends OUTCOME WORDS
    local common lines=50
    # shellcheck disable=SC2016 # the dollar sign is awk's
    common=$(awk -v bad="$1" '
        { n[$1]++ }
        END {
            for (w in n) if (n[w] > most || (n[w] == most && best == bad)) { most = n[w]; best = w }
            print best
        }' <<<"$2")
    if [[ $common == "$1" && $(sort -u <<<"$2") == "$1" ]]; then
        common=
        lines=5
    fi
    say "the run on $name ended with $1; the last lines of those that ended otherwise than most:"
    on_workers all "bash $worker_script ends $lines $common" >&2 || true
}

# Follows the run until it has ended or the slice is gone; leaves the word for it in $outcome.
follow() {
    local state words failures=0
    while :; do
        on_workers "$worker" "bash $worker_script follow" || true
        words=$(words_of_run) || words=unreachable
        outcome=$(decide "$words")
        if [[ $dry_run == yes ]]; then
            outcome=0
        fi
        case $outcome in
        running | '') ;; # the connection broke
        *)
            if [[ $outcome =~ ^([125-9]|lost|[1-9][0-9]+)$ ]]; then
                show_ends "$outcome" "$words"
            fi
            return 0
            ;;
        esac
        if state=$(slice_state) && [[ $state != READY ]]; then
            outcome=preempted
            return 0
        fi
        if [[ $words == unreachable ]]; then
            failures=$((failures + 1))
            say "could not ask all workers of $name how the run is ($failures of $max_failures)"
            if ((failures == max_failures)); then
                outcome=unreachable
                return 0
            fi
        else
            failures=0
        fi
        sleep 30
    done
}

fetch() {
    local files=()
    do_it mkdir -p "runs/$name"
    case $workdir in
    gs://*)
        do_it gcloud storage cp "${workdir%/}/report.json" "${workdir%/}/report.md" "runs/$name/"
        return
        ;;
    /*) files=("$name:${workdir%/}/report.json" "$name:${workdir%/}/report.md") ;;
    *) files=("$name:jaxconv/${workdir%/}/report.json" "$name:jaxconv/${workdir%/}/report.md") ;;
    esac
    do_it "${tpu[@]}" scp "${files[@]}" "runs/$name/" "${where[@]}" \
        ${ssh_flags[@]+"${ssh_flags[@]}"} --worker=0
}

run() {
    local restarts=0 outcome='' started flags
    flags=$(printf '%q ' "${command[@]}")
    trap 'say "the run on $name goes on; $0 logs follows it, $0 stop ends it"; exit 130' INT
    while :; do
        wait_for_slice
        started=yes
        if [[ $(decide "$(words_of_run)") != running ]]; then # fresh, or what an earlier run has left
            copy_and_install || started=no
        fi
        if [[ $started == yes ]]; then
            on_workers all "bash $worker_script start $flags" || started=no
        fi
        if [[ $started == yes ]]; then
            follow
        elif [[ $(slice_state) == READY ]]; then
            say "failed: could not copy, install or start on $name"
            exit 1
        else
            outcome=preempted
        fi
        case $outcome in
        0 | 1 | 2 | 3 | stopped) break ;;
        unreachable)
            say "some workers of $name do not answer, though it is READY; the run may go on there. \
To begin again on another slice: $0 delete $name, then the same command"
            break
            ;;
        esac
        if ((restarts == max_restarts)); then
            say "the run on $name ended with $outcome after --max-restarts=$max_restarts"
            break
        fi
        restarts=$((restarts + 1))
        say "the run on $name ended with $outcome; beginning again ($restarts of $max_restarts)"
        sleep 30
    done
    case $outcome in
    0 | 1 | 3) fetch || say "there is no report in $workdir" ;;
    stopped | preempted | unreachable | lost | none) outcome=4 ;;
    esac
    if [[ $delete_at_end == yes && $outcome =~ ^[0-3]$ ]]; then
        delete_slice
    fi
    if ((outcome > 4)); then
        outcome=1
    fi
    exit "$outcome"
}

case $verb in
run) run ;;
logs)
    follow
    echo "jaxconv: the run on $name: $outcome" >&2
    ;;
stop) on_workers all "bash $worker_script stop" ;;
fetch) fetch ;;
delete) delete_slice ;;
esac
