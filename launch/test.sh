#!/usr/bin/env bash
# Installs what the tests need and runs them: style, then pytest with all arguments.
#   ./launch/test.sh                        everything that is not marked slow
#   ./launch/test.sh --slow tests/models    also the slow ones, of one folder
#   ./launch/test.sh -n 0 -x                in one process instead of two
#   JAXCONV_PARITY=0 ./launch/test.sh       without the peers that results are compared with (torch, …)
#                                           and without the compiler for TPUs
#   PYTHON=python3.13 ./launch/test.sh      with another interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
case ${JAXCONV_PARITY:-1} in
0) jaxconv_environment test ;;
1) jaxconv_environment test,parity,tpu-aot ;;
*)
    echo "JAXCONV_PARITY=$JAXCONV_PARITY; it must be 0 or 1" >&2
    exit 2
    ;;
esac
"$python" -m ruff check .
"$python" -m ruff format --check .
# Most tests keep one core busy; a file's tests share what its fixtures made.
exec "$python" -m pytest -n 2 --dist loadfile "$@"
