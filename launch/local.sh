#!/usr/bin/env bash
# Fresh machine to running: installs into .venv and runs `python -m jaxconv.launch` with all arguments.
#   ./launch/local.sh --config=configs/omar.py
#   ./launch/local.sh --processes=2 --config=configs/sft.py     one run in two processes (processes.py)
#   PYTHON=python3.13 ./launch/local.sh --config=configs/omar.py
set -euo pipefail
caller=$PWD
processes=
arguments=()
for argument in "$@"; do
    case $argument in
    --processes=?*) processes=${argument#*=} ;;
    --processes | --processes=) processes=nothing ;;
    *) arguments+=("$argument") ;;
    esac
done
if [[ -n $processes && ! $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "--processes=$processes; it must be a number from 1, as in --processes=2" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
jaxconv_environment ""
python=$PWD/$python
supervisor=$PWD/launch/processes.py
cd "$caller"
if [[ -n $processes ]]; then
    exec "$python" "$supervisor" "$processes" ${arguments[@]+"${arguments[@]}"}
fi
exec "$python" -m jaxconv.launch ${arguments[@]+"${arguments[@]}"}
