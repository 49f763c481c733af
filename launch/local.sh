#!/usr/bin/env bash
# Fresh machine to running: installs into .venv and runs `python -m jaxconv.launch` with all arguments.
#   ./launch/local.sh --config=configs/omar.py
#   PYTHON=python3.13 ./launch/local.sh --config=configs/omar.py
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
jaxconv_environment ""
python=$PWD/$python
cd "$caller"
exec "$python" -m jaxconv.launch "$@"
