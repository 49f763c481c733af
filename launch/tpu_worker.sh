#!/usr/bin/env bash
# What tpu_vm.sh does on every worker of a slice, over ssh.
#   tpu_worker.sh install          a virtual environment with the project in it
#   tpu_worker.sh start [flags]    the run, in the background, so that it outlives the connection
#   tpu_worker.sh follow           its output until it ends
#   tpu_worker.sh status           one line: none, running, stopped (on request), lost, or its status
#   tpu_worker.sh ends LINES [WORD]  the last lines of its output, unless WORD is its status
#   tpu_worker.sh stop             SIGTERM: it saves and leaves
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
state=$HOME/jaxconv-run
mkdir -p "$state"

# The system's Python may be older than 3.11, so uv brings one.
install() {
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python=3.12 .venv
    python3 -m uv pip install --quiet --python=.venv/bin/python --editable '.[tpu,cloud]'
}

running() {
    [[ -f $state/pid && ! -f $state/status ]] && kill -0 "$(<"$state/pid")" 2>/dev/null
}

start() {
    local command
    command=$(printf '%q ' "$@")
    if running; then
        if [[ $command == "$(<"$state/command")" ]]; then
            return 0
        fi
        echo "another run is in progress here: $(<"$state/command")" >&2
        return 2
    fi
    rm -f "$state"/{pid,status,stopped}
    printf '%s\n' "$command" >"$state/command"
    setsid nohup bash launch/tpu_worker.sh supervise "$@" >>"$state/log" 2>&1 </dev/null &
    while [[ ! -f $state/pid ]]; do
        sleep 0.1
    done
}

supervise() {
    local status=0
    .venv/bin/python -m jaxconv.launch "$@" --distributed &
    printf '%s\n' $! >"$state/pid.new"
    mv "$state/pid.new" "$state/pid"
    wait $! || status=$?
    printf '%s\n' "$status" >"$state/status"
}

follow() {
    if running; then
        tail -n 1000 --follow=name --pid="$(<"$state/pid")" "$state/log"
    fi
}

status() {
    local word=none waited left=
    # The processes of a run end together, but not at the same moment.
    for waited in {1..20}; do
        if ! running; then break; fi
        ((waited == 20)) || sleep 1
    done
    if [[ -f $state/status ]]; then
        left=$(<"$state/status")
    fi
    if running; then
        word=running
    elif [[ -f $state/stopped && $left =~ ^(4|143|)$ ]]; then
        word=stopped # 143: by SIGTERM, before the run took signals; no status: with the worker
    elif [[ -n $left ]]; then
        word=$left
    elif [[ -f $state/pid ]]; then
        word=lost # the worker was restarted under it
    fi
    echo "jaxconv status: $word"
}

ends() {
    if [[ -f $state/log && $(status) != "jaxconv status: ${2:-}" ]]; then
        tail -n "$1" "$state/log" | sed "s/^/[$HOSTNAME] /"
    fi
}

stop() {
    if running; then
        touch "$state/stopped"
        kill -TERM "$(<"$state/pid")"
    fi
}

"$@"
